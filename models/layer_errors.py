"""How far a model's hidden states are from its teacher's, layer by layer.

Shape letters: B rows, T tokens, D hidden width, n real tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures import ARCHITECTURES, decoder_layers
from models.backbone import hidden_states
from models.student import teacher_places


def why_not_comparable(model: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """Why the layers of two models cannot be held side by side; None where they can."""
    for one in (model, teacher):
        if one.config.model_type not in ARCHITECTURES:
            return f"the architecture {one.config.model_type} is unknown"
    sizes = [
        {"num_hidden_layers": len(teacher_places(one)), "hidden_size": one.config.hidden_size}
        for one in (model, teacher)
    ]
    for field, theirs in sizes[1].items():
        if sizes[0][field] != theirs:
            return f"{field} is {sizes[0][field]}, and the teacher's {theirs}"
    return None


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> list[float]:
    """Relative error of what each decoder layer puts out, where both models read the same tokens.

    Of each token ‖h_model - h_teacher‖ / ‖h_teacher‖; then the root mean square over all real tokens, so that
    a token with a huge state (often the first one) counts like any other. 0 is no difference, 1 as bad as
    putting out zeros. What a layer gets wrong is handed to the next: errors add up along the stack.

    Args:
        model, teacher: in evaluation mode, on one device, with as many layers of the same width, but for
            layers that are inserted into the model.
        batches: input_ids and document_ids [B,T]; document -1 is padding and left out.

    Returns:
        One number per decoder layer of the teacher, in order.
    """
    squares, tokens = torch.zeros(len(decoder_layers(teacher)), dtype=torch.float64), 0
    device = next(model.parameters()).device
    for batch in batches:
        ids, documents = (batch[name].to(device) for name in ("input_ids", "document_ids"))
        real = documents >= 0
        theirs = _of_each_layer(teacher, ids, documents, lambda index, output: output)
        found = _of_each_layer(model, ids, documents, partial(_relative_squares, theirs, real))
        squares += torch.tensor(found, dtype=torch.float64)
        tokens += int(real.sum())
    return (squares / max(tokens, 1)).sqrt().tolist()


def _relative_squares(targets: list[Tensor], real: Tensor, index: int, output: Tensor) -> float:
    """Sum over real tokens [B,T] of (‖output - target‖ / ‖target‖)², of layer `index`; both [B,T,D]."""
    target = targets[index][real].double()
    difference = (output[real].double() - target).square().sum(-1)
    return float((difference / target.square().sum(-1)).sum())


def _of_each_layer(
    model: PreTrainedModel, ids: Tensor, documents: Tensor, measure: Callable[[int, Tensor], Any]
) -> list[Any]:
    """Runs a model over [B,T] tokens and measures the output [B,T,D] of every layer that the teacher has, as
    soon as it is there."""
    found = []

    def hook(layer: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(measure(len(found), output[0] if isinstance(output, tuple) else output))

    layers = decoder_layers(model)
    handles = [layers[place].register_forward_hook(hook) for place in teacher_places(model)]
    try:
        hidden_states(model, ids, documents)
    finally:
        for handle in handles:
            handle.remove()
    return found
