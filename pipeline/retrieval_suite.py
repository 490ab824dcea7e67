"""The evaluation suite `retrieval`: questions whose answer stands in the row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from conf.launch import build
from models.retrieval import exact_answers
from pipeline.evaluation import Subject
from reports.eval_report import Figure, Findings, Picture
from reports.retrieval_plot import retrieval_maps

EXPLANATION = (
    "Facts are hidden in held-out text, and the end of the row asks for one of them. Figures are the share "
    "of answers of which every token is right: each must be the most likely one after the right tokens "
    "before it, which is exactly what greedy decoding needs to write the answer. Difference is model - "
    "teacher, relative is model / teacher."
)


class Cell(NamedTuple):
    """The share of right answers of one task and row length, and by depth; None where no row has that
    depth."""

    task: str
    row_length: int
    accuracy: float
    by_depth: list[float | None]


@dataclass(frozen=True, kw_only=True)
class RetrievalSuite:
    """Exact answers by task, row length and depth.

    Args:
        data: config of the data module whose held-out documents are the haystack; the model's tokenizer is
            added.
        tasks: name -> config of a task of data/retrieval.py.
        row_lengths: tokens, ascending.
        rows: of each length, task and source.
        depths: equal parts of the row that are told apart.

    Raises:
        ValueError: for a count below 1, no task or no row length, and rows that are too short for a task.
    """

    data: Mapping[str, Any]
    tasks: Mapping[str, Any]
    row_lengths: Sequence[int]
    rows: int
    depths: int

    def __post_init__(self) -> None:
        for key in ("tasks", "row_lengths"):
            if not getattr(self, key):
                raise ValueError(f"suite.{key} is empty; name at least one.")
        for key in ("rows", "depths"):
            if getattr(self, key) < 1:
                raise ValueError(f"suite.{key}={getattr(self, key)} must be at least 1.")
        for name in self.tasks:
            for length in self.row_lengths:
                self.task(name).check_row_length(length, "suite.row_lengths")

    def task(self, name: str) -> Any:
        """The task of that name."""
        return build(self.tasks[name], f"suite.tasks.{name}")

    def run(self, model: Subject, teacher: Subject | None, folder: Path) -> Findings:
        """Measures, and draws into `<folder>/plots`."""
        data = build(self.data, "data", tokenizer=model.tokenizer)
        subjects = {"model": model, "teacher": teacher}
        cells = {name: self._cells(one.load(), data) for name, one in subjects.items() if one is not None}
        theirs = cells.get("teacher", [None] * len(cells["model"]))
        figures = [
            Figure(
                name=f"{cell.task}_{cell.row_length}",
                label=f"{cell.task}, {cell.row_length:,} tokens",
                value=cell.accuracy,
                teacher=None if other is None else other.accuracy,
                pattern=".1%",
            )
            for cell, other in zip(cells["model"], theirs, strict=True)
        ]
        return Findings(
            figures=figures,
            explanation=EXPLANATION,
            pictures=self._draw(folder, cells),
            details={"retrieval": {who: [cell._asdict() for cell in found] for who, found in cells.items()}},
        )

    def _cells(self, model: PreTrainedModel, data: Any) -> list[Cell]:
        """One cell per task and row length."""
        found = []
        for name in self.tasks:
            for length in self.row_lengths:
                batches = data.retrieval_batches(self.task(name), self.rows, held_out=True, row_length=length)
                exact = exact_answers(model, batches)
                depths = [depth for batch in batches for depth in batch["depths"].tolist()]
                parts: list[list[bool]] = [[] for _ in range(self.depths)]
                for right, depth in zip(exact, depths, strict=True):
                    parts[int(depth * self.depths)].append(right)
                by_depth = [sum(part) / len(part) if part else None for part in parts]
                found.append(Cell(name, length, sum(exact) / len(exact), by_depth))
        return found

    def _draw(self, folder: Path, cells: Mapping[str, Sequence[Cell]]) -> list[Picture]:
        """One picture per task: a map of each model."""
        pictures = []
        for name in self.tasks:
            picture = Picture(
                file=f"plots/{name}.png",
                heading=f"{name}: right answers by row length and depth",
                note="Depth 0 is the beginning of the row; the question stands at its end.",
            )
            maps = {
                who: [cell.by_depth for cell in found if cell.task == name] for who, found in cells.items()
            }
            retrieval_maps(folder / picture.file, maps=maps, row_lengths=self.row_lengths, task=name)
            pictures.append(picture)
        return pictures
