"""Sparse attention in plain torch: the listed blocks are gathered for some queries at a time, so that time
and memory depend on what is listed and not on how many blocks there are."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.sparse_attention.lists import LARGEST_SHARE

GATHERED = 1 << 24  # numbers of keys that are gathered at one time


def run(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """As kernels/sparse_attention/reference.py; any device and dtype."""
    batch, tokens, lists, listed = blocks.shape
    per_query = batch * lists * listed * k.shape[2] * k.shape[4]
    step = max(1, GATHERED // per_query)
    parts = []
    for first in range(0, tokens, step):
        some = (x[:, first : first + step] for x in (q, blocks, positions))
        if torch.is_grad_enabled() and step < tokens:
            part = checkpoint(_attend, *some, k, v, starts, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _attend(*some, k, v, starts)
        parts.append(part)
    y, share = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return y, share


def _attend(
    q: Tensor, blocks: Tensor, positions: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Some queries; shape letters and results as in the definition."""
    batch, tokens, heads, size = q.shape
    lists, listed, length = blocks.shape[2], blocks.shape[3], k.shape[2]
    group = torch.arange(lists, device=q.device) // (lists // k.shape[3])
    named = torch.where(blocks >= 0, blocks, -2 - blocks)
    row = torch.arange(batch, device=q.device)[:, None, None, None]
    place = named.clamp_min(0).long()
    first = starts[row, place]  # [B,T,J,K]
    past = first[..., None] + torch.arange(length, device=q.device) <= positions[:, :, None, None, None]
    past = past & (named >= 0)[..., None]
    keys, values = (  # [B,T,J,K,C,N]; what is not filled yet counts for nothing, NaN included
        x[row, place, :, group[None, None, :, None]].masked_fill(~past[..., None], 0) for x in (k, v)
    )
    queries = q.unflatten(2, (lists, -1))
    scores = torch.einsum("btjrn,btjkcn->btjrkc", queries, keys)
    attended = (past & (blocks >= 0)[..., None])[:, :, :, None]
    shown = scores.masked_fill(~attended, -torch.inf).flatten(4)
    level = shown.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).min)
    weights = (shown - level).exp()
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.clamp_min(torch.finfo(q.dtype).tiny)).unflatten(4, (listed, length))
    y = torch.einsum("btjrkc,btjkcn->btjrn", weights, values).reshape(batch, tokens, heads, size)
    with torch.no_grad():
        log_total = total.log() + level  # [B,T,J,R,1]
        of_block = scores.masked_fill(~past[:, :, :, None], -torch.inf).logsumexp(-1)
        share = (of_block - log_total).exp().clamp_max(LARGEST_SHARE)
        share = share.masked_fill(log_total.isneginf(), 0).mean(3)
    return y, share
