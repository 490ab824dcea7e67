"""The pictures of an evaluation. Plain numbers in, one PNG out, as in `reports.plots`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reports.plots import COLOURS, TEACHER_COLOUR, _average, _figure, _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#9AA5B1"
MAXIMUM_POINTS = 64


def curves_by_position(path: str | Path, *, positions: Mapping[str, Sequence[float]]) -> Path:
    """Draws loss and, if there was a teacher, KL against the position in the row.

    Args:
        path: the PNG to write.
        positions: metric -> mean at each position [T] in nats/token; `loss` and perhaps `teacher_loss`, `kl`,
            `reverse_kl`. At most 64 averaged points are drawn.
    """
    model = {"color": COLOURS[0], "label": "model"}
    teacher = {"color": TEACHER_COLOUR, "linestyle": ":", "label": "teacher"}
    forward = {"color": COLOURS[1], "label": "KL (teacher ‖ model)"}
    reverse = {"color": COLOURS[2], "linestyle": "--", "label": "KL (model ‖ teacher)"}
    panels = [("Held-out loss", "loss (nats/token)", {"loss": model, "teacher_loss": teacher})]
    if "kl" in positions:
        panels.append(
            ("Distance from the teacher", "KL (nats/token)", {"kl": forward, "reverse_kl": reverse})
        )
    figure, all_axes = _panels(len(panels), "position in the row (tokens)")
    for axes, (title, label, curves) in zip(all_axes, panels, strict=True):
        for metric, style in curves.items():
            if metric in positions:
                values = np.asarray(positions[metric], dtype=np.float64)[None]
                points = min(MAXIMUM_POINTS, values.shape[1])
                places = _average(np.arange(1.0, values.shape[1] + 1)[None], points)[0]
                axes.plot(places, _average(values, points)[0], linewidth=1.8, **style)
        axes.set(title=f"{title} by position", ylabel=label)
        axes.set_xlim(left=0)
        axes.legend(framealpha=0.9)
    all_axes[-1].set_ylim(bottom=0 if len(panels) == 2 else None)
    return _save(figure, path)


def layer_bars(path: str | Path, *, layers: Sequence[Mapping]) -> Path:
    """Draws the relative error of every decoder layer's output, replaced layers apart from kept ones.

    Args:
        path: the PNG to write.
        layers: records {"layer", "mixer", "relative_error"}; `mixer` is `attention` where attention was kept.
    """
    label = "‖h_model − h_teacher‖ / ‖h_teacher‖ (RMS)"
    figure, axes = _figure("Hidden states after each decoder layer: relative error", "decoder layer", label)
    kinds = (
        (False, {"color": COLOURS[0], "label": "attention replaced"}),
        (True, {"color": COLOURS[1], "hatch": "//", "label": "attention kept"}),
    )
    for kept, style in kinds:
        chosen = [record for record in layers if (record["mixer"] == "attention") == kept]
        if chosen:
            errors = [record["relative_error"] for record in chosen]
            bars = axes.bar([record["layer"] for record in chosen], errors, edgecolor="white", **style)
            if len(layers) <= 16:
                axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=9)
    axes.set_xticks(np.arange(0, len(layers), -(-len(layers) // 16)))
    axes.margins(y=0.12)
    axes.legend()
    return _save(figure, path)


def choice_bars(
    path: str | Path, *, shares: Mapping[int, Mapping[str, float]], labels: Mapping[str, str]
) -> Path:
    """Draws how much of attention several choices of blocks hold, a group of bars for each layer.

    Args:
        path: the PNG to write.
        shares: layer -> way -> share in [0, 1].
        labels: way -> how it is called, in the order of the bars.
    """
    title = "Attention on the blocks that a layer sees"
    figure, axes = _figure(
        title, "decoder layer", "share of attention (%)", width=3 + 1.6 * max(len(shares), 3)
    )
    width, colours = 0.8 / len(labels), (GREY, *COLOURS[2:4], COLOURS[0], TEACHER_COLOUR)
    for index, (way, label) in enumerate(labels.items()):
        places = np.arange(len(shares)) + (index - (len(labels) - 1) / 2) * width
        values = [100 * found[way] for found in shares.values()]
        bars = axes.bar(places, values, width, label=label, color=colours[index], edgecolor="white")
        if len(shares) <= 6:
            axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=2, fontsize=9)
    axes.set_xticks(np.arange(len(shares)), [f"{layer}" for layer in shares])
    axes.set_ylim(0, 106)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return _save(figure, path)


def task_bars(path: str | Path, *, scores: Sequence[Mapping]) -> Path:
    """Draws the scores of tasks, the teacher's beside the model's, with the score of guessing where known.

    Args:
        path: the PNG to write.
        scores: records {"label", "value", "teacher", "chance", "error", "teacher_error", "rising"}; `rising`
            says whether more is better. Scores that should be high and those that should be low get a panel
            each, the latter with a logarithmic axis. None where something is not known.
    """
    panels = [
        ("Scores (more is better)", "linear", [score for score in scores if score["rising"]]),
        ("Scores (less is better)", "log", [score for score in scores if not score["rising"]]),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure, all_axes = _panels(len(panels), "")
    for axes, (title, scale, chosen) in zip(all_axes, panels, strict=True):
        _draw_tasks(axes, chosen)
        axes.set(title=title, xlabel={"linear": "score", "log": "value (log scale)"}[scale])
        if scale == "linear":
            axes.set_xlim(left=0)
        elif any(score["value"] > 0 for score in chosen):
            axes.set_xscale(scale)
    named = {
        name: handle
        for axes in all_axes
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    rows = max(len(chosen) for _, _, chosen in panels)
    figure.set_size_inches(figure.get_figwidth(), max(3.0, 1.5 + 0.75 * rows))
    return _save(figure, path)


def _panels(count: int, x_label: str) -> "tuple[Figure, list[Axes]]":
    """A figure with so many panels side by side."""
    figure, axes = _figure("", x_label, "", columns=count, width=8.0 if count == 1 else 12.0)
    return figure, [axes] if count == 1 else list(axes)


def _draw_tasks(axes: "Axes", scores: Sequence[Mapping]) -> None:
    """Horizontal bars, one task below the other."""
    with_teacher = any(score["teacher"] is not None for score in scores)
    height = 0.38 if with_teacher else 0.6
    shift = height / 2 if with_teacher else 0.0
    kinds = (
        ("value", "error", -shift, COLOURS[0], "model"),
        ("teacher", "teacher_error", shift, GREY, "teacher"),
    )
    for key, error, offset, colour, name in kinds:
        drawable = (score[key] is not None and math.isfinite(score[key]) for score in scores)
        rows = [pair for pair, shown in zip(enumerate(scores), drawable, strict=True) if shown]
        if not rows:
            continue
        places = [index + offset for index, _ in rows]
        values = [score[key] for _, score in rows]
        spread = [score[error] or math.nan for _, score in rows]
        bars = axes.barh(
            places, values, height, color=colour, label=name, xerr=spread, ecolor="#444444", capsize=3
        )
        axes.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3, fontsize=9)
    known = [(index, score["chance"]) for index, score in enumerate(scores) if score["chance"]]
    if known:
        places, chances = np.array(known).T
        axes.vlines(chances, places - 0.45, places + 0.45, color="#CC0000", linestyle="--", label="chance")
    axes.set_yticks(range(len(scores)), [score["label"] for score in scores])
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.grid(False, axis="y")
