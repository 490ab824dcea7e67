"""Losses over hidden states and logits.

Shape letters: B rows, T tokens, n selected tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models import ranks
from models.deferred import GradientSum, differentiate, hand_over
from models.divergences import forward_kl_of, shared_logs

IGNORED = -100


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token, in nats, times temperature² (Hinton et al., arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: [n,V]; computed in float32 or better, over the ids that both have.
        temperature: divides both logits.

    Returns:
        [n].
    """
    return forward_kl_of(*shared_logs(student_logits, teacher_logits, temperature)) * temperature**2


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy per token, in nats: [n,V], [n] -> [n]."""
    return F.cross_entropy(logits.to(_wide(logits)), labels, reduction="none")


def alignment_l2(output: Tensor, target: Tensor) -> Tensor:
    """Distance of two mixer outputs per token, ‖target - output‖₂ / √D (RADLADS, arXiv 2505.03005): [n,D] ->
    [n]."""
    difference = (target.float() - output.float()) * output.shape[-1] ** -0.5
    return (difference.pow(2).sum(-1) + 1e-12).sqrt()


def alignment_mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference per token: [n,D] -> [n]."""
    return (target.float() - output.float()).pow(2).mean(-1)


def alignment_relative(output: Tensor, target: Tensor) -> Tensor:
    """Squared difference relative to the target's mean square over the tokens of all processes: [n,D] -> [n];
    1 is as bad as zero."""
    energy = ranks.mean(target.float().pow(2).mean(-1).sum()) / mean_count(len(target), target.device)
    return alignment_mse(output, target) / energy.clamp_min(1e-12)


ALIGNMENT_LOSSES = {"l2": alignment_l2, "mse": alignment_mse, "relative": alignment_relative}


def mean_count(count: int, device: torch.device) -> Tensor:
    """Tokens per process, at least 1: what a sum over this process's `count` tokens is divided by, so that
    the mean over processes is the mean over all tokens, however unevenly they are spread."""
    return ranks.mean(torch.tensor(float(count), device=device)).clamp_min(1.0)


def token_chunks(tokens: Tensor, size: int) -> list[slice]:
    """Slices of `size` tokens that cover [n,...]; as many in every process (the last ones may be empty),
    because all take part when a sharded head runs."""
    count = tokens.shape[0]
    chunks = ranks.largest(-(-count // size))
    return [slice(min(i * size, count), min((i + 1) * size, count)) for i in range(chunks)]


def chunked_mean(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Sequence[Tensor],
    token_loss: Callable[[Tensor, slice], Tensor],
    chunk_tokens: int,
    count: Tensor | None = None,
) -> Tensor:
    """Mean of a loss over tokens that needs logits, without ever holding the logits of all tokens.

    With several processes each returns its share, so that their mean is the mean over all tokens.

    Each chunk's logits are computed, differentiated and dropped in the forward pass, so peak memory is
    chunk_tokens · V instead of B · T · V.

    Args:
        hidden: [n,D] final hidden states of the tokens that count.
        head: hidden states -> logits [.,V].
        head_parameters: the head's parameters that want gradients.
        token_loss: (logits of a chunk, the chunk's slice of tokens) -> loss per token.
        chunk_tokens: tokens per chunk.
        count: what the sum is divided by; None means the tokens given, as `mean_count` counts them.

    Returns:
        A scalar (0 where there is no token), differentiable in `hidden` and `head_parameters`.
    """
    count = mean_count(hidden.shape[0], hidden.device) if count is None else count
    chunks = token_chunks(hidden, chunk_tokens)
    total = hidden.new_zeros((), dtype=_wide(hidden))
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        for chunk in chunks:
            total = total + token_loss(head(hidden[chunk]), chunk).sum() / count
        return total
    source = hidden.detach()
    hidden_gradient = torch.zeros_like(source)
    parameters = [parameter for parameter in head_parameters if parameter.requires_grad]
    head_gradients = GradientSum(parameters)
    for chunk in chunks:
        piece = source[chunk].requires_grad_()
        loss = token_loss(head(piece), chunk).sum() / count
        gradient, *others = differentiate(loss, [piece, *parameters])
        hidden_gradient[chunk] = gradient
        head_gradients.add(others)
        total = total + loss.detach()
    return hand_over(total, [hidden, *parameters], [hidden_gradient, *head_gradients.gradients])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
