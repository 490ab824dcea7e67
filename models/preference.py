"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290): of two answers, the better one.

Shape letters: B rows (an even number, chosen and rejected in turn), T tokens, n answer tokens of the batch,
D hidden width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from models.backbone import hidden_states, output_head
from models.losses import IGNORED, chunked_mean, cross_entropy, mean_count, token_chunks
from models.objectives import LossTerms
from models.parallelize import kept_whole


@dataclass(frozen=True, kw_only=True)
class DirectPreference:
    """-log σ(β [(log π/π_ref)(chosen) - (log π/π_ref)(rejected)]), π_ref the student as the stage found it.

    Args:
        beta: how dearly a departure from the reference is paid; larger stays nearer.
        label_smoothing: the assumed share of pairs that are the wrong way round, in [0, 0.5).
        length_normalise: divide an answer's log-probability by its tokens, so that long answers gain nothing
            by their length.
        chunk_tokens: tokens whose logits exist at one time.

    Raises:
        ValueError: for a value out of range, naming its key.
    """

    needs_teacher = False
    needs_reference = True
    rows_together = 2
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalise: bool = False
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"objective.beta={self.beta} must be positive.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"objective.label_smoothing={self.label_smoothing} must lie in [0, 0.5).")
        if self.chunk_tokens < 1:
            raise ValueError(f"objective.chunk_tokens={self.chunk_tokens} must be at least 1.")

    def __call__(
        self, student: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, Tensor]
    ) -> LossTerms:
        """Parts, means over pairs: `loss`; `reward_margin` and its two terms `chosen_reward` and
        `rejected_reward`, β log π/π_ref; `accuracy`, the share of pairs with a positive margin; and
        `chosen_log_probability` and `rejected_log_probability` of the student."""
        chosen = batch["labels"] != IGNORED
        labels, rows = batch["labels"][chosen], chosen.nonzero()[:, 0]
        with torch.no_grad():
            target = hidden_states(reference, batch["input_ids"], batch["document_ids"])[chosen]
            before = self._answers(reference, target, labels, rows, len(chosen))
        hidden = hidden_states(student, batch["input_ids"], batch["document_ids"])[chosen]
        now = self._answers(student, hidden.detach(), labels, rows, len(chosen))
        if not torch.is_grad_enabled():
            return LossTerms(*self.loss(now, before))
        loss, parts = self.loss(now.requires_grad_(), before)
        (slope,) = torch.autograd.grad(loss, now)
        total = self._with_gradient(loss.detach(), slope, student, hidden, labels, rows)
        return LossTerms(total, parts)

    def loss(self, now: Tensor, before: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts from log-probabilities of answers.

        Args:
            now, before: [B] of the student and the reference, chosen and rejected in turn.
        """
        rewards = self.beta * (now - before)
        margins = rewards[0::2] - rewards[1::2]
        right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
        loss = -((1 - self.label_smoothing) * right + self.label_smoothing * wrong).mean()
        parts = {
            "loss": loss,
            "reward_margin": margins.mean(),
            "accuracy": (margins > 0).float().mean(),
            "chosen_reward": rewards[0::2].mean(),
            "rejected_reward": rewards[1::2].mean(),
            "chosen_log_probability": now[0::2].mean(),
            "rejected_log_probability": now[1::2].mean(),
        }
        return loss, {name: value.detach() for name, value in parts.items()}

    def _answers(
        self, model: PreTrainedModel, hidden: Tensor, labels: Tensor, rows: Tensor, count: int
    ) -> Tensor:
        """Log-probability of each row's answer: [n,D], [n], [n] -> [B], without a graph."""
        head = output_head(model)
        tokens = torch.zeros(len(labels), device=labels.device)
        with torch.no_grad(), kept_whole(head):
            for chunk in token_chunks(hidden, self.chunk_tokens):
                tokens[chunk] = -cross_entropy(head(hidden[chunk]), labels[chunk]).to(tokens.dtype)
        answers = torch.zeros(count, device=labels.device).index_add_(0, rows, tokens)
        return answers / self._lengths(rows, count)

    def _with_gradient(
        self,
        loss: Tensor,
        slope: Tensor,
        student: PreTrainedModel,
        hidden: Tensor,
        labels: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """The loss as a scalar whose gradient is that of Σ slope · log-probability, chunk by chunk.

        The loss is no sum over tokens; its derivative with respect to the answers' log-probabilities makes it
        one to first order, which is all that a gradient needs.
        """
        head = output_head(student)
        scale = mean_count(len(labels), labels.device)  # chunked_mean divides by it
        weights = (slope / self._lengths(rows, len(slope)))[rows] * -scale

        def token_loss(logits: Tensor, chunk: slice) -> Tensor:
            return weights[chunk] * cross_entropy(logits, labels[chunk])

        with kept_whole(head):
            change = chunked_mean(hidden, head, list(head.parameters()), token_loss, self.chunk_tokens)
        return loss + (change - change.detach())

    def _lengths(self, rows: Tensor, count: int) -> Tensor:
        """[B] what an answer's log-probability is divided by."""
        if not self.length_normalise:
            return torch.ones(count, device=rows.device)
        return torch.bincount(rows, minlength=count).clamp_min(1).float()
