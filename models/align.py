"""Layer-wise alignment: one frozen stack runs, and each student mixer learns beside the attention it
replaces.

A layer's loss is differentiated as soon as its output exists, so the memory for activations is that of one
layer,
however deep the model is.

Shape letters: B rows, T tokens, D hidden width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures import attention_modules
from models.backbone import backbone_inputs, has_documents
from models.deferred import differentiate, hand_over
from models.losses import mean_count
from models.student import student_mixers

TokenLoss = Callable[[Tensor, Tensor], Tensor]


def aligned_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], token_loss: TokenLoss
) -> tuple[dict[int, Tensor], Tensor]:
    """The alignment loss of every replaced layer, and their mean with the gradients of all mixers attached.

    Args:
        student: its mixers take part; nothing else of it runs.
        teacher: the frozen stack whose hidden states every mixer reads.
        batch: input_ids and document_ids [B,T].
        token_loss: (output, target), each [n,D], to a loss per token [n].

    Returns:
        Detached loss per layer index, and their mean as a differentiable scalar.

    Raises:
        ValueError: where the student has no mixer to align.
    """
    mixers = student_mixers(student)
    if not mixers:
        raise ValueError(
            "stage align: student.layer_plan keeps attention in every layer; there is nothing to align."
        )
    parameters = [
        parameter for mixer in mixers.values() for parameter in mixer.parameters() if parameter.requires_grad
    ]
    gradients = dict.fromkeys(parameters)
    losses: dict[int, Tensor] = {}
    document_ids = batch["document_ids"]
    real = document_ids >= 0 if has_documents(document_ids) else None
    tokens = mean_count(document_ids.numel() if real is None else int(real.sum()), document_ids.device)
    differentiable = torch.is_grad_enabled() and bool(parameters)

    def align_layer(index: int, mixer: nn.Module, kwargs: dict[str, Any], target: Tensor) -> None:
        with torch.set_grad_enabled(differentiable):
            output, _ = mixer(**kwargs)
            chosen = slice(None) if real is None else real
            per_token = token_loss(output[chosen].flatten(0, -2), target[chosen].flatten(0, -2))
            loss = per_token.sum() / tokens
            share = loss / len(mixers)
        losses[index] = loss.detach()
        if loss.requires_grad:  # a mixer may be frozen as a whole
            own = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
            gradients.update(zip(own, differentiate(share, own), strict=True))

    handles = [
        module.register_forward_hook(_observer(index, mixers[index], align_layer), with_kwargs=True)
        for index, module in attention_modules(teacher).items()
        if index in mixers
    ]
    try:
        with torch.no_grad():
            inputs = backbone_inputs(teacher, document_ids, document_ids.shape[1])
            inputs["sequence_context"].local_gradients = True
            teacher.base_model(input_ids=batch["input_ids"], use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    total = torch.stack(list(losses.values())).mean()
    if not differentiable:
        return losses, total
    return losses, hand_over(total, parameters, [gradients[parameter] for parameter in parameters])


def _observer(index: int, mixer: nn.Module, align_layer: Callable) -> Callable:
    """A forward hook that gives the attention module's own arguments and output to `align_layer`."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        align_layer(index, mixer, kwargs, output[0])

    return hook
