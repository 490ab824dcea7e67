"""The part `needles` of the evaluation suite `long_context`: right answers by row length and depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.launch import build
from models.retrieval import Answered
from pipeline.evaluation import Subject
from pipeline.long_context_parts import Found, Place, check_least, check_lists, figure_of, mean_of
from reports.eval_report import Picture
from reports.retrieval_plot import retrieval_maps


@dataclass(frozen=True, kw_only=True)
class NeedleMaps:
    """Answers by row length and depth, both exact to the token, for one task after the other.

    Args:
        tasks: name -> config of a task of data/retrieval.py.
        names: of the tasks that are measured.
        row_lengths: tokens, ascending.
        depths: of the answer in the row, in [0, 1], ascending.
        rows: of each task, row length, depth and source.

    Raises:
        ValueError: for an empty list, an unknown name, a count below 1, or rows that are too short for a
            task.
    """

    tasks: Mapping[str, Any]
    names: Sequence[str]
    row_lengths: Sequence[int]
    depths: Sequence[float]
    rows: int
    key = "suite.needles"

    def __post_init__(self) -> None:
        check_lists(self, "row_lengths", "depths")
        check_least(self, "rows")
        unknown = [name for name in self.names if name not in self.tasks]
        if unknown or not self.names:
            said = f"{unknown[0]!r} is unknown" if unknown else "is empty"
            raise ValueError(f"{self.key}.names: {said}; choose from {', '.join(self.tasks)}.")
        for name in self.names:
            for length in self.row_lengths:
                self.task(name, self.depths[0]).check_row_length(length, f"{self.key}.row_lengths")
            for depth in self.depths:
                self.task(name, depth)

    def task(self, name: str, depth: float) -> Any:
        """The task of that name with its answers at a depth."""
        return replace(build(self.tasks[name], f"{self.key}.tasks.{name}"), depth=depth)

    def check_subject(self, subject: Subject) -> None:
        """Any tokenizer will do."""

    def run(self, place: Place) -> Found:
        """Measures each cell of the maps, and draws one map for each task and model."""
        found = Found()
        data = build(place.data, "data", tokenizer=place.subject.tokenizer)
        for name in self.names:
            cells = {
                (length, depth): self._cell(place, data, name, length, depth)
                for length in self.row_lengths
                for depth in self.depths
            }
            found.add(self._told(place, name, cells))
        return found

    def _cell(
        self, place: Place, data: Any, name: str, length: int, depth: float
    ) -> dict[str, list[Answered]]:
        task = self.task(name, depth)
        return place.answers(data.retrieval_batches(task, self.rows, held_out=True, row_length=length))

    def _told(self, place: Place, name: str, cells: Mapping) -> Found:
        """A figure for each row length, the map, and the cells in full."""
        shares = {
            who: {cell: mean_of([float(row.exact) for row in rows[who]]) for cell, rows in cells.items()}
            for who in place.models
        }
        figures = []
        for length in self.row_lengths:
            rows = {
                who: [float(r.exact) for depth in self.depths for r in cells[length, depth][who]]
                for who in place.models
            }
            label = f"{name}, {length:,} tokens ({len(rows['model'])} rows)"
            figures.append(figure_of(f"{name}_{length}", label, rows, ".1%"))
        picture = Picture(
            file=f"plots/{name}.png",
            heading=f"{name}: right answers by row length and depth",
            note=f"{len(next(iter(cells.values()))['model'])} rows in each cell. Depth 0 is the beginning of "
            "the row, 100 % directly before the question.",
        )
        maps = {
            who: [[found[length, depth].mean for depth in self.depths] for length in self.row_lengths]
            for who, found in shares.items()
        }
        retrieval_maps(
            place.folder / picture.file,
            maps=maps,
            row_lengths=self.row_lengths,
            task=name,
            depths=self.depths,
        )
        details = {
            who: [
                {"row_length": length, "depth": depth, **cell._asdict()}
                for (length, depth), cell in found.items()
            ]
            for who, found in shares.items()
        }
        return Found(figures, [picture], {name: details})
