"""WKV-7 as matrix products over chunks of tokens, in plain torch: any device, no compiler.

Shapes: B rows, T tokens, H heads, N head size, M chunks, C tokens in a chunk; here every tensor is
[B,H,M,C,...]. Inside a chunk, with g the inclusive cumulative log decay, U the rows b multiplies and S the
state at the chunk's start:
    U = (I - A_ab)^-1 (a~ S + A_ak V) ;  Y = r~ S + A_rk V + A_rb U ;  S' = e^{g_C} S + K^T V + B^T U
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.decays import sum_after, sum_before, sum_until
from kernels.segments import RESET, blank_padding

CHUNK = 32


def _pairs(queries: Tensor, keys: Tensor, log_w: Tensor) -> Tensor:
    """Decayed products of every query with every earlier key of its chunk, without ever growing an exponent.

    Halves the chunk again and again: queries of a second half meet keys of the first half, both decays
    measured from the middle.

    Args:
        queries: [...,2,C,N] the rows a, read before their token, and r, read after it.
        keys: [...,2,C,N] the rows b and k.
        log_w: [...,C,N].

    Returns:
        [...,2,C,2,C] (kind and position of the query, then of the key), zero where the key is not earlier.
    """
    size = keys.shape[-2]
    if size == 1:
        return queries.new_zeros(*queries.shape[:-2], 1, 2, 1)
    half = size // 2
    (q_low, q_high), (k_low, k_high), (w_low, w_high) = (
        x.unflatten(-2, (2, half)).unbind(-3) for x in (queries, keys, log_w)
    )
    read = torch.stack((sum_before(w_high), sum_until(w_high)), dim=-3)
    high = (q_high * read.exp()).flatten(-3, -2)
    low = (k_low * sum_after(w_low).exp().unsqueeze(-3)).flatten(-3, -2)
    corner = (high @ low.mT).unflatten(-1, (2, half)).unflatten(-3, (2, half))
    both = _pairs(torch.stack((q_low, q_high)), torch.stack((k_low, k_high)), torch.stack((w_low, w_high)))
    top = pad(both[0], (0, half))
    return torch.cat((top, torch.cat((corner, both[1]), dim=-1)), dim=-3)


def _segment_masks(codes: Tensor, chunks: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of tokens share a document, and which tokens share one with the chunk's start and end.

    From codes [B,T] with M chunks of C tokens: booleans [B,1,M,C,C], [B,1,M,C,1], [B,1,M,C,1].
    """
    resets = pad((codes == RESET).int(), (0, chunks * size - codes.shape[1]))
    segment = resets.unflatten(1, (chunks, size)).cumsum(-1).unsqueeze(1)
    same = segment[..., :, None] == segment[..., None, :]
    return same, (segment == 0)[..., None], (segment == segment[..., -1:])[..., None]


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunked WKV-7; arguments, results and dtypes as in kernels/wkv7/reference.py, gradients by autograd.

    The unit lower-triangular system is solved by substitution: powers of A_ab grow like binomials when keys
    repeat.
    """
    tokens = r.shape[1]
    size = min(CHUNK, 1 << (tokens - 1).bit_length())
    chunks = -(-tokens // size)
    inputs = blank_padding(codes, r, log_w, k, v, a, b)
    r, log_w, k, v, a, b = (
        pad(x, (0, 0, 0, 0, 0, chunks * size - tokens)).unflatten(1, (chunks, size)).permute(0, 3, 1, 2, 4)
        for x in inputs
    )
    pairs = _pairs(torch.stack((a, r), dim=-3), torch.stack((b, k), dim=-3), log_w)
    (a_b, a_k), (r_b, r_k) = (x.unbind(-2) for x in pairs.unbind(-4))
    r_b = r_b + torch.diag_embed((r * b).sum(-1))
    r_k = r_k + torch.diag_embed((r * k).sum(-1))
    a_start, r_start = a * sum_before(log_w).exp(), r * sum_until(log_w).exp()
    to_end = sum_after(log_w).exp()
    b_end, k_end, keep = b * to_end, k * to_end, log_w.sum(-2, keepdim=True).exp()
    if codes is not None:
        same, sees_start, reaches_end = _segment_masks(codes, chunks, size)
        a_b, a_k, r_b, r_k = (x.masked_fill(~same, 0) for x in (a_b, a_k, r_b, r_k))
        a_start, r_start = a_start.masked_fill(~sees_start, 0), r_start.masked_fill(~sees_start, 0)
        b_end, k_end = b_end.masked_fill(~reaches_end, 0), k_end.masked_fill(~reaches_end, 0)
        keep = keep.masked_fill(~sees_start[..., -1:, :], 0)

    identity = torch.eye(size, dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(
        identity - a_b, torch.cat((a_start, a_k @ v), dim=-1), upper=False, unitriangular=True
    )
    from_start, own = solved.chunk(2, dim=-1)
    transition = torch.diag_embed(keep.squeeze(-2)) + b_end.mT @ from_start
    added = k_end.mT @ v + b_end.mT @ own
    starts = []
    for transition_m, added_m in zip(transition.unbind(2), added.unbind(2), strict=True):
        starts.append(state)
        state = transition_m @ state + added_m
    y = (r_start + r_b @ from_start) @ torch.stack(starts, dim=2) + r_k @ v + r_b @ own
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], state
