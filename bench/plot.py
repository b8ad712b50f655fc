"""One picture for README: the rows that carry a headline, as bars of their ratio to the strongest form of PyTorch."""

from __future__ import annotations

from pathlib import Path

from bench.report import Run
from bench.svg import RATIO_TICKS, ratio_text
from models.files import in_one_step

INK, SOFT, FAINT, BLUE = "#1c2024", "#60646c", "#e6e8eb", "#0b62d6"


def write_png(run: Run, path: Path) -> bool:
    """Writes the plot to ``path``; False if there is none, without a row that has a headline and a peer, or
    without matplotlib."""
    rows = [row for row in run.rows if row.headline and row.strongest]
    if not rows:
        return False
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        # The other files have everything that the plot shows; what was measured is not to be lost for it.
        return False

    # Inches: labels left of the bars, the ratio and the peer right of them, a title above, a line of facts below.
    height = 1.15 + 0.3 * len(rows)
    figure = Figure(figsize=(9, height), facecolor="white")
    axes = figure.add_axes((3.1 / 9, 0.4 / height, 3.8 / 9, 0.3 * len(rows) / height))
    ratios = [row.strongest.ratios.median for row in rows]
    low, high = min(0.8, min(ratios) / 1.1), max(2.2, *(max(row.strongest.ratios) for row in rows)) * 1.05
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    ticks = [tick for tick in RATIO_TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], color=SOFT, fontsize=9)
    axes.set_xticks([], minor=True)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [row.headline for row in rows], color=INK, fontsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}  # x in axes, y in rows
    for i, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        slower = ratio < 1
        axes.barh(i, ratio - 1, left=1, height=0.62, color="white" if slower else BLUE, edgecolor=BLUE)
        axes.plot([min(row.strongest.ratios), max(row.strongest.ratios)], [i, i], color=INK, linewidth=1)
        axes.text(1.03, i, ratio_text(ratio), color=INK, weight="bold", **beside)
        axes.text(1.17, i, row.strongest.name, color=SOFT, fontsize=9, **beside)
    machine = run.machine
    inch = 1 / figure.get_figheight()
    title = "Times as fast as the strongest form of PyTorch"
    where = f"{machine.device}, torch {machine.torch}, fastattn {machine.commit}, {machine.date}"
    figure.text(0.012, 1 - 0.14 * inch, title, va="top", color=INK, fontsize=12, weight="bold")
    figure.text(0.012, 0.08 * inch, where, va="bottom", color=SOFT, fontsize=8)
    with in_one_step(path) as partial:
        figure.savefig(partial, format="png", dpi=160)
    return True
