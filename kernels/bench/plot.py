"""Draws the rows of a benchmark: one panel for each operator and pass, every backend beside the floor."""

from collections.abc import Sequence
from pathlib import Path

from kernels.bench.calls import PASSES, STEP
from kernels.bench.table import Row

# Okabe and Ito's colours; a backend keeps its own in every picture.
COLOURS = {
    "cuda": "#0072B2",
    "triton": "#D55E00",
    "fla": "#CC79A7",
    "cpu": "#009E73",
    "chunked": "#E69F00",
    "reference": "#56B4E9",
}
OTHER = "#555555"
LINE_INCHES, PANEL_INCHES = 0.24, 4.2
FEW_SHAPES = 4  # above, all panels stand beside each other


def draw(path: Path, rows: Sequence[Row], title: str) -> Path | None:
    """Write a PNG of the milliseconds on a logarithmic axis; None where nothing was timed.

    A line runs from the floor (a black bar) to a backend's time, so that its length is the distance to go.
    """
    timed = [row for row in rows if row.ms is not None]
    if not timed:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    passes = [what for what in PASSES if any(row.what == what for row in timed)]
    wanted = [(op, what) for op in dict.fromkeys(row.op for row in timed) for what in passes]
    columns = len(passes) if len({row.shape for row in timed}) <= FEW_SHAPES else len(wanted)
    grid = [wanted[start : start + columns] for start in range(0, len(wanted), columns)]
    heights = [max(_lines(timed, *panel) for panel in line) for line in grid]
    size = (PANEL_INCHES * columns, LINE_INCHES * sum(heights) + 1.0 * len(grid) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(len(grid), columns, squeeze=False, height_ratios=heights)
    for axes, (op, what) in zip(panels.flat, wanted, strict=True):
        mine = [row for row in timed if (row.op, row.what) == (op, what)]
        axes.set_title(f"{op}, {what}" + (" (one token)" if what == STEP else ""), fontsize=10)
        if mine:
            _panel(axes, mine)
        else:
            axes.set_axis_off()
    figure.savefig(path, dpi=120)
    return path


def _lines(rows: Sequence[Row], op: str, what: str) -> int:
    """Lines of text that a panel needs: its backends, and a heading for every shape."""
    mine = [row for row in rows if (row.op, row.what) == (op, what)]
    return len(mine) + len({row.shape for row in mine})


def _panel(axes, rows: Sequence[Row]) -> None:
    """Times of one pass, grouped by shape."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    places, names, headings = [], [], []
    place = 0
    for shape in dict.fromkeys(row.shape for row in rows):
        group = sorted((row for row in rows if row.shape == shape), key=lambda row: row.ms)
        headings.append((place, shape))
        top, place = place + 0.55, place + 1
        for row in group:
            colour = COLOURS.get(row.backend, OTHER)
            axes.plot([row.floor_ms, row.ms], [place, place], color=colour, linewidth=2, alpha=0.45)
            axes.plot([row.ms], [place], "o", color=colour, markersize=6)
            label = f" {_short(row.ms)}  ({row.times_floor:.1f} x)"
            axes.annotate(
                label, (row.ms, place), va="center", fontsize=8, xytext=(5, 0), textcoords="offset points"
            )
            places.append(place)
            names.append(row.backend)
            place += 1
        axes.plot([group[0].floor_ms] * 2, [top, place - 0.45], color="black", linewidth=2.5)
    low, high = min(row.floor_ms for row in rows), max(row.ms for row in rows)
    axes.set_xscale("log")
    axes.set_xlim(min(low, high) / 1.5, high * min(max(high / low, 2) ** 0.65, 50))  # room for the labels
    axes.set_ylim(place - 0.3, -0.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(places, names, fontsize=9)
    axes.set_xlabel("milliseconds; black: floor, in brackets: times the floor", fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for y, shape in headings:
        axes.annotate(
            str(shape), (0, y), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            fontsize=8, fontweight="bold", va="center",
        )  # fmt: skip


def _short(ms: float) -> str:
    """Three significant digits, without an exponent, with the unit that fits."""
    value, unit = (ms * 1e3, "µs") if ms < 0.1 else (ms, "ms")
    return f"{float(f'{value:.3g}'):g} {unit}"
