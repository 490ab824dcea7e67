"""The parts of the evaluation suite `long_context`: maps of needles, loss by position, associative recall.

Each part measures a model and perhaps its teacher on the same rows, and draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from conf.launch import build
from data.mqar import HELD_OUT, Load, Mqar, MqarRows
from data.row_module import VALIDATION_SEED, in_batches
from models.retrieval import Answered, answered_share, cached_losses, generated_answers
from pipeline.evaluation import Subject
from reports.eval_report import Figure, Picture
from reports.long_context_plot import loss_by_bucket, recall_by_pairs
from reports.retrieval_plot import retrieval_maps

Models = Mapping[str, PreTrainedModel]  # `model`, and perhaps `teacher`
FIRST_BUCKET = 128  # tokens; each further one is as long as all before it


class Place(NamedTuple):
    """Where a part measures: the models, the data module's config, and the folder of the evaluation."""

    subject: Subject
    models: Models
    data: Mapping[str, Any]
    prefill_chunk: int
    folder: Path

    def answers(self, batches: list) -> dict[str, list[Answered]]:
        """What each model writes."""
        chunk = self.prefill_chunk
        return {name: generated_answers(model, batches, chunk) for name, model in self.models.items()}


@dataclass
class Found:
    """What a part has found out, as in `Findings`."""

    figures: list[Figure] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, other: "Found") -> None:
        """Takes over what another part has found out."""
        self.figures += other.figures
        self.pictures += other.pictures
        self.details |= other.details


class Mean(NamedTuple):
    """A mean over rows, its standard error (None for a single row), and the number of rows."""

    mean: float
    error: float | None
    rows: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of independent values, and its standard error from their spread."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Mean(mean, None, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, math.sqrt(variance / count), count)


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


@dataclass(frozen=True, kw_only=True)
class LossByPosition:
    """Loss on long rows of held-out text, by buckets of the position: up to 128 tokens, to 256, to 512, ...

    Documents that are shorter than a row are joined, and the text runs on from one to the next. Rows are read
    through the decoding cache.

    Args:
        row_length: tokens.
        rows: of each source.

    Raises:
        ValueError: for a count below 1.
    """

    row_length: int
    rows: int
    key = "suite.positions"

    def __post_init__(self) -> None:
        check_least(self, "row_length", "rows")

    def check_subject(self, subject: Subject) -> None:
        """Any tokenizer will do."""

    def run(self, place: Place) -> Found:
        """Measures row by row, so that the spread between rows is known."""
        changes = {"row_length": self.row_length, "rows_per_device": 1, "cross_documents": True}
        data = build({**place.data, **changes}, "data", tokenizer=place.subject.tokenizer)
        ends, batches = bucket_ends(self.row_length), data.validation_batches(self.rows)
        losses = {
            who: [in_buckets(row.losses, ends) for row in cached_losses(model, batches, place.prefill_chunk)]
            for who, model in place.models.items()
        }
        means = {who: [mean_of(bucket) for bucket in zip(*rows, strict=True)] for who, rows in losses.items()}
        return self._told(place, ends, losses, means)

    def _told(self, place: Place, ends: list[int], losses: Mapping, means: Mapping) -> Found:
        count, starts = len(losses["model"]), [0, *ends[:-1]]
        figures = [
            figure_of(
                f"loss_to_{end}",
                f"loss, tokens {start + 1:,} to {end:,} ({count} rows)",
                {who: [row[index] for row in rows] for who, rows in losses.items()},
                ".4f",
            )
            for index, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        picture = Picture(
            file="plots/loss_by_position.png",
            heading="Held-out loss by position in long rows",
            note=f"Means over {count} rows of {self.row_length:,} tokens with their standard errors. A curve "
            "that stops falling, or rises, tells how much context the model uses.",
        )
        loss_by_bucket(
            place.folder / picture.file,
            ends=ends,
            losses={who: [bucket.mean for bucket in found] for who, found in means.items()},
            errors={who: [bucket.error for bucket in found] for who, found in means.items()},
        )
        details = {
            who: [{"to": end, **bucket._asdict()} for end, bucket in zip(ends, found, strict=True)]
            for who, found in means.items()
        }
        return Found(figures, [picture], {"loss_by_position": details})


@dataclass(frozen=True, kw_only=True)
class RecallCurves:
    """Multi-query associative recall over row lengths and numbers of pairs.

    Args:
        task: what the rows are like (data/mqar.py); ids are those of the model's tokenizer.
        row_lengths: tokens, ascending.
        pairs: of a row, ascending; combinations without room are left out.
        rows: of each combination.
        rows_per_batch: that are answered at once.

    Raises:
        ValueError: for an empty list, a count below 1, or where nothing has room.
    """

    task: Mqar
    row_lengths: Sequence[int]
    pairs: Sequence[int]
    rows: int
    rows_per_batch: int
    key = "suite.mqar"

    def __post_init__(self) -> None:
        check_lists(self, "row_lengths", "pairs")
        check_least(self, "rows", "rows_per_batch")
        for length in self.row_lengths:
            self.task.check(length, self.pairs[0], f"{self.key}.pairs")

    def check_subject(self, subject: Subject) -> None:
        """Refuses a tokenizer without enough keys and values for the fewest pairs.

        Raises:
            ValueError: naming the key.
        """
        self.task.check(self.row_lengths[0], self.pairs[0], f"{self.key}.pairs", len(subject.tokenizer))

    def run(self, place: Place) -> Found:
        """Measures each combination, and draws one curve for each row length."""
        vocabulary_size = len(place.subject.tokenizer)
        combinations = [
            (length, pairs)
            for length in self.row_lengths
            for pairs in self.pairs
            if pairs <= min(self.task.most_pairs(length), self.task.key_count(vocabulary_size))
        ]
        figures, cells = [], {who: {} for who in place.models}
        for length, pairs in combinations:
            load = Load(0.0, {length: pairs})
            rows = MqarRows(self.task, vocabulary_size, load, length, VALIDATION_SEED, HELD_OUT)
            batches = in_batches([rows.row(index) for index in range(self.rows)], self.rows_per_batch)
            shares = {
                who: [answered_share([row]) for row in answered]
                for who, answered in place.answers(batches).items()
            }
            for who, values in shares.items():
                cells[who][length, pairs] = mean_of(values)
            label = f"mqar, {length:,} tokens, {pairs:,} pairs ({self.rows} rows)"
            figures.append(figure_of(f"mqar_{length}_{pairs}", label, shares, ".1%"))
        return self._told(place, figures, cells)

    def _told(self, place: Place, figures: list[Figure], cells: Mapping) -> Found:
        picture = Picture(
            file="plots/mqar.png",
            heading="Multi-query associative recall",
            note=f"The share of right values, over {self.rows} rows for each point. A model that was trained "
            "on such rows is asked beyond its trained load to the right, and beyond its trained length on "
            "the curves of longer rows.",
        )
        curves = {
            who: {
                length: [
                    found[length, pairs].mean if (length, pairs) in found else None for pairs in self.pairs
                ]
                for length in self.row_lengths
            }
            for who, found in cells.items()
        }
        recall_by_pairs(place.folder / picture.file, pairs=self.pairs, shares=curves)
        details = {
            who: [{"row_length": cell[0], "pairs": cell[1], **mean._asdict()} for cell, mean in found.items()]
            for who, found in cells.items()
        }
        return Found(figures, [picture], {"mqar": details})


def figure_of(name: str, label: str, rows: Mapping[str, Sequence[float]], pattern: str) -> Figure:
    """A figure from one value per row of the model, and of the teacher where there is one."""
    means: Mapping[str, Mean] = {who: mean_of(values) for who, values in rows.items()}
    teacher = means.get("teacher", Mean(None, None, 0))
    return Figure(
        name=name,
        label=label,
        value=means["model"].mean,
        teacher=teacher.mean,
        pattern=pattern,
        error=means["model"].error,
        teacher_error=teacher.error,
    )


def bucket_ends(row_length: int) -> list[int]:
    """The last positions of the buckets, counted from 1: 128, 256, 512, ... and the row's end."""
    ends = [min(FIRST_BUCKET, row_length)]
    while ends[-1] < row_length:
        ends.append(min(2 * ends[-1], row_length))
    return ends


def in_buckets(losses: Tensor, ends: Sequence[int]) -> list[float]:
    """[T] losses by position, NaN where there is no label -> the mean in each bucket, NaN where there is
    none."""
    starts = [0, *ends[:-1]]
    return [float(losses[start:end].nanmean()) for start, end in zip(starts, ends, strict=True)]


def check_lists(part: Any, *names: str) -> None:
    """Refuses empty lists of a part, and lists of numbers that do not ascend.

    Raises:
        ValueError: naming the key.
    """
    for name in names:
        values = getattr(part, name)
        if not values:
            raise ValueError(f"{part.key}.{name} is empty; name at least one.")
        if not isinstance(values, Mapping) and list(values) != sorted(set(values)):
            raise ValueError(f"{part.key}.{name}={list(values)} must ascend.")


def check_least(part: Any, *names: str) -> None:
    """Refuses counts below 1.

    Raises:
        ValueError: naming the key.
    """
    for name in names:
        if getattr(part, name) < 1:
            raise ValueError(f"{part.key}.{name}={getattr(part, name)} must be at least 1.")
