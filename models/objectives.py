"""What a stage minimises. An objective maps (student, teacher, batch) to `LossTerms`.

Shape letters: B rows, T tokens, n tokens with a label, D hidden width, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.align import aligned_layers
from models.backbone import hidden_states
from models.losses import ALIGNMENT_LOSSES, IGNORED, chunked_mean, cross_entropy, forward_kl, mean_count
from models.parallelize import kept_whole


@dataclass
class LossTerms:
    """What an objective returns: the scalar to minimise, its named parts, and a value per layer where there
    is one."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    per_layer: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Next-token cross-entropy; needs no teacher.

    Args:
        chunk_tokens: tokens whose logits exist at one time.
    """

    needs_teacher = False
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        _check_chunk(self.chunk_tokens)

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: dict[str, Tensor]
    ) -> LossTerms:
        """Parts: `loss`, nats per token."""
        chosen = batch["labels"] != IGNORED
        hidden = hidden_states(student, batch["input_ids"], batch["document_ids"])[chosen]
        labels = batch["labels"][chosen]
        head = student.get_output_embeddings()
        parameters = list(head.parameters())

        def token_loss(logits: Tensor, chunk: slice) -> Tensor:
            return cross_entropy(logits, labels[chunk])

        with kept_whole(head):
            loss = chunked_mean(hidden, head, parameters, token_loss, self.chunk_tokens)
        return LossTerms(loss, {"loss": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class Distill:
    """KL(teacher || student) on the next-token distributions, optionally mixed with cross-entropy.

    Args:
        temperature: softens both distributions; the loss is scaled by its square.
        cross_entropy_weight: share of cross-entropy in the total, in [0, 1].
        chunk_tokens: tokens whose logits exist at one time.
    """

    needs_teacher = True
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        _check_chunk(self.chunk_tokens)
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature={self.temperature} must be positive.")
        if not 0 <= self.cross_entropy_weight <= 1:
            raise ValueError(
                f"objective.cross_entropy_weight={self.cross_entropy_weight} must lie in [0, 1]."
            )

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]
    ) -> LossTerms:
        """Parts: `kl` and `loss` (cross-entropy), nats per token."""
        chosen = batch["labels"] != IGNORED
        labels = batch["labels"][chosen]
        with torch.no_grad():
            target = hidden_states(teacher, batch["input_ids"], batch["document_ids"])[chosen]
        hidden = hidden_states(student, batch["input_ids"], batch["document_ids"])[chosen]
        teacher_head, head = teacher.get_output_embeddings(), student.get_output_embeddings()
        sums = {"kl": hidden.new_zeros(()), "loss": hidden.new_zeros(())}

        def token_loss(logits: Tensor, chunk: slice) -> Tensor:
            with torch.no_grad():
                teacher_logits = teacher_head(target[chunk])
            kl = forward_kl(logits, teacher_logits, self.temperature)
            entropy = cross_entropy(logits, labels[chunk])
            sums["kl"] += kl.detach().sum()
            sums["loss"] += entropy.detach().sum()
            return (1 - self.cross_entropy_weight) * kl + self.cross_entropy_weight * entropy

        parameters = list(head.parameters())
        with kept_whole(head, teacher_head):
            total = chunked_mean(hidden, head, parameters, token_loss, self.chunk_tokens)
        count = mean_count(len(labels), labels.device)
        return LossTerms(total, {name: value / count for name, value in sums.items()})


@dataclass(frozen=True, kw_only=True)
class Align:
    """Each replaced layer imitates its attention layer, reading the teacher's own hidden states.

    Args:
        loss: `l2`, `mse` or `relative` (models/losses.py).
    """

    needs_teacher = True
    loss: str = "l2"

    def __post_init__(self) -> None:
        if self.loss not in ALIGNMENT_LOSSES:
            raise ValueError(
                f"objective.loss={self.loss!r} is unknown; choose one of {', '.join(ALIGNMENT_LOSSES)}."
            )

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]
    ) -> LossTerms:
        """Per layer: the alignment loss, averaged over the tokens of documents; the total is their mean."""
        losses, total = aligned_layers(student, teacher, batch, ALIGNMENT_LOSSES[self.loss])
        return LossTerms(total, {"alignment": total.detach()}, losses)


def _check_chunk(tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"objective.chunk_tokens={tokens} must be at least 1.")
