"""Layer-wise alignment: one frozen stack runs, and each student mixer learns beside the attention it
replaces.

A layer's loss is differentiated as soon as its output exists, so the memory for activations is that of one
layer, however deep the model is.

Shape letters: B rows, T tokens, D hidden width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures import attention_modules
from models.backbone import IndexLosses, backbone_inputs, has_documents
from models.deferred import differentiate, hand_over
from models.losses import mean_count
from models.segments import with_index
from models.student import aligned_mixers
from models.token_weights import token_weights

TokenLoss = Callable[[Tensor, Tensor], Tensor]
Visit = Callable[[int, dict[str, Any], tuple[Tensor, ...]], None]


class Aligned(NamedTuple):
    """How far a student's mixers are from the attention that they replace.

    Attributes:
        layers: the teacher's number of a layer -> its loss, detached, in which all tokens count alike.
        total: a scalar with the gradients of all mixers attached: the weighted mean over layers of this loss
            and that of the layer's index.
        parts: `index`, where mixers with one train: how far those are from attention, nats, their mean.
    """

    layers: dict[int, Tensor]
    total: Tensor
    parts: dict[str, Tensor]


def aligned_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    token_loss: TokenLoss,
    *,
    repeat_weight: float = 1.0,
    layer_weights: Sequence[float] | None = None,
) -> Aligned:
    """The alignment loss of every replaced layer, and their mean.

    Args:
        student: its mixers take part, but for those of inserted layers; nothing else of it runs.
        teacher: the frozen stack whose hidden states every mixer reads.
        batch: input_ids and document_ids [B,T].
        token_loss: (output, target), each [n,D], to a loss per token [n].
        repeat_weight: of tokens at which a document repeats itself (models/token_weights.py).
        layer_weights: one number per decoder layer of the teacher; None weighs all alike.

    Raises:
        ValueError: where the student has no mixer to align.
    """
    mixers = aligned_mixers(student)
    if not mixers:
        raise ValueError(
            "stage align: student.layer_plan keeps attention in every layer; there is nothing to align."
        )
    parameters = [p for mixer in mixers.values() for p in mixer.parameters() if p.requires_grad]
    gradients = dict.fromkeys(parameters)
    losses: dict[int, Tensor] = {}
    weighted: dict[int, Tensor] = {}
    indices: list[Tensor] = []
    given_weights = {index: 1.0 if layer_weights is None else layer_weights[index] for index in mixers}
    mean_weight = sum(given_weights.values()) / len(mixers)
    layer_loss = _layer_loss(batch, token_loss, repeat_weight)
    differentiable = torch.is_grad_enabled() and bool(parameters)

    def align_layer(index: int, kwargs: dict[str, Any], given: tuple[Tensor, ...]) -> None:
        with torch.set_grad_enabled(differentiable):
            kwargs["sequence_context"].index_losses = IndexLosses() if differentiable else None
            output, _ = mixers[index](**kwargs)
            plain, loss = layer_loss(output, given[0])
            loss = loss * (given_weights[index] / mean_weight)
            loss, parts = with_index(loss, kwargs["sequence_context"].index_losses)
            share = loss / len(mixers)
        losses[index], weighted[index] = plain.detach(), loss.detach()
        indices.extend(parts.values())
        if share.requires_grad:  # a mixer may be frozen as a whole
            own = [parameter for parameter in mixers[index].parameters() if parameter.requires_grad]
            gradients.update(zip(own, differentiate(share, own), strict=True))

    beside_attention(list(mixers), teacher, batch, align_layer)
    total = torch.stack(list(weighted.values())).mean()
    if differentiable:
        total = hand_over(total, parameters, [gradients[parameter] for parameter in parameters])
    return Aligned(losses, total, {"index": torch.stack(indices).mean()} if indices else {})


def _layer_loss(
    batch: dict[str, Tensor], token_loss: TokenLoss, repeat_weight: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Makes what turns a layer's output and target [B,T,D] into two means over real tokens: one in which all
    count alike, and one in which those that repeat their document have another weight."""
    document_ids = batch["document_ids"]
    real = document_ids >= 0 if has_documents(document_ids) else None
    tokens = mean_count(document_ids.numel() if real is None else int(real.sum()), document_ids.device)
    every = torch.ones_like(document_ids, dtype=torch.bool)
    weights = token_weights(batch, every if real is None else real, repeat_weight)
    chosen = slice(None) if real is None else real

    def mean(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        per_token = token_loss(output[chosen].flatten(0, -2), target[chosen].flatten(0, -2))
        plain = per_token.sum() / tokens
        return plain, plain if weights is None else (per_token * weights).sum() / tokens

    return mean


def beside_attention(
    layers: Sequence[int], teacher: PreTrainedModel, batch: dict[str, Tensor], visit: Visit
) -> None:
    """Runs the teacher's backbone and visits layers right after their attention, without gradients.

    Args:
        layers: numbers of the teacher's.
        teacher: the frozen stack.
        batch: input_ids and document_ids [B,T].
        visit: called with a layer's index, the arguments that its attention was called with, and what it
            returned.
    """
    document_ids = batch["document_ids"]
    attention = attention_modules(teacher)
    handles = [
        attention[index].register_forward_hook(_observer(index, visit), with_kwargs=True) for index in layers
    ]
    try:
        with torch.no_grad():
            inputs = backbone_inputs(teacher, document_ids, document_ids.shape[1])
            inputs["sequence_context"].local_gradients = True
            teacher.base_model(input_ids=batch["input_ids"], use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()


def _observer(index: int, visit: Visit) -> Callable:
    """A forward hook that gives the attention module's own arguments and output to `visit`."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        visit(index, kwargs, output)

    return hook
