"""What the parts of the evaluation suite `long_context` share.

Each part measures a model and perhaps its teacher on the same rows, and draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from models.retrieval import Answered, generated_answers
from pipeline.evaluation import Subject
from reports.eval_report import Figure, Picture

Models = Mapping[str, PreTrainedModel]  # `model`, and perhaps `teacher`


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
