"""The report as one self-contained HTML page: no scripts, no network, light and dark, readable without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from bench.report import Run
from bench.run import FAILED, OK, Row
from bench.svg import ratio_bars, ratio_text, roofline, speedup_by_length
from bench.table import LEGEND, blocks, header_lines, microseconds, speed

STYLE = (
    """
:root { color-scheme: light dark;
  --ink: #1c2024; --soft: #60646c; --faint: #e6e8eb; --paper: #fdfdfc; --card: #f6f6f4;
  --series-1: #0b62d6; --series-2: #c2410c; --series-3: #0f766e; --series-4: #7e22ce; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e8ea; --soft: #a0a6ad; --faint: #2e3338; --paper: #14171a; --card: #1b1f23;
  --series-1: #7ab2ff; --series-2: #ffa573; --series-3: #5ed6c6; --series-4: #cfa1ff; --bad: #ff8f85; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 Inter, system-ui, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased }
main { max-width: 960px; margin: 0 auto; padding: 56px 28px 80px }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 64px 0 4px }
h3 { font-size: 15px; margin: 28px 0 4px } h3 span { color: var(--soft); font-weight: 400 }
p { margin: 0 0 16px; max-width: 70ch } .soft { color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 24px 0 0; font-size: 14px }
dt { color: var(--soft) } dd { margin: 0 }
.figures { display: flex; flex-wrap: wrap; gap: 14px; margin: 34px 0 0; padding: 0; list-style: none }
.figures li { flex: 1 1 170px; background: var(--card); border-radius: 10px; padding: 16px 20px }
.figures b { display: block; font-size: 32px; line-height: 1.15; letter-spacing: -0.02em }
.figures span { color: var(--soft); font-size: 14px }
svg { display: block; width: 100%; height: auto; margin-top: 16px; overflow: visible }
svg text { font: 13px Inter, system-ui, sans-serif; fill: var(--ink) }
svg .tick { fill: var(--soft); font-size: 12px } svg .heading { font-weight: 600; font-size: 14px }
svg .value { font-weight: 600; font-size: 12.5px } svg .row-label { font-size: 12.5px }
svg .grid { stroke: var(--faint) } svg .baseline { stroke: var(--ink); stroke-width: 1.2 }
svg .line { fill: none; stroke-width: 2.2 } svg .dashed { stroke-dasharray: 6 4 } svg .label { font-weight: 500 }
svg .roof { stroke: var(--soft); stroke-width: 1.4 }
svg .bar { fill: var(--series-1) } svg .slower { fill: none; stroke: var(--bad); stroke-width: 1.5 }
svg .whisker { stroke-width: 1.2; opacity: 0.75 } svg .over { stroke: var(--ink) }
svg .marker { stroke: var(--paper); stroke-width: 1 }
"""
    + "".join(
        f"svg .series-{i} {{ stroke: var(--series-{i}) }} svg .marker.series-{i} {{ fill: var(--series-{i}); "
        f"stroke: var(--paper) }} svg .series-{i}-text {{ fill: var(--series-{i}) }}\n"
        for i in range(1, 5)
    )
    + """
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 13.5px; white-space: nowrap }
th { text-align: right; font-weight: 500; color: var(--soft); padding: 4px 10px 4px 0 }
td { text-align: right; padding: 4px 10px 4px 0; border-top: 1px solid var(--faint) }
th.left, td.left { text-align: left } tr.more td { border-top: 0; padding-top: 0 } td.soft { color: var(--soft) }
td.note { white-space: normal; color: var(--soft); text-align: left; border-top: 0; padding-top: 0 }
@media (max-width: 720px) { .chart { overflow-x: auto } .chart svg { min-width: 680px } }
td.note.bad { color: var(--bad); font-weight: 600 } .faster { font-weight: 650 } .slow { color: var(--bad) }
"""
)

COLUMNS = ("shape", "time µs", "", "speed", "peak", "PyTorch", "time µs", "ratio", "range", "1 thread", "err")
LEFT = {"shape", "PyTorch"}


def render(run: Run) -> str:
    """The whole page."""
    machine = run.machine
    facts = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in header_lines(run))
    sections = [
        ("Speed-up by sequence length", "Ratio of medians to the strongest form of PyTorch, on a logarithmic scale; "
         "whiskers from the lowest to the highest of the ratios of medians, first quartiles and minima.",
         speedup_by_length(run.rows)),
        ("Roofline", "Each row's speed over the arithmetic it does for a byte of compulsory traffic. The roofs are a "
         "GEMM, PyTorch's or ours, and a copy, measured in the same run. Hover over a mark for its row.",
         roofline(run.rows, run.peaks)),
        ("Every row against PyTorch", "The ratio to the strongest form of PyTorch, named at the right; the logarithmic "
         "scale makes twice as fast as long as half as fast.", ratio_bars(run.rows)),
    ]  # fmt: skip
    body = "".join(
        f"<section><h2>{title}</h2><p class='soft'>{text}</p><div class='chart'>{chart}</div></section>"
        for title, text, chart in sections
        if chart
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>fastattn on {escape(machine.gpu or machine.cpu)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>fastattn against PyTorch</h1><p class='soft'>{escape(machine.device)}, "
        f"{escape(machine.date)}. Every answer was checked against float64 before it was timed.</p>{_figures(run.rows)}"
        f"<dl>{facts}</dl></header>{body}"
        f"<section><h2>All numbers</h2><p class='soft'>{escape(LEGEND)}</p>{_tables(run.rows)}</section>"
        "</main></body></html>\n"
    )


def _figures(rows: Sequence[Row]) -> str:
    """The geometric mean of each group's ratios."""
    cards = []
    for group, members in groupby(rows, key=lambda row: row.group):
        ratios = [row.strongest.ratios.median for row in members if row.strongest]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            cards.append(
                f"<li><b>{ratio_text(mean)}</b>{escape(group.replace('_', ' '))}<br>"
                f"<span>geometric mean, {len(ratios)} rows<br>{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"
                "</span></li>"
            )
    return f"<ul class='figures'>{''.join(cards)}</ul>"


def _tables(rows: Sequence[Row]) -> str:
    head = "".join(f"<th{' class=left' if name in LEFT else ''}>{name}</th>" for name in COLUMNS)
    sections = []
    for (op, dtype), block in blocks(rows).items():
        body = "".join(_row(row) for row in block)
        sections.append(
            f"<h3>{escape(op)} <span>{escape(dtype)}</span></h3><div class='scroll'><table>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return "".join(sections)


def _row(row: Row) -> str:
    if row.times is None:
        css = "note bad" if row.status == FAILED else "note"
        note = f"<td class='{css}' colspan='{len(COLUMNS) - 1}'>{row.status}: {escape(row.note)}</td>"
        return f"<tr><td class='left'>{escape(row.shape)}</td>{note}</tr>"
    peak = "" if row.percent_of_peak is None else f"{row.percent_of_peak:.0f}%"
    own = [row.shape, microseconds(row.times.median_us), f"±{row.times.spread:.0%}", speed(row), peak]
    lines = []
    for i, peer in enumerate(row.peers or [None]):
        cells = [
            f"<td{' class=left' if j == 0 else ''}>{escape(text) if i == 0 else ''}</td>" for j, text in enumerate(own)
        ]
        if peer is not None:
            css = "faster" if peer.ratios.median >= 1 else "slow"
            one_thread = "" if peer.one_thread is None else f"{peer.one_thread:.2f}×"
            cells += [
                f"<td class='left'>{escape(peer.name)}</td>", f"<td>{microseconds(peer.times.median_us)}</td>",
                f"<td class='{css}'>{peer.ratios.median:.2f}×</td>",
                f"<td class='soft'>{min(peer.ratios):.2f}–{max(peer.ratios):.2f}</td>", f"<td>{one_thread}</td>",
            ]  # fmt: skip
        else:
            cells += ["<td></td>"] * 5
        cells.append(f"<td>{row.error / row.allowed:.2f}</td>" if i == 0 else "<td></td>")
        lines.append(f"<tr{' class=more' if i else ''}>{''.join(cells)}</tr>")
    if row.note and row.status == OK:
        lines.append(f"<tr class='more'><td class='note' colspan='{len(COLUMNS)}'>{escape(row.note)}</td></tr>")
    return "".join(lines)
