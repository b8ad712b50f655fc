"""The page's charts as inline SVG. Colours come from the page's CSS variables, so that one chart serves light and dark.

Every series also has its own marker, dash or label: nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from bench.peaks import Peaks
from bench.run import Row

RATIO_TICKS = (0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
ROW_HEIGHT, HEADING_HEIGHT = 22, 34


@dataclass
class Canvas:
    """Collects elements; coordinates are pixels of the viewBox."""

    width: float
    height: float
    label: str  # read out in place of the picture
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>')

    def polyline(self, points: Iterable[tuple[float, float]], css: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{css}"/>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" class="{css}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start", more: str = "") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}'
        self.parts.append(f'<text {place} class="{css}">{escape(text)}</text>')

    def marker(self, x: float, y: float, shape: int, css: str, title: str = "", size: float = 5) -> None:
        """One of six shapes: circle, square, diamond, triangle, cross, hollow circle."""
        corners = {
            1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            2: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
            3: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
            4: ((-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3),
                (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)),
        }.get(shape)  # fmt: skip
        if corners is None:
            body = (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" class="marker {css}{" hollow" if shape == 5 else ""}">'
            )
            self.parts.append(f"{body}<title>{escape(title)}</title></circle>")
            return
        path = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
        self.parts.append(f'<polygon points="{path}" class="marker {css}"><title>{escape(title)}</title></polygon>')

    def render(self) -> str:
        head = f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" aria-label="{escape(self.label)}">'
        return "\n".join([head, *self.parts, "</svg>"])


def log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, end] in equal steps for equal factors."""
    span = math.log(high / low)
    return lambda value: start + (end - start) * math.log(value / low) / span


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio >= 10 else f"{ratio:.1f}×" if ratio >= 1.95 else f"{ratio:.2f}×"


# --- Speed-up by sequence length -------------------------------------------------------------------------------------


def speedup_by_length(rows: Sequence[Row]) -> str:
    """One panel for each direction, one line for each variant: the ratio to the strongest form of PyTorch."""
    placed = [row for row in rows if row.seqlen and row.strongest]
    if not placed:
        return ""
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in placed:
        direction, variant = row.variant.split(", ")
        panels.setdefault(direction, {}).setdefault(variant, []).append(row)
    values = [ratio for row in placed for ratio in row.strongest.ratios]
    low, high = min(0.9, min(values) / 1.1), max(values) * 1.12
    canvas = Canvas(900, 330, "Speed-up over PyTorch by sequence length")
    width = (canvas.width - 50) / len(panels)
    for i, (direction, lines) in enumerate(panels.items()):
        _length_panel(
            canvas, 50 + i * width, width - 84, direction, lines, (low, high), sorted({r.seqlen for r in placed})
        )
    return canvas.render()


def _length_panel(
    canvas: Canvas, left: float, width: float, title: str, lines: dict[str, list[Row]], span: tuple, lengths: list[int]
) -> None:
    top, bottom = 44, canvas.height - 44
    y = log_scale(*span, bottom, top)
    x = log_scale(lengths[0] / 1.25, lengths[-1] * 1.25, left, left + width)
    canvas.text(left, 22, f"attention {title}", "heading")
    for tick in RATIO_TICKS:
        if span[0] <= tick <= span[1]:
            canvas.line(left, y(tick), left + width, y(tick), "baseline" if tick == 1 else "grid")
            canvas.text(left - 8, y(tick) + 4, f"{tick:g}×", "tick", "end")
    for length in lengths:
        canvas.text(x(length), bottom + 20, f"{length:,}", "tick", "middle")
    canvas.text(left + width / 2, bottom + 38, "sequence length", "tick", "middle")
    ends: list[float] = []
    for i, (variant, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda row: row.seqlen)
        css = f"series-{i + 1}"
        points = [(x(row.seqlen), y(row.strongest.ratios.median)) for row in rows]
        others = {r.seqlen: r.strongest.ratios.median for name, line in lines.items() if name != variant for r in line}
        canvas.polyline(points, f"line {css}{' dashed' if i else ''}")
        for (px, py), row in zip(points, rows, strict=True):
            ratios = row.strongest.ratios
            canvas.line(px, y(min(ratios)), px, y(max(ratios)), f"whisker {css}")
            canvas.marker(px, py, i, css, f"{row.shape}: {ratios.median:.2f}× {row.strongest.name}")
            # Above the marker, but for the lower of two lines: their numbers may not meet.
            below = others.get(row.seqlen, 0) > ratios.median
            canvas.text(px, py + (21 if below else -12), ratio_text(ratios.median), "value", "middle")
        end = points[-1][1] + 4
        while any(abs(end - other) < 15 for other in ends):
            end += 15
        ends.append(end)
        canvas.text(points[-1][0] + 14, end, variant, f"label {css}-text")


# --- Roofline --------------------------------------------------------------------------------------------------------


def roofline(rows: Sequence[Row], peaks: Peaks) -> str:
    """Each row's speed over its arithmetic intensity, under the roofs that this machine's GEMM and copy measured."""
    timed = [row for row in rows if row.times and row.flops and row.bytes]
    if not timed:
        return ""
    canvas = Canvas(900, 470, "Roofline: speed over arithmetic intensity, with this machine's measured roofs")
    left, right, top, bottom = 60, 700, 18, canvas.height - 52
    intensity = [row.flops / row.bytes for row in timed]
    speeds = [row.gflops for row in timed]
    top_speed = max(*peaks.gemm.values(), *speeds) * 1.6
    x_span = min(intensity) / 1.8, max(*intensity, max(peaks.gemm.values()) / peaks.copy_memory) * 1.8
    y_span = min(speeds) / 1.8, top_speed
    x, y = log_scale(*x_span, left, right), log_scale(*y_span, bottom, top)
    _decades(canvas, x, x_span, y, y_span, (left, right, top, bottom))
    for name, gflops in peaks.gemm.items():
        start = max(x_span[0], gflops / peaks.copy_cache)
        canvas.line(x(start), y(gflops), right, y(gflops), "roof")
        canvas.text(right + 8, y(gflops) + 4, f"{name} GEMM {gflops:,.0f}", "tick")
    best = max(peaks.gemm.values())
    for name, bandwidth, css in (("cache", peaks.copy_cache, "roof"), ("memory", peaks.copy_memory, "roof dashed")):
        start, end = max(x_span[0], y_span[0] / bandwidth), best / bandwidth
        canvas.line(x(start), y(start * bandwidth), x(end), y(best), css)
        # Along the slope, high enough to be clear of the rows.
        place = 0.62 * end
        angle = math.degrees(math.atan2(y(best) - y(start * bandwidth), x(end) - x(start)))
        turn = f'transform="rotate({angle:.1f} {x(place):.1f} {y(place * bandwidth):.1f})"'
        canvas.text(x(place), y(place * bandwidth) - 7, f"{name} {bandwidth:,.0f} GB/s", "tick", "end", turn)
    for i, op in enumerate(dict.fromkeys(row.group for row in timed)):
        css = f"series-{i + 1}"
        for row in (row for row in timed if row.group == op):
            title = f"{row.op}, {row.shape}, {row.dtype}: {row.gflops:.0f} GFLOP/s, {row.percent_of_peak:.0f}% of peak"
            canvas.marker(x(row.flops / row.bytes), y(row.gflops), i, css, title)
        canvas.marker(right + 16, bottom - 70 + 20 * i, i, css)
        canvas.text(right + 30, bottom - 66 + 20 * i, op.replace("_", " "), "label")
    return canvas.render()


def _decades(canvas: Canvas, x: Callable, x_span: tuple, y: Callable, y_span: tuple, box: tuple) -> None:
    left, right, top, bottom = box
    for exponent in range(math.ceil(math.log10(x_span[0])), math.floor(math.log10(x_span[1])) + 1):
        canvas.line(x(10**exponent), top, x(10**exponent), bottom, "grid")
        canvas.text(x(10**exponent), bottom + 20, f"{10**exponent:g}", "tick", "middle")
    for exponent in range(math.ceil(math.log10(y_span[0])), math.floor(math.log10(y_span[1])) + 1):
        canvas.line(left, y(10**exponent), right, y(10**exponent), "grid")
        canvas.text(left - 8, y(10**exponent) + 4, f"{10**exponent:g}", "tick", "end")
    canvas.text((left + right) / 2, bottom + 40, "arithmetic intensity, FLOP per byte", "tick", "middle")
    canvas.text(left - 44, top - 4, "GFLOP/s", "tick")


# --- Bars ------------------------------------------------------------------------------------------------------------


def ratio_bars(rows: Sequence[Row]) -> str:
    """Every row's ratio to the strongest form of PyTorch: from 1× to the right where ours is faster, else left."""
    compared = [row for row in rows if row.strongest]
    if not compared:
        return ""
    by_op: dict[str, list[Row]] = {}
    for row in compared:
        by_op.setdefault(row.op, []).append(row)
    values = [ratio for row in compared for ratio in row.strongest.ratios]
    low, high = min(0.8, min(values) / 1.1), max(2.0, max(values)) * 1.05
    height = 34 + len(compared) * ROW_HEIGHT + len(by_op) * HEADING_HEIGHT
    canvas = Canvas(900, height, "Ratio to the strongest form of PyTorch, row by row")
    left, right = 250, 690
    x = log_scale(low, high, left, right)
    for tick in RATIO_TICKS:
        if low <= tick <= high:
            canvas.line(x(tick), 26, x(tick), height - 6, "baseline" if tick == 1 else "grid")
            canvas.text(x(tick), 16, f"{tick:g}×", "tick", "middle")
    y = 26.0
    for op, block in by_op.items():
        y += HEADING_HEIGHT
        canvas.text(0, y - 9, op, "heading")
        for row in block:
            _bar(canvas, row, x, y, right)
            y += ROW_HEIGHT
    return canvas.render()


def _bar(canvas: Canvas, row: Row, x: Callable, y: float, right: float) -> None:
    ratios = row.strongest.ratios
    middle = y + ROW_HEIGHT / 2
    half = "" if row.dtype == "float32" else f" {row.dtype}"
    canvas.text(238, middle + 4, row.shape + half, "row-label", "end")
    start, end = sorted((x(1), x(ratios.median)))
    theirs = f"{row.strongest.name} {row.strongest.times.median_us:,.0f} µs"
    title = f"{row.op} {row.shape}: {row.times.median_us:,.0f} µs, {theirs}"
    canvas.rect(start, middle - 7, max(1.5, end - start), 14, "bar" if ratios.median >= 1 else "bar slower", title)
    canvas.line(x(min(ratios)), middle, x(max(ratios)), middle, "whisker over")
    canvas.text(right + 14, middle + 4, ratio_text(ratios.median), "value")
    note = " (disturbed)" if row.disturbed else ""
    canvas.text(right + 62, middle + 4, row.strongest.name + note, "tick")
