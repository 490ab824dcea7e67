"""Sparse attention as dense attention under a mask, in plain torch: the definition every other backend is
judged against."""

import torch
from torch import Tensor

from kernels.sparse_attention.lists import LARGEST_SHARE, listed_blocks


def run(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of all keys, those of unlisted blocks and of later tokens masked; autograd gives the gradients.

    Args:
        q: [B,T,H,N] float32 or float64.
        k, v: [B,M,C,G,N] of the same dtype.
        blocks: [B,T,J,K] int32, as kernels.sparse_attention says.
        starts: [B,M] int32.
        positions: [B,T] int32.

    Returns:
        y [B,T,H,N], and the share of each listed block [B,T,J,K], without a gradient.
    """
    heads, lists, count = q.shape[2], blocks.shape[2], starts.shape[1]
    place = starts[:, :, None] + torch.arange(k.shape[2], device=k.device)
    past = (place[:, None] <= positions[:, :, None, None])[:, :, None]  # [B,T,1,M,C]
    # What stands in places that nobody sees counts for nothing, NaN included.
    named = torch.where(blocks >= 0, blocks, -2 - blocks)
    filled = (
        (past & listed_blocks(named, count).any(2)[:, :, None, :, None]).any(1).squeeze(1)[..., None, None]
    )
    keys, values = (x.masked_fill(~filled, 0).repeat_interleave(heads // x.shape[3], dim=3) for x in (k, v))
    attended = listed_blocks(blocks, count).repeat_interleave(heads // lists, dim=2)[..., None] & past
    scores = torch.einsum("bthn,bmchn->bthmc", q, keys)
    shown = scores.masked_fill(~attended, -torch.inf).flatten(3)
    level = shown.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).min)
    weights = (shown - level).exp()
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.clamp_min(torch.finfo(q.dtype).tiny)).unflatten(3, scores.shape[3:])
    y = torch.einsum("bthmc,bmchn->bthn", weights, values)
    with torch.no_grad():
        log_total = (total.log() + level).squeeze(-1)  # [B,T,H]; -inf where nothing is attended
        of_block = scores.masked_fill(~past, -torch.inf).logsumexp(-1)
        share = (of_block - log_total[..., None]).exp().clamp_max(LARGEST_SHARE)
        share = share.masked_fill(log_total[..., None].isneginf(), 0).unflatten(2, (lists, -1)).mean(3)
        share = share.gather(-1, named.clamp_min(0).long()).masked_fill(named < 0, 0)
    return y, share
