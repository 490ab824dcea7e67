"""Maps of right answers, of the evaluation suites `retrieval` and `long_context`. Plain numbers in, one PNG
out, as in `reports.plots`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from reports.plots import _figure, _save


def retrieval_maps(
    path: str | Path,
    *,
    maps: Mapping[str, Sequence[Sequence[float | None]]],
    row_lengths: Sequence[int],
    task: str,
    depths: Sequence[float] | None = None,
) -> Path:
    """Draws the share of right answers over row length and depth, one map for each model.

    Args:
        path: the PNG to write.
        maps: name -> share [lengths, depths], each in [0, 1]; None where no row was measured.
        row_lengths: tokens [lengths].
        task: for the title.
        depths: of the maps' cells, in [0, 1]; None where a cell is one of equal parts of the row.
    """
    size = {"columns": len(maps), "width": 2 + 4.0 * len(maps)}
    figure, found = _figure("", "row length (tokens)", "depth of the answer", **size)
    panels = [found] if len(maps) == 1 else list(found)
    for axes, (name, shares) in zip(panels, maps.items(), strict=True):
        values = np.array([[math.nan if cell is None else cell for cell in row] for row in shares]).T
        parts, lengths = values.shape
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="upper")
        axes.set(title=f"{task}: {name}")
        axes.set_xticks(range(lengths), [f"{length:,}" for length in row_lengths])
        places, shown = np.linspace(-0.5, parts - 0.5, 5), (0.0, 0.25, 0.5, 0.75, 1.0)
        if depths is not None:
            places, shown = range(parts), depths
        axes.set_yticks(places, [f"{100 * depth:.3g} %" for depth in shown])
        axes.grid(False)
        for (depth, length), value in np.ndenumerate(values) if values.size <= 121 else ():
            written = "–" if math.isnan(value) else f"{value:.0%}"
            colour = "black" if value > 0.6 else "white"
            axes.annotate(written, (length, depth), ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=panels, label="right answers (share)")
    return _save(figure, path)
