"""Held-out metrics of a model, beside its teacher on the same tokens.

Shape letters: B rows, T tokens, n tokens with a label, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import ranks
from models.backbone import hidden_states, output_head
from models.losses import IGNORED, cross_entropy, forward_kl, token_chunks
from models.parallelize import kept_whole

CHUNK_TOKENS = 2048
Comparison = Callable[[Tensor, Tensor], Tensor]  # logits of model and teacher, each [n,V] -> [n]


def reverse_kl(model_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(model || teacher) per token, in nats: [n,V], [n,V] -> [n].

    KL(teacher || model) asks whether the model allows what the teacher says; this one, whether the model says
    what the teacher would not.
    """
    return forward_kl(teacher_logits, model_logits)


def top1_agreement(model_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 where both hold the same token for the most likely one, else 0: [n,V], [n,V] -> [n]."""
    return (model_logits.argmax(-1) == teacher_logits.argmax(-1)).float()


def top5_agreement(model_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 where the teacher's most likely token is among the model's five, else 0: [n,V], [n,V] -> [n].

    Among the five means that fewer than five tokens are more likely; a logit that is NaN counts as such.
    """
    chosen = model_logits.gather(-1, teacher_logits.argmax(-1, keepdim=True))
    return ((model_logits <= chosen).logical_not().sum(-1) < 5).float()


# What a model is compared with its teacher by: during a run, and by eval.py.
USUAL = MappingProxyType({"kl": forward_kl, "top1_agreement": top1_agreement})
EVERY = MappingProxyType({**USUAL, "reverse_kl": reverse_kl, "top5_agreement": top5_agreement})


@dataclass
class MetricSums:
    """Sums over tokens, which add up over batches.

    Args:
        tokens: tokens with a label.
        sums: metric -> sum over tokens: `loss`, `teacher_loss` (nats), and those of a comparison.
        by_position: metric -> [T] sums by position in the row; `count` holds the tokens of each position.
    """

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    by_position: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: "MetricSums") -> None:
        """Adds another batch's sums, in place."""
        self.tokens += other.tokens
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, value in other.by_position.items():
            self.by_position[name] = self.by_position[name] + value if name in self.by_position else value

    def means(self) -> dict[str, float]:
        """Metric -> mean over tokens."""
        return {name: value / max(self.tokens, 1) for name, value in self.sums.items()}

    def position_means(self) -> dict[str, list[float]]:
        """Metric -> mean at each position of the row; NaN where no token had a label."""
        count = self.by_position["count"]
        return {name: (value / count).tolist() for name, value in self.by_position.items() if name != "count"}


@torch.no_grad()
def batch_metrics(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: dict[str, Tensor],
    comparisons: Mapping[str, Comparison] = USUAL,
) -> MetricSums:
    """Loss of `model` on one batch; with a teacher also its loss, and by default KL and top-1 agreement.

    Args:
        model: a causal language model.
        teacher: another one over the same vocabulary, or None.
        batch: input_ids, labels, document_ids [B,T]; each result belongs to the position of the predicting
            token.
        comparisons: name -> how the two are compared, where there is a teacher.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    chosen = batch["labels"] != IGNORED
    labels = batch["labels"][chosen]
    models = {"model": model} | ({"teacher": teacher} if teacher is not None else {})
    hidden = {
        name: hidden_states(m, batch["input_ids"], batch["document_ids"])[chosen]
        for name, m in models.items()
    }
    heads = {name: output_head(m) for name, m in models.items()}
    values: dict[str, list[Tensor]] = {}
    with kept_whole(*heads.values()):
        for chunk in token_chunks(labels, CHUNK_TOKENS):
            logits = {name: head(hidden[name][chunk]) for name, head in heads.items()}
            found = {"loss": cross_entropy(logits["model"], labels[chunk])}
            if teacher is not None:
                found["teacher_loss"] = cross_entropy(logits["teacher"], labels[chunk])
                for name, compare in comparisons.items():
                    found[name] = compare(logits["model"], logits["teacher"])
            for name, value in found.items():
                values.setdefault(name, []).append(value)
    per_token = {name: torch.cat(pieces).double() for name, pieces in values.items()}
    by_position = {"count": chosen.double().sum(0).cpu()}
    for name, value in per_token.items():
        grid = torch.zeros(chosen.shape, dtype=torch.float64, device=device)
        grid[chosen] = value
        by_position[name] = grid.sum(0).cpu()
    return MetricSums(
        len(labels), {name: float(value.sum()) for name, value in per_token.items()}, by_position
    )


def own_batches(batches: Sequence[dict[str, Tensor]]) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """This process's share of the batches, each with its index; all processes get equally many.

    The index is None where a batch only keeps a process busy while others have one more.
    """
    for start in range(0, len(batches), ranks.world_size()):
        index = start + ranks.rank()
        yield (index, batches[index]) if index < len(batches) else (None, batches[0])


def evaluate(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[dict[str, Tensor]],
    comparisons: Mapping[str, Comparison] = USUAL,
) -> MetricSums:
    """Sums of `batch_metrics` over batches, in evaluation mode; the model's mode is restored.

    Several processes divide the batches among themselves and return the same sums. Where the last round is
    not full, a process repeats a batch without counting it: all must take part when a model is sharded.
    """
    own, was_training = MetricSums(), model.training
    model.eval()
    for index, batch in own_batches(batches):
        sums = batch_metrics(model, teacher, batch, comparisons)
        if index is not None:
            own.add(sums)
    model.train(was_training)
    total = MetricSums()
    for part in ranks.gather(own):
        total.add(part)
    return total


def copy_gain(sums: MetricSums, metric: str = "loss") -> dict[str, float]:
    """In-context copying from rows that hold a passage twice.

    Returns:
        `first` and `second`: mean loss in nats/token on either copy; `gain`: their difference. The token at
            which
        the second copy begins is left out: nothing announces it.
    """
    total, count = sums.by_position[metric], sums.by_position["count"]
    half = len(total) // 2
    first = float(total[: half - 1].sum() / count[: half - 1].sum())
    second = float(total[half:-1].sum() / count[half:-1].sum())
    return {"first": first, "second": second, "gain": first - second}


def held_out_row(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: list[dict[str, Tensor]],
    copy_batches: list[dict[str, Tensor]],
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The figures of one row of the results table, and the curves by position.

    Returns:
        loss, perplexity; where there are copies, copy_gain, copy_first and copy_second; with a teacher, kl
        and top1_agreement; and metric -> mean by position in the row.
    """
    sums = evaluate(model, teacher, batches)
    means = sums.means()
    row = {"loss": means["loss"], "perplexity": math.exp(min(means["loss"], 700.0))}
    row |= {name: means[name] for name in ("kl", "top1_agreement") if name in means}
    if copy_batches:
        copies = copy_gain(evaluate(model, None, copy_batches))
        row |= {f"copy_{name}": value for name, value in copies.items()}
    return row, sums.position_means()
