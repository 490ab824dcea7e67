"""Charts and tables that Weights & Biases draws by itself: plain numbers in, wandb objects out."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb
    from wandb.plot.custom_chart import CustomChart

LOSS = re.compile(r"[^/]+/loss")
POINTS = 400  # at most in a line; a chart's table holds 10,000 rows
POSITIONS = 64  # at most in a line over positions in the row
COLUMNS = ("loss", "perplexity", "kl", "top1_agreement", "gap_recovered", "copy_gain", "tokens", "seconds")
Line = tuple[list[float], list[float]]


def loss_chart(
    rows: Sequence[Mapping], stages: Sequence[Mapping], teacher_loss: float | None
) -> "CustomChart | None":
    """Training and held-out loss over the tokens seen, and the teacher's as a horizontal line.

    Args:
        rows: metric rows `{tokens, metric, value}`; those named `<stage>/loss` are drawn.
        stages: records of the finished stages; each one's loss stands where the stage ended.
        teacher_loss: held-out loss of the teacher, nats/token.

    Returns:
        The chart, or None where there is no loss yet.
    """
    lines: dict[str, Line] = {}
    for row in rows:
        if LOSS.fullmatch(row["metric"]):
            tokens, values = lines.setdefault(f"{row['metric']} (training)", ([], []))
            tokens.append(row["tokens"])
            values.append(row["value"])
    lines = {name: (thin(tokens), thin(values)) for name, (tokens, values) in lines.items()}
    if stages:
        ends = [sum(stage["tokens"] for stage in stages[: index + 1]) for index in range(len(stages))]
        lines["student, held out"] = (ends, [stage["loss"] for stage in stages])
    if not lines:
        return None
    if teacher_loss is not None:
        last = max(tokens[-1] for tokens, _ in lines.values())
        lines["teacher, held out"] = ([0, last], [teacher_loss, teacher_loss])
    return _line_chart(lines, "Loss (nats/token)", "training tokens")


def position_chart(curves: Mapping[str, Sequence[float]], title: str) -> "CustomChart":
    """Something held-out against the position in the row, one line for each curve.

    Args:
        curves: name -> value at each position [T].
        title: what the values are, with the unit.
    """
    lines = {}
    for name, values in curves.items():
        known = [(place, value) for place, value in enumerate(values, 1) if math.isfinite(value)]
        lines[name] = tuple(thin(numbers, POSITIONS) for numbers in zip(*known, strict=True))
    return _line_chart(lines, title, "position in the row (tokens)")


def scores_chart(scores: Sequence[float], kept: Sequence[int], label: str) -> "CustomChart":
    """Bars of what each layer's attention is worth.

    Args:
        scores: one number per layer [L].
        kept: indices of the layers that keep attention; they are marked.
        label: what the scores are, with the unit.
    """
    import wandb

    names = [f"{layer} (kept)" if layer in kept else str(layer) for layer in range(len(scores))]
    table = wandb.Table(columns=["layer", label], data=[list(row) for row in zip(names, scores, strict=True)])
    return wandb.plot.bar(table, "layer", label, title=f"Layer selection: {label}")


def results_table(stages: Sequence[Mapping], teacher: Mapping | None) -> "wandb.Table":
    """The run's table of results: one row per finished stage, the teacher's last; None where not measured."""
    import wandb

    records = [*stages, *([{"name": "teacher", **teacher}] if teacher else [])]
    data = [[record["name"], *(record.get(column) for column in COLUMNS)] for record in records]
    return wandb.Table(columns=["stage", *COLUMNS], data=data, allow_mixed_types=True)


def thin(values: Sequence[float], points: int = POINTS) -> list[float]:
    """Means over neighbours, so that `points` remain at most; all values where there are no more."""
    count = min(points, len(values))
    edges = [len(values) * index // count for index in range(count + 1)] if count else [0]
    groups = [values[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    return [sum(group) / len(group) for group in groups]


def _line_chart(lines: Mapping[str, Line], title: str, x_name: str) -> "CustomChart":
    import wandb

    return wandb.plot.line_series(
        xs=[list(x) for x, _ in lines.values()],
        ys=[list(y) for _, y in lines.values()],
        keys=list(lines),
        title=title,
        xname=x_name,
    )
