"""WKV-6 as matrix products over chunks of tokens, in plain torch: any device, no compiler.

Shapes: B rows, T tokens, H heads, N head size, M chunks, C tokens in a chunk; here every tensor is
[B,H,M,C,...].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.decays import sum_after, sum_before, sum_until
from kernels.segments import RESET, blank_padding

CHUNK = 32


def within(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, segment: Tensor | None, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """What each token reads of the earlier tokens of its chunk.

    Halves the chunk again and again: tokens of a second half read those of the first half, both decays
    measured from the middle.

    Args:
        r, log_w, k, v: [B,H,M,C,N], C a power of two.
        segment: [B,1,M,C] number of each token's document within the chunk, or None.
        read: sum_until or sum_before: the decay from the middle to a reading token.

    Returns:
        [B,H,M,C,N].
    """
    y, half = torch.zeros_like(v), 1
    while half < v.shape[-2]:
        (_, r_high), (w_low, w_high), (k_low, _), (v_low, _) = (
            x.unflatten(-2, (-1, 2, half)).unbind(-3) for x in (r, log_w, k, v)
        )
        pairs = (r_high * read(w_high).exp()) @ (k_low * sum_after(w_low).exp()).mT
        if segment is not None:
            s_low, s_high = segment.unflatten(-1, (-1, 2, half)).unbind(-2)
            pairs = pairs.masked_fill(s_high[..., :, None] != s_low[..., None, :], 0)
        high = pairs @ v_low
        y = y + torch.stack((torch.zeros_like(high), high), dim=-3).flatten(-4, -2)
        half *= 2
    return y


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunked WKV-6; arguments, results and dtypes as in kernels/wkv6/reference.py, gradients by autograd."""
    tokens = r.shape[1]
    size = min(CHUNK, 1 << (tokens - 1).bit_length())
    chunks = -(-tokens // size)
    missing = chunks * size - tokens
    r, log_w, k, v = (
        pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (chunks, size)).permute(0, 3, 1, 2, 4)
        for x in blank_padding(codes, r, log_w, k, v)
    )
    read = sum_until if u is None else sum_before
    from_start, to_end = r * read(log_w).exp(), k * sum_after(log_w).exp()
    keep, segment = log_w.sum(-2).exp().unsqueeze(-1), None
    if codes is not None:
        resets = pad((codes == RESET).int(), (0, missing)).unflatten(1, (chunks, size))
        segment = resets.cumsum(-1).unsqueeze(1)
        last = segment[..., -1:]
        from_start = from_start.masked_fill((segment > 0)[..., None], 0)
        to_end = to_end.masked_fill((segment < last)[..., None], 0)
        keep = keep.masked_fill((last > 0)[..., None], 0)
    starts, added = [], to_end.mT @ v
    for keep_m, added_m in zip(keep.unbind(2), added.unbind(2), strict=True):
        starts.append(state)
        state = keep_m * state + added_m
    own = (r * k if u is None else r * k * u[:, None, None]).sum(-1, keepdim=True)
    y = from_start @ torch.stack(starts, dim=2) + own * v + within(r, log_w, k, v, segment, read)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], state
