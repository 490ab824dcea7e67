"""The pictures of the evaluation suite `long_context`, beside its maps. Plain numbers in, one PNG out, as in
`reports.plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from reports.plots import COLOURS, DASHES, TEACHER_COLOUR, _figure, _save

MARKERS = ("o", "^", "D", "v", "P", "X")
STYLES = {
    "model": {"color": COLOURS[0], "marker": "o"},
    "teacher": {"color": TEACHER_COLOUR, "marker": "s", "linestyle": ":"},
}

Recall = dict[tuple[int, int], list[float]]  # (row length, pairs) -> the share of right values for each seed


def loss_by_bucket(
    path: str | Path,
    *,
    ends: Sequence[int],
    losses: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float | None]],
) -> Path:
    """Draws the held-out loss against the position in the row, by buckets that double in length.

    Args:
        path: the PNG to write.
        ends: the last position of each bucket [buckets], tokens; the points stand there.
        losses: `model`, and perhaps `teacher` -> mean loss of each bucket, nats/token.
        errors: the same -> standard errors, where they are known.
    """
    figure, axes = _figure(
        "Held-out loss by position", "position in the row, up to (tokens)", "loss (nats/token)"
    )
    for name, values in losses.items():
        spread = [error or 0.0 for error in errors[name]]
        axes.errorbar(ends, values, yerr=spread, label=name, linewidth=1.8, capsize=3, **STYLES[name])
    _doubling(axes, ends)
    axes.legend(framealpha=0.9)
    return _save(figure, path)


def recall_by_pairs(
    path: str | Path, *, pairs: Sequence[int], shares: Mapping[str, Mapping[int, Sequence[float | None]]]
) -> Path:
    """Draws the share of right values against the pairs of a row, one curve for each row length.

    Args:
        path: the PNG to write.
        pairs: of a row, ascending [counts].
        shares: `model`, and perhaps `teacher` -> row length in tokens -> share of right values [counts]; None
            where rows have no room for so many pairs. Each model gets a panel.
    """
    size = {"columns": len(shares), "width": 2 + 5.0 * len(shares)}
    figure, found = _figure("", "pairs of a row", "right values (share)", **size)
    for panel, (name, curves) in zip([found] if len(shares) == 1 else found, shares.items(), strict=True):
        for index, (row_length, values) in enumerate(curves.items()):
            points = [(count, share) for count, share in zip(pairs, values, strict=True) if share is not None]
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
            marker = MARKERS[index % len(MARKERS)]
            panel.plot(*zip(*points, strict=True), label=f"{row_length:,} tokens", marker=marker, **style)
        panel.set(title=f"Multi-query associative recall: {name}")
        panel.set_ylim(-0.03, 1.03)
        _doubling(panel, pairs)
        panel.legend(title="row length", framealpha=0.9)
    return _save(figure, path)


def gain_by_length(path: str | Path, *, gains: Mapping[str, Sequence[Mapping[str, float]]]) -> Path:
    """Draws what copying gains against the length of the row.

    Args:
        path: the PNG to write.
        gains: `model`, and perhaps `teacher` -> for each row length `row_length` (tokens), `mean`
            (nats/token) and its standard `error` or None.
    """
    figure, axes = _figure("Copying by row length", "row length (tokens)", "copy gain (nats/token)")
    for name, cells in gains.items():
        lengths, means = ([cell[key] for cell in cells] for key in ("row_length", "mean"))
        spread = [cell["error"] or 0.0 for cell in cells]
        axes.errorbar(lengths, means, yerr=spread, label=name, linewidth=1.8, capsize=3, **STYLES[name])
    if "teacher" in gains:
        level = 0.9 * gains["teacher"][0]["mean"]
        told = f"90 % of the teacher's gain at {gains['teacher'][0]['row_length']:,} tokens"
        axes.axhline(level, color=TEACHER_COLOUR, linewidth=1, linestyle="--", label=told)
    axes.axhline(0, color="black", linewidth=0.8)
    _doubling(axes, lengths)
    axes.legend(framealpha=0.9)
    return _save(figure, path)


def _doubling(axes, values: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), [f"{value:,}" for value in values], rotation=30 if len(values) > 8 else 0)
    axes.set_xticks([], minor=True)


def recall_of_models(path: str | Path, *, models: Mapping[str, Recall], trained: int) -> Path:
    """Draws recall over the number of pairs, a panel for each row length and a line for each model: the mean
    over seeds, and between the lowest and the highest a band.

    Args:
        path: the PNG to write.
        models: name -> (row length, pairs) -> a share for each seed, in [0, 1].
        trained: largest number of pairs that training has shown.
    """
    lengths = sorted({length for found in models.values() for length, _ in found})
    size = {"columns": len(lengths), "width": 1.5 + 4.0 * len(lengths)}
    figure, panels = _figure("", "pairs in the row", "right values (share)", **size)
    for axes, length in zip([panels] if len(lengths) == 1 else panels, lengths, strict=True):
        for (name, found), colour in zip(models.items(), COLOURS, strict=False):
            points = sorted((pairs, shares) for (tokens, pairs), shares in found.items() if tokens == length)
            pairs = [pairs for pairs, _ in points]
            means = [sum(shares) / len(shares) for _, shares in points]
            axes.plot(pairs, means, color=colour, marker="o", label=name)
            lowest, highest = ([pick(shares) for _, shares in points] for pick in (min, max))
            axes.fill_between(pairs, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        axes.axvline(trained, color=TEACHER_COLOUR, linestyle=":", label=f"trained to {trained} pairs")
        axes.set(title=f"rows of {length:,} tokens", ylim=(-0.03, 1.03))
        _doubling(axes, sorted({pairs for found in models.values() for _, pairs in found}))
        axes.legend(loc="lower left", frameon=False)
    return _save(figure, path)
