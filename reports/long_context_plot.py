"""The pictures of the evaluation suite `long_context`, beside its maps. Plain numbers in, one PNG out, as in
`reports.plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from reports.plots import COLOURS, DASHES, TEACHER_COLOUR, _figure, _save

MARKERS = ("o", "^", "D", "v", "P", "X")


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
    styles = {
        "model": {"color": COLOURS[0], "marker": "o"},
        "teacher": {"color": TEACHER_COLOUR, "marker": "s", "linestyle": ":"},
    }
    for name, values in losses.items():
        spread = [error or 0.0 for error in errors[name]]
        axes.errorbar(ends, values, yerr=spread, label=name, linewidth=1.8, capsize=3, **styles[name])
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


def _doubling(axes, values: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), [f"{value:,}" for value in values], rotation=30 if len(values) > 8 else 0)
    axes.set_xticks([], minor=True)
