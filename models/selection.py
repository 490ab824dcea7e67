"""Chooses the layers that keep attention, by restoring one layer at a time in a student that keeps none."""

import logging
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from models.architectures import replace_attention
from models.conversion import restore_attention
from models.evaluation import copy_gain, evaluate

log = logging.getLogger(__name__)
CRITERIA = ("kl", "copy")


@dataclass(frozen=True, kw_only=True)
class SelectLayers:
    """A stage without training: scores every layer, and gives the best ones their attention back.

    A layer's score is how much better the student gets when that one layer has the teacher's attention again.

    Args:
        name: of the stage.
        keep: how many layers keep attention.
        by: `kl` (drop of KL(teacher || student), on plain rows and repeated passages alike) or `copy` (rise
            of the copying gain).
        rows: training rows of each kind that are scored on; held-out text has no part in it.

    Raises:
        ValueError: for an unknown criterion or a count below 1.
    """

    name: str
    keep: int = 1
    by: str = "kl"
    rows: int = 32

    def __post_init__(self) -> None:
        if self.by not in CRITERIA:
            raise ValueError(
                f"stage.{self.name}.by={self.by!r} is unknown; choose one of {', '.join(CRITERIA)}."
            )
        for key in ("keep", "rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"stage.{self.name}.{key}={getattr(self, key)} must be at least 1.")

    def scores(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: list[int],
        batches: list[dict[str, Tensor]],
        copy_batches: list[dict[str, Tensor]],
    ) -> dict[int, float]:
        """Score of each layer in nats/token; the student is as before afterwards.

        Args:
            student: has mixers in `layers`.
            teacher: lends its attention.
            layers: candidates.
            batches, copy_batches: plain rows, and rows that show a passage twice.
        """
        measure = {"kl": self._kl, "copy": self._copying_loss}[self.by]
        baseline = measure(student, teacher, batches, copy_batches)
        found = {}
        for index in layers:
            before = restore_attention(student, teacher, [index], trainable=False)
            found[index] = baseline - measure(student, teacher, batches, copy_batches)
            replace_attention(student, before)
            log.info(
                "Layer %d with its attention back: %s better by %.4f nats/token", index, self.by, found[index]
            )
        return found

    def check_candidates(self, count: int) -> None:
        """Refuses to keep more layers than are replaced.

        Raises:
            ValueError: naming the key.
        """
        if count < self.keep:
            raise ValueError(f"stage.{self.name}.keep={self.keep} is more than the {count} replaced layers.")

    def choose(self, scores: dict[int, float]) -> list[int]:
        """The `keep` best layers, in order.

        Raises:
            ValueError: where there are fewer candidates.
        """
        self.check_candidates(len(scores))
        return sorted(sorted(scores, key=lambda index: -scores[index])[: self.keep])

    @staticmethod
    def _kl(student: PreTrainedModel, teacher: PreTrainedModel, batches: list, copy_batches: list) -> float:
        kinds = [evaluate(student, teacher, kind).means()["kl"] for kind in (batches, copy_batches)]
        return sum(kinds) / len(kinds)

    @staticmethod
    def _copying_loss(
        student: PreTrainedModel, teacher: PreTrainedModel, batches: list, copy_batches: list
    ) -> float:
        return -copy_gain(evaluate(student, None, copy_batches))["gain"]
