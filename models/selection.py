"""Chooses the layers that keep attention: `CRITERIA` says by what."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from models.layer_scores import CRITERIA, Candidates, Criterion, ScoringRows


@dataclass(frozen=True, kw_only=True)
class SelectLayers:
    """A stage without training: scores every layer, and gives the best ones their attention back.

    Args:
        name: of the stage.
        keep: how many layers keep attention.
        by: a name of `CRITERIA` (models/layer_scores.py).
        rows: training rows of each kind and source that are scored on; held-out text has no part in it.
        task: what `recall` asks for (data/retrieval.py); other criteria need none.
        data: overrides of `data` for this stage.

    Raises:
        ValueError: for an unknown criterion, a count below 1, or a missing task.
    """

    name: str
    keep: int = 1
    by: str = "kl"
    rows: int = 32
    task: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.by not in CRITERIA:
            raise ValueError(
                f"stage.{self.name}.by={self.by!r} is unknown; choose one of {', '.join(CRITERIA)}."
            )
        for key in ("keep", "rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"stage.{self.name}.{key}={getattr(self, key)} must be at least 1.")
        if "retrieval" in self.criterion.reads and self.task is None:
            raise ValueError(
                f"stage.{self.name}.task says what by={self.by} asks for; choose layer_plan={self.by}, which "
                "has one."
            )

    @property
    def criterion(self) -> Criterion:
        """The function that scores layers, what it reads, and what its numbers are."""
        return CRITERIA[self.by]

    def tokens_read(self, row_length: int, candidates: int) -> int:
        """Tokens that scoring reads of one source of text, those read again included.

        Args:
            row_length: tokens.
            candidates: layers that are scored.
        """
        passes = candidates + 1 if self.criterion.each_layer else 1
        return len(self.criterion.reads) * self.rows * row_length * passes

    def check_candidates(self, count: int) -> None:
        """Refuses to keep more layers than are replaced.

        Raises:
            ValueError: naming the key.
        """
        if count < self.keep:
            raise ValueError(f"stage.{self.name}.keep={self.keep} is more than the {count} replaced layers.")

    def check_row_length(self, row_length: int) -> None:
        """Refuses rows that are too short for the task.

        Raises:
            ValueError: naming the key.
        """
        if "retrieval" in self.criterion.reads:
            self.task.check_row_length(row_length, f"stage.{self.name}.data.row_length")

    def scores(
        self, student: PreTrainedModel, teacher: PreTrainedModel, layers: list[int], rows: ScoringRows
    ) -> dict[int, float]:
        """Score of each layer: the larger, the more its attention is worth. Both models are as before
        afterwards.

        Args:
            student: has mixers in `layers`.
            teacher: has the attention.
            layers: candidates.
            rows: the kinds that the criterion reads.

        Raises:
            ValueError: where a score is not a number.
        """
        found = self.criterion.scores(Candidates(student, teacher, layers, self.keep), rows)
        wrong = [index for index, score in found.items() if math.isnan(score)]
        if wrong:
            raise ValueError(
                f"stage.{self.name}: the scores of layers {wrong} are not numbers, so the student has "
                "diverged; lower the learning rate of the stage before."
            )
        return found

    def choose(self, scores: dict[int, float]) -> list[int]:
        """The `keep` best layers, in order; of equal ones the first.

        Raises:
            ValueError: where there are fewer candidates.
        """
        self.check_candidates(len(scores))
        return sorted(sorted(scores, key=lambda index: -scores[index])[: self.keep])
