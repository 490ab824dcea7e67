"""How much each token counts in a loss.

Shape letters: B rows, T tokens, n tokens that count at all.
"""

import math

import torch
from torch import Tensor

from models import ranks
from models.backbone import document_positions
from models.losses import mean_count

SPAN = 4  # tokens: shorter spans recur by chance


def repeated_tokens(input_ids: Tensor, document_ids: Tensor, span: int = SPAN) -> Tensor:
    """Where a document repeats itself: [B,T] bool, true where the last `span` tokens, this one included, have
    occurred before in the same document.

    What follows can be looked up there, so the prediction made at such a token is one that retrieval helps.

    Args:
        input_ids: [B,T] int64.
        document_ids: [B,T] int32, -1 on padding.
        span: tokens that must agree, at least 1.
    """
    rows, length = input_ids.shape
    flat_ids = input_ids.flatten()
    vocabulary = int(flat_ids.max()) + 1
    row = torch.arange(rows, device=input_ids.device)[:, None]
    documents = (row * (length + 1) + document_ids + 1).long().flatten()
    # Numbers the distinct spans of 0, 1, 2, ... tokens that end here: a number and a token make the next one.
    key = torch.unique(documents, return_inverse=True)[1]
    for _ in range(span):
        key = torch.unique(key * vocabulary + flat_ids, return_inverse=True)[1]
        ending, key = key, key.roll(1)  # what wraps around begins before its document, and is not asked
    place = torch.arange(rows * length, device=input_ids.device)
    inside = (document_ids >= 0).flatten() & (document_positions(document_ids).flatten() >= span - 1)
    first = torch.full_like(place, rows * length)
    first.scatter_reduce_(0, ending, torch.where(inside, place, rows * length), "amin")
    return (inside & (place > first[ending])).view(rows, length)


def token_weights(batch: dict[str, Tensor], chosen: Tensor, repeat_weight: float) -> Tensor | None:
    """The weight of each token that counts, with mean 1 over the tokens of all processes.

    Args:
        batch: input_ids, document_ids [B,T]; and `weights` [B,T] float, not negative, where the data says how
            much a token counts.
        chosen: [B,T] bool, the tokens that count.
        repeat_weight: factor for the tokens of `repeated_tokens`.

    Returns:
        [n] float32; None where all count the same.
    """
    weights = batch["weights"].float() if "weights" in batch else None
    if repeat_weight != 1:
        repeated = repeated_tokens(batch["input_ids"], batch["document_ids"])
        own = torch.where(repeated, repeat_weight, 1.0)
        weights = own if weights is None else weights * own
    if weights is None:
        return None
    weights = weights[chosen]
    total = ranks.mean(weights.sum()).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights * (mean_count(len(weights), weights.device) / total)


def long_weights(short_loss: Tensor, long_loss: Tensor, gamma: float) -> Tensor:
    """How much a token counts by what a long context does for it, min(exp(short - long), gamma).

    LongCE, arXiv 2410.23771.

    Args:
        short_loss, long_loss: [n], nats after a short context and after the whole one, detached.
        gamma: largest weight.

    Returns:
        [n]; 1 where the long context changes nothing.
    """
    return (short_loss - long_loss).clamp_max(math.log(gamma)).exp()


def check_repeat_weight(weight: float) -> None:
    """Refuses a weight that would turn a loss around.

    Raises:
        ValueError: naming the key.
    """
    if weight < 0:
        raise ValueError(f"objective.repeat_weight={weight} must not be negative; 1 weighs all tokens alike.")
