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

# What names a cell of a part, such as (row length, pairs) -> a value for each seed.
Seeds = dict[tuple[int, ...], list[float]]


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


def recall_of_models(path: str | Path, *, models: Mapping[str, Seeds], trained: int) -> Path:
    """Draws recall over the number of pairs, a panel for each row length and a line for each model: the mean
    over seeds, and thin lines for the seeds.

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
            _with_seeds(
                axes, name, {pairs: of for (tokens, pairs), of in found.items() if tokens == length}, colour
            )
        axes.axvline(trained, color=TEACHER_COLOUR, linestyle=":", label=f"trained to {trained} pairs")
        axes.set(title=f"rows of {length:,} tokens", ylim=(-0.03, 1.03))
        _doubling(axes, sorted({pairs for found in models.values() for _, pairs in found}))
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=10)
    return _save(figure, path)


def gains_of_models(path: str | Path, *, models: Mapping[str, Seeds], trained: int) -> Path:
    """Draws what copying gains over the row length, a line for each model as in `recall_of_models`.

    Args:
        path: the PNG to write.
        models: name -> (row length,) -> a gain for each seed, nats/token; one may be `teacher`.
        trained: row length that training has shown, tokens.
    """
    figure, axes = _figure("Copying by row length", "row length (tokens)", "copy gain (nats/token)")
    students = {name: found for name, found in models.items() if name != "teacher"}
    for (name, found), colour in zip(students.items(), COLOURS, strict=False):
        _with_seeds(axes, name, {length: gains for (length,), gains in found.items()}, colour)
    if "teacher" in models:
        gains = sorted((length, sum(of) / len(of)) for (length,), of in models["teacher"].items())
        axes.plot(*zip(*gains, strict=True), label="teacher", linewidth=1.8, **STYLES["teacher"])
        told = f"90 % of the teacher's gain at {gains[0][0]:,} tokens"
        axes.axhline(0.9 * gains[0][1], color=TEACHER_COLOUR, linewidth=1, linestyle="--", label=told)
    axes.axvline(trained, color=TEACHER_COLOUR, linestyle=":", label=f"trained on {trained:,} tokens")
    axes.axhline(0, color="black", linewidth=0.8)
    _doubling(axes, sorted({length for found in models.values() for (length,) in found}))
    axes.legend(framealpha=0.9)
    return _save(figure, path)


def _with_seeds(axes, name: str, found: Mapping[int, Sequence[float]], colour: str) -> None:
    """A line of means over seeds, and a thin one for each seed."""
    places = sorted(found)
    for values in zip(*(found[place] for place in places), strict=True):
        axes.plot(places, values, color=colour, linewidth=0.9, alpha=0.5)
    means = [sum(found[place]) / len(found[place]) for place in places]
    axes.plot(places, means, color=colour, marker="o", linewidth=2, label=name)
