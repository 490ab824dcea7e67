"""What a stage minimises. An objective maps (student, teacher, batch) to `LossTerms`.

Tokens count by the `weights` [B,T] of a batch, where it brings some (models/token_weights.py).

Shape letters: B rows, T tokens, n tokens with a label, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import ranks
from models.align import aligned_layers
from models.backbone import hidden_states, output_head
from models.divergences import DIVERGENCES, bucketed_logs, shared_logs
from models.layer_plan import ATTENTION
from models.losses import ALIGNMENT_LOSSES, IGNORED, cross_entropy, mean_count
from models.segments import student_mean
from models.token_weights import check_repeat_weight, long_weights, token_weights

# (logits of some tokens, which ones) -> log-probabilities of student and teacher; heads that it needs.
Targets = tuple[Callable[[Tensor, slice | Tensor], tuple[Tensor, Tensor]], list[nn.Module]]
CACHED = ("teacher_ids", "teacher_logs", "teacher_tail")  # what a batch brings in the teacher's place
PART_NAMES = {"forward_kl": "kl"}


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
    takes_segments = True
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        _check_chunk(self.chunk_tokens)

    def __call__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batch: dict[str, Tensor],
        segment_length: int = 0,
    ) -> LossTerms:
        """Parts: `loss`, nats per token."""
        chosen = batch["labels"] != IGNORED
        labels, weights = batch["labels"][chosen], token_weights(batch, chosen, 1.0)
        summed = torch.zeros((), device=labels.device)

        def token_loss(logits: Tensor, which: slice | Tensor) -> Tensor:
            entropy = cross_entropy(logits, labels[which])
            summed.add_(entropy.detach().sum())
            return entropy if weights is None else entropy * weights[which]

        options = {"chunk_tokens": self.chunk_tokens, "segment_length": segment_length}
        total, index = student_mean(student, batch, chosen, token_loss, **options)
        return LossTerms(total, {"loss": summed / mean_count(len(labels), labels.device)} | index)


@dataclass(frozen=True, kw_only=True)
class LongCrossEntropy:
    """Cross-entropy in which a token counts the more, the better a long context predicts it (LongCE, arXiv
    2410.23771): by `long_weights`, scaled to mean 1 over the tokens of all processes.

    Args:
        gamma: largest weight before scaling, at least 1.
        short_context: K; what the short context is, K to 2 K tokens (models/short_loss.py).
        short_loss: folder of the stage cache_short_loss, which holds each token's loss after a short context.
        chunk_tokens: tokens whose logits exist at one time.
    """

    needs_teacher = False
    takes_segments = True
    short_loss: str
    gamma: float = 5.0
    short_context: int = 4096
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        _check_chunk(self.chunk_tokens)
        if not self.gamma >= 1:
            raise ValueError(f"objective.gamma={self.gamma} must be at least 1, the weight of most tokens.")
        if self.short_context < 1:
            raise ValueError(f"objective.short_context={self.short_context} must be at least 1 token.")
        if not self.short_loss:
            raise ValueError(
                "objective.short_loss must name the folder that the stage cache_short_loss writes; plain "
                "cross-entropy is objective=cross_entropy."
            )

    def __call__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batch: dict[str, Tensor],
        segment_length: int = 0,
    ) -> LossTerms:
        """Parts: `loss`, nats per token, each counting alike; `clipped`, the share of tokens with the largest
        weight."""
        if "short_loss" not in batch:
            raise ValueError("objective.short_loss: this batch brings none; give the data module the cache.")
        chosen = batch["labels"] != IGNORED
        labels, short = batch["labels"][chosen], batch["short_loss"][chosen]
        given = token_weights(batch, chosen, 1.0)
        sums = {name: torch.zeros((), device=labels.device) for name in ("loss", "clipped", "weight")}

        def token_loss(logits: Tensor, which: slice | Tensor) -> Tensor:
            entropy = cross_entropy(logits, labels[which])
            weights = long_weights(short[which], entropy.detach(), self.gamma)
            sums["loss"] += entropy.detach().sum()
            sums["clipped"] += (weights >= self.gamma).sum()
            weights = weights if given is None else weights * given[which]
            sums["weight"] += weights.sum()
            return entropy * weights

        options = {"chunk_tokens": self.chunk_tokens, "segment_length": segment_length}
        total, index = student_mean(student, batch, chosen, token_loss, **options)
        count = mean_count(len(labels), labels.device)
        mean_weight = ranks.mean(sums.pop("weight")) / count
        total = total / mean_weight.clamp_min(torch.finfo(total.dtype).tiny)
        return LossTerms(total, {name: value / count for name, value in sums.items()} | index)


@dataclass(frozen=True, kw_only=True)
class Distill:
    """A divergence of the student's next-token distributions from the teacher's, optionally mixed with
    cross-entropy.

    Ids that only one of the two heads has are padding and take no part (models/divergences.py).

    Args:
        divergence: `forward_kl`, `reverse_kl` or `js` (generalised Jensen-Shannon).
        js_weight: of the teacher in the mixture of `js`, in (0, 1); 0.5 is symmetric.
        temperature: softens both distributions; the loss is scaled by its square.
        cross_entropy_weight: share of cross-entropy in the total, in [0, 1].
        repeat_weight: how much tokens count at which a document repeats itself, against 1 for the others; the
            weights are scaled to mean 1.
        teacher_cache: folder of the stage cache_teacher, whose top-k probabilities take the teacher's place;
            None runs the teacher.
        chunk_tokens: tokens whose logits exist at one time.
    """

    needs_teacher = True
    takes_segments = True
    divergence: str = "forward_kl"
    js_weight: float = 0.5
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    repeat_weight: float = 1.0
    teacher_cache: str | None = None
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        _check_chunk(self.chunk_tokens)
        check_repeat_weight(self.repeat_weight)
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"objective.divergence={self.divergence!r} is unknown; choose one of "
                f"{', '.join(DIVERGENCES)}."
            )
        if not 0 < self.js_weight < 1:
            raise ValueError(
                f"objective.js_weight={self.js_weight} must lie between 0 and 1; at the ends choose "
                "objective.divergence=forward_kl or reverse_kl."
            )
        if self.divergence != "js" and self.js_weight != 0.5:
            raise ValueError(f"objective.js_weight={self.js_weight} needs objective.divergence=js.")
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature={self.temperature} must be positive.")
        if not 0 <= self.cross_entropy_weight <= 1:
            raise ValueError(
                f"objective.cross_entropy_weight={self.cross_entropy_weight} must lie in [0, 1]."
            )

    def __call__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batch: dict[str, Tensor],
        segment_length: int = 0,
    ) -> LossTerms:
        """Parts, in nats per token, each token counting alike: the divergence (`kl` for the forward one) and
        `loss` (cross-entropy)."""
        chosen = batch["labels"] != IGNORED
        labels, weights = batch["labels"][chosen], token_weights(batch, chosen, self.repeat_weight)
        ask = self._cached if self.teacher_cache else self._asked
        pair, heads = ask(teacher, batch, chosen)
        part = PART_NAMES.get(self.divergence, self.divergence)
        options = {"weight": self.js_weight} if self.divergence == "js" else {}
        sums = {name: torch.zeros((), device=labels.device) for name in (part, "loss")}

        def token_loss(logits: Tensor, which: slice | Tensor) -> Tensor:
            distance = DIVERGENCES[self.divergence](*pair(logits, which), **options) * self.temperature**2
            entropy = cross_entropy(logits, labels[which])
            sums[part] += distance.detach().sum()
            sums["loss"] += entropy.detach().sum()
            mixed = (1 - self.cross_entropy_weight) * distance + self.cross_entropy_weight * entropy
            return mixed if weights is None else mixed * weights[which]

        pieces = {"chunk_tokens": self.chunk_tokens, "segment_length": segment_length}
        total, index = student_mean(student, batch, chosen, token_loss, heads=heads, **pieces)
        count = mean_count(len(labels), labels.device)
        return LossTerms(total, {name: value / count for name, value in sums.items()} | index)

    def _asked(self, teacher: PreTrainedModel, batch: dict[str, Tensor], chosen: Tensor) -> Targets:
        """The teacher's distributions from the teacher itself."""
        head = output_head(teacher)
        with torch.no_grad():
            target = hidden_states(teacher, batch["input_ids"], batch["document_ids"])[chosen]

        def pair(logits: Tensor, which: slice | Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                teacher_logits = head(target[which])
            return shared_logs(logits, teacher_logits, self.temperature)

        return pair, [head]

    def _cached(self, teacher: PreTrainedModel, batch: dict[str, Tensor], chosen: Tensor) -> Targets:
        """The teacher's distributions as the batch brings them; the teacher only says how many ids it has."""
        if any(name not in batch for name in CACHED):
            raise ValueError(
                "objective.teacher_cache: this batch brings no cached targets; set it to null, or give the "
                "data module the cache."
            )
        ids, logs, tail = (batch[name][chosen] for name in CACHED)
        vocabulary = teacher.config.get_text_config().vocab_size

        def pair(logits: Tensor, which: slice | Tensor) -> tuple[Tensor, Tensor]:
            if logits.shape[-1] < vocabulary:
                raise ValueError(
                    f"objective.teacher_cache: its teacher has logits for {vocabulary} ids, the student for "
                    f"{logits.shape[-1]}; set it to null for this student."
                )
            return bucketed_logs(
                logits[:, :vocabulary], ids[which], logs[which], tail[which], self.temperature
            )

        return pair, []


@dataclass(frozen=True, kw_only=True)
class Align:
    """Each replaced layer imitates its attention layer, reading the teacher's own hidden states.

    Args:
        loss: `l2`, `mse` or `relative` (models/losses.py).
        layer_weights: how much each decoder layer counts in the total, one number per layer of the teacher
            (those of kept layers are not read); they are scaled to mean 1. None weighs all alike.
        repeat_weight: as in `Distill`.
    """

    needs_teacher = True
    loss: str = "l2"
    layer_weights: Sequence[float] | None = None
    repeat_weight: float = 1.0

    def __post_init__(self) -> None:
        check_repeat_weight(self.repeat_weight)
        if self.loss not in ALIGNMENT_LOSSES:
            raise ValueError(
                f"objective.loss={self.loss!r} is unknown; choose one of {', '.join(ALIGNMENT_LOSSES)}."
            )
        given = self.layer_weights
        if given is not None and (any(weight < 0 for weight in given) or not any(given)):
            raise ValueError(
                f"objective.layer_weights={list(given)} must not be negative, nor 0 for every layer."
            )

    def check_layers(self, plan: Sequence[str], key: str) -> None:
        """Holds `layer_weights` against a student's layers.

        Args:
            plan: name of each decoder layer's mixer.
            key: of the objective in the config.

        Raises:
            ValueError: where their number differs, or no layer that is aligned has a weight.
        """
        if self.layer_weights is None:
            return
        if len(self.layer_weights) != len(plan):
            raise ValueError(
                f"{key}.layer_weights has {len(self.layer_weights)} entries, the teacher has {len(plan)} "
                "layers; give one number per layer, or null."
            )
        aligned = [w for w, mixer in zip(self.layer_weights, plan, strict=True) if mixer != ATTENTION]
        if aligned and not any(aligned):
            raise ValueError(
                f"{key}.layer_weights is 0 for every layer that is replaced; nothing would train."
            )

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]
    ) -> LossTerms:
        """Per layer and as the part `alignment`: the loss, all tokens and layers counting alike; padding does
        not count. The total is weighted. Part `index`: as in models/align.py."""
        aligned = aligned_layers(
            student,
            teacher,
            batch,
            ALIGNMENT_LOSSES[self.loss],
            repeat_weight=self.repeat_weight,
            layer_weights=self.layer_weights,
        )
        alignment = torch.stack(list(aligned.layers.values())).mean()
        return LossTerms(aligned.total, {"alignment": alignment} | aligned.parts, aligned.layers)


def _check_chunk(tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"objective.chunk_tokens={tokens} must be at least 1.")
