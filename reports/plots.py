"""The pictures of a run. Every function takes plain numbers, writes one PNG and returns its path.

Colours are those of Okabe and Ito, told apart by people with any common colour vision, and curves also differ
in dash or marker. Figures are built without pyplot, so nothing global is touched and no display is needed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEACHER_COLOUR = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
LAYER_ALIGNMENT = re.compile(r"(?P<stage>.+)/layer_(?P<layer>\d+)/alignment")
MAXIMUM_COLUMNS = 400


def loss_against_tokens(
    path: str | Path,
    *,
    rows: Sequence[Mapping],
    metrics: Sequence[str],
    stages: Sequence[Mapping] = (),
    teacher_loss: float | None = None,
) -> Path:
    """Draws the student's loss over the tokens seen, the teacher's loss as a line, stages as shaded spans.

    Args:
        path: the PNG to write.
        rows: metric rows `{stage, step, tokens, metric, value}`, tokens counted over the whole run.
        metrics: names of the metrics to draw, all of them cross-entropies in nats/token, such as
            `distill/loss`.
        stages: `summary["stages"]`; their held-out losses become points at the end of each stage.
        teacher_loss: held-out loss of the teacher, nats/token.

    Raises:
        ValueError: there is nothing to draw.
    """
    measured = _stage_ends(stages)
    curves = {
        name: [(row["tokens"], row["value"]) for row in rows if row["metric"] == name] for name in metrics
    }
    curves = {name: points for name, points in curves.items() if points}
    if not measured and not curves:
        raise ValueError(
            "loss against tokens: neither a stage's held-out loss nor a row of the named metrics"
        )
    scale, unit = _token_scale([tokens for _, tokens, _ in measured] + [row["tokens"] for row in rows])
    figure, axes = _figure("Loss against tokens", f"training tokens ({unit})", "loss (nats/token)")
    for index, (name, points) in enumerate(curves.items()):
        tokens, values = np.array(points, dtype=np.float64).T
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(tokens / scale, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(tokens / scale, _smooth(values), color=colour, linewidth=1.8, label=f"{name} (training)")
    if measured:
        positions = [tokens / scale for _, tokens, _ in measured]
        losses = [loss for _, _, loss in measured]
        # The line between the points only guides the eye: nothing was measured there.
        axes.plot(positions, losses, "--", color=COLOURS[1], linewidth=1, alpha=0.5)
        axes.plot(positions, losses, "o", color=COLOURS[1], markersize=7, zorder=4, label="student, held out")
    if teacher_loss is not None:
        label = f"teacher, held out: {teacher_loss:.3f}"
        axes.axhline(teacher_loss, color=TEACHER_COLOUR, linestyle=":", linewidth=1.8, label=label)
    _mark_stages(axes, _stage_spans(rows, scale))
    axes.margins(x=0.04, y=0.08)
    _label_ends(axes, [(tokens / scale, loss) for _, tokens, loss in measured])
    axes.legend(loc="upper right", framealpha=0.9)
    return _save(figure, path)


def alignment_heat_map(path: str | Path, *, rows: Sequence[Mapping], stage: str = "align") -> Path:
    """Draws the alignment loss of every replaced layer over the steps of a stage.

    Args:
        path: the PNG to write.
        rows: metric rows; those named `<stage>/layer_<i>/alignment` are used.
        stage: name of the stage.

    Raises:
        ValueError: no row holds an alignment loss of that stage.
    """
    from matplotlib.colors import LogNorm

    steps, layers, values = alignment_matrix(rows, stage)
    figure, axes = _figure(f"Alignment loss of each layer, stage {stage}", "optimiser step", "layer")
    finite = values[np.isfinite(values)]
    # Losses fall by orders of magnitude, and a linear scale would show the first steps only.
    positive = finite.size > 0 and finite.min() > 0
    norm = LogNorm(finite.min(), max(finite.max(), finite.min() * 1.01)) if positive else None
    edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
    image = axes.pcolormesh(edges, np.arange(len(layers) + 1), values, cmap="viridis", norm=norm)
    shown = np.arange(0, len(layers), -(-len(layers) // 16))
    axes.set_yticks(shown + 0.5, [str(layers[index]) for index in shown])
    axes.invert_yaxis()
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="alignment loss" + (" (log scale)" if positive else ""))
    return _save(figure, path)


def alignment_matrix(rows: Sequence[Mapping], stage: str) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Collects per-layer alignment losses from metric rows.

    Long stages are averaged into at most 400 columns.

    Args:
        rows: metric rows.
        stage: name of the stage.

    Returns:
        steps [S] float64, layers [L] as a list of indices, values [L,S] float64, NaN where nothing was
        logged.

    Raises:
        ValueError: no row holds an alignment loss of that stage.
    """
    cells = {}
    for row in rows:
        match = LAYER_ALIGNMENT.fullmatch(row["metric"])
        if match and match["stage"] == stage:
            cells[int(match["layer"]), row["step"]] = row["value"]
    if not cells:
        raise ValueError(f"alignment heat map: no metric {stage}/layer_<i>/alignment among the rows")
    layers = sorted({layer for layer, _ in cells})
    steps = sorted({step for _, step in cells})
    values = np.array([[cells.get((layer, step), np.nan) for step in steps] for layer in layers])
    positions = np.array(steps, dtype=np.float64)
    if len(steps) > MAXIMUM_COLUMNS:
        positions = _average(positions[None], MAXIMUM_COLUMNS)[0]
        values = _average(values, MAXIMUM_COLUMNS)
    return positions, layers, values


def loss_by_position(
    path: str | Path,
    *,
    positions: Sequence[float],
    students: Mapping[str, Sequence[float]],
    teacher: Sequence[float] | None = None,
) -> Path:
    """Draws the held-out loss against the position in the row: how well the context behind a token is used.

    Args:
        path: the PNG to write.
        positions: positions in the row [P], tokens.
        students: losses [P] in nats/token for each stage to show, by name; at most 64 averaged points are
            drawn.
        teacher: losses [P] of the teacher.
    """
    figure, axes = _figure("Loss by position in the row", "position in the row (tokens)", "loss (nats/token)")
    points = min(64, len(positions))
    places = _average(np.asarray(positions, dtype=np.float64)[None], points)[0]
    for index, (name, losses) in enumerate(students.items()):
        averaged = _average(np.asarray(losses, dtype=np.float64)[None], points)[0]
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        axes.plot(places, averaged, linewidth=1.8, label=f"student after {name}", **style)
    if teacher is not None:
        averaged = _average(np.asarray(teacher, dtype=np.float64)[None], points)[0]
        axes.plot(places, averaged, color=TEACHER_COLOUR, linewidth=1.8, linestyle=":", label="teacher")
    axes.set_xlim(left=0)
    axes.legend(loc="best", framealpha=0.9)
    return _save(figure, path)


def decoding_cost(
    path: str | Path,
    *,
    context_lengths: Sequence[int],
    models: Mapping[str, Mapping[str, Sequence[float]]],
) -> Path:
    """Draws what one more token costs in time and memory against the context before it.

    Args:
        path: the PNG to write.
        context_lengths: tokens already in the cache [C].
        models: name -> `seconds_per_token` [C] and `state_bytes` [C] (cache of one row); one named
            `teacher` is
            drawn as such.
    """
    from matplotlib.ticker import FuncFormatter

    figure, (time_axes, memory_axes) = _figure("", "", "", columns=2, width=10.0)
    panels = (
        (time_axes, "seconds_per_token", 1e3, "Decoding time", "time per token (ms)"),
        (memory_axes, "state_bytes", 2.0**-20, "Decoding memory", "cache of one row (MiB)"),
    )
    for axes, key, factor, title, label in panels:
        colours = iter(COLOURS)
        for name, numbers in models.items():
            style = {"color": TEACHER_COLOUR, "marker": "s", "linestyle": ":"}
            if name != "teacher":
                style = {"color": next(colours), "marker": "o"}
            axes.plot(context_lengths, np.asarray(numbers[key]) * factor, label=name, **style)
        axes.set(title=title, xlabel="context before the token (tokens)", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(context_lengths), [f"{length:,}" for length in context_lengths])
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_xticks([], minor=True)
        axes.legend(loc="upper left")
    time_axes.set_ylim(bottom=0)
    memory_axes.set_yscale("log", base=2)
    memory_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    return _save(figure, path)


def layer_scores(
    path: str | Path,
    *,
    scores: Sequence[float],
    kept: Sequence[int],
    label: str = "damage when attention is replaced (nats/token)",
) -> Path:
    """Draws how much each layer's attention matters, the layers that keep it highlighted.

    Args:
        path: the PNG to write.
        scores: one number per layer [L]; larger means that losing the attention there costs more.
        kept: indices of the layers that keep attention.
        label: what the scores are, with the unit.
    """
    figure, axes = _figure("Layer selection", "layer", label)
    for chosen, colour, hatch, name in (
        (False, "#9AA5B1", None, "replaced"),
        (True, COLOURS[1], "//", "keeps attention"),
    ):
        layers = [layer for layer in range(len(scores)) if (layer in kept) == chosen]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": name}
        bars = axes.bar(layers, [scores[layer] for layer in layers], **style)
        if len(scores) <= 16:
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=9)
    axes.set_xticks(np.arange(0, len(scores), -(-len(scores) // 16)))
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.margins(x=0.02, y=0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # inside it would hide bars
    return _save(figure, path)


def _figure(
    title: str, x_label: str, y_label: str, *, columns: int = 1, width: float = 8.0
) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(True, color="#E3E3E3", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[0] if columns == 1 else panels


def _save(figure: "Figure", path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib inside, equal numbers give equal files.
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _average(values: np.ndarray, columns: int) -> np.ndarray:
    """Averages [L,S] into [L,columns] over neighbouring columns, NaN only where all of them are."""
    groups = np.array_split(values, columns, axis=1)
    counts = [np.maximum(np.isfinite(group).sum(axis=1), 1) for group in groups]
    sums = [np.where(np.isfinite(group), group, 0).sum(axis=1) for group in groups]
    empty = [~np.isfinite(group).any(axis=1) for group in groups]
    columns_ = [np.where(e, np.nan, s / c) for s, c, e in zip(sums, counts, empty, strict=True)]
    return np.stack(columns_, axis=1)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the centred running median over about a thirtieth of the curve."""
    half = len(values) // 60
    if half == 0:
        return values
    padded = np.pad(values, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def _stage_ends(stages: Sequence[Mapping]) -> list[tuple[str, float, float]]:
    """Returns (stage, tokens of the run so far, held-out loss) for each stage with a loss."""
    ends, tokens = [], 0
    for stage in stages:
        tokens += stage["tokens"] or 0
        if stage["loss"] is not None:
            ends.append((stage["name"], tokens, stage["loss"]))
    return ends


def _stage_spans(rows: Sequence[Mapping], scale: float) -> list[tuple[str, float, float]]:
    """Returns (stage, first, last scaled tokens) in run order; each span starts where the last one ends."""
    last: dict[str, float] = {}
    for row in rows:
        last[row["stage"]] = max(last.get(row["stage"], 0.0), row["tokens"] / scale)
    starts = [0.0, *last.values()][: len(last)]
    return [
        (stage, start, end) for (stage, end), start in zip(last.items(), starts, strict=True) if end > start
    ]


def _mark_stages(axes: "Axes", spans: Sequence[tuple[str, float, float]]) -> None:
    for index, (stage, start, end) in enumerate(spans):
        axes.axvspan(start, end, color="#F2F4F7" if index % 2 else "#FFFFFF", zorder=0)
        if index:
            axes.axvline(start, color="#888888", linewidth=0.8)
        axes.annotate(
            stage,
            ((start + end) / 2, 0.015),
            xycoords=("data", "axes fraction"),
            ha="center",
            color="#555555",
        )


def _label_ends(axes: "Axes", points: Sequence[tuple[float, float]]) -> None:
    for tokens, loss in dict.fromkeys(points):
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        place = {"xytext": (0, 11), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(f"{loss:.3f}", (tokens, loss), bbox=box, zorder=5, **place)


def _token_scale(tokens: Sequence[float]) -> tuple[float, str]:
    largest = max(tokens, default=0)
    for limit, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= limit:
            return limit, unit
    return 1.0, "count"
