"""A student's loss over rows, whole or in segments (truncated back-propagation through time).

In segments, each one reads the state that the one before it has left, and its gradients stop where it begins;
they are computed as soon as its loss is, so the memory for activations is that of one segment, however long
the row is.

Shape letters: B rows, T tokens, n tokens that count, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from models.backbone import IndexLosses, hidden_states, output_head
from models.deferred import GradientSum, differentiate, hand_over
from models.losses import chunked_mean, mean_count
from models.parallelize import kept_whole

# (logits of some tokens, which of the n tokens they are: a slice or [.] int64) -> their losses
TokenLoss = Callable[[Tensor, slice | Tensor], Tensor]


def student_mean(
    student: PreTrainedModel,
    batch: dict[str, Tensor],
    chosen: Tensor,
    token_loss: TokenLoss,
    *,
    chunk_tokens: int,
    segment_length: int = 0,
    heads: Sequence[nn.Module] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of a loss over the chosen tokens, as `chunked_mean` makes it; and what trains the student's
    indices.

    Args:
        student: the model.
        batch: input_ids and document_ids [B,T].
        chosen: [B,T] bool, the n tokens that count, in the order of the flattened rows.
        token_loss: as above.
        chunk_tokens: tokens whose logits exist at one time.
        segment_length: tokens of a row that are differentiated together; 0 means the whole row.
        heads: of other models that `token_loss` calls.

    Returns:
        A scalar; and where mixers with an index train, as `index` how far those are from attention, nats, the
        mean over mixers (it is part of the scalar).
    """
    head = output_head(student)
    parameters = list(head.parameters())
    if segment_length and segment_length < batch["input_ids"].shape[1]:
        with kept_whole(*heads):
            return _in_segments(student, batch, chosen, token_loss, chunk_tokens, segment_length)
    losses = IndexLosses() if torch.is_grad_enabled() else None
    hidden = hidden_states(student, batch["input_ids"], batch["document_ids"], index_losses=losses)[chosen]
    with kept_whole(head, *heads):
        return with_index(chunked_mean(hidden, head, parameters, token_loss, chunk_tokens), losses)


def with_index(
    total: Tensor, losses: Sequence[Tensor] | None, share: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss with that of the indices added; and that part by name, where there is one.

    Args:
        total: a scalar.
        losses: of each mixer's index; those of frozen ones do not count.
        share: of the row that they are the means of.
    """
    trained = [loss for loss in losses or () if loss.requires_grad]
    if not trained:
        return total, {}
    index = torch.stack(trained).mean() * share
    return total + index, {"index": index.detach()}


def _in_segments(
    student: PreTrainedModel,
    batch: dict[str, Tensor],
    chosen: Tensor,
    token_loss: TokenLoss,
    chunk_tokens: int,
    segment_length: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`student_mean`, one segment after the other; all of them share the mean's denominator."""
    head, cache = output_head(student), DynamicCache(config=student.config)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    head_parameters, gradients = list(head.parameters()), GradientSum(parameters)
    count = mean_count(int(chosen.sum()), chosen.device)
    number = chosen.flatten().cumsum(0).view_as(chosen) - 1  # of a token among those that count
    total, parts = torch.zeros((), device=chosen.device), {}
    for start in range(0, chosen.shape[1], segment_length):
        stop = min(start + segment_length, chosen.shape[1])
        own = chosen[:, start:stop]
        which = number[:, start:stop][own]
        ids, documents = batch["input_ids"][:, start:stop], batch["document_ids"][:, :stop]
        losses = IndexLosses() if torch.is_grad_enabled() else None
        hidden = hidden_states(student, ids, documents, cache, losses)[own]

        def own_loss(logits: Tensor, chunk: slice, which: Tensor = which) -> Tensor:
            return token_loss(logits, which[chunk])

        with kept_whole(head):
            loss = chunked_mean(hidden, head, head_parameters, own_loss, chunk_tokens, count)
        loss, index = with_index(loss, losses, (stop - start) / chosen.shape[1])
        if loss.requires_grad:
            gradients.add(differentiate(loss, parameters))
        total = total + loss.detach()
        parts = {name: parts.get(name, 0) + value for name, value in index.items()}
        detach(cache)
    if torch.is_grad_enabled():
        total = hand_over(total, parameters, gradients.gradients)
    return total, parts


def detach(cache: Cache) -> None:
    """Cuts what a cache holds off from the graph that has made it."""
    for layer in cache.layers:
        for name in getattr(layer, "tensors", ("keys", "values")):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor):
                setattr(layer, name, held.detach())
