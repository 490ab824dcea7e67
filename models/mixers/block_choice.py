"""Which blocks a token sees, and how its index learns to choose them.

Shape letters: B rows, Q queries, M blocks of C tokens and P parts, J lists of a query, K entries of a list, F
index heads, W index width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.arguments import without_autocast
from kernels.sparse_attention import NONE, watched
from models import ranks
from models.block_pool import Blocks
from models.mixers.base import wide

PRODUCTS = 1 << 24  # of index vectors that exist at one time


@dataclass(frozen=True)
class Sight:
    """What a token sees of its document beside its own block up to itself.

    Args:
        sinks: the first so many blocks.
        near: the last so many before its own.
        best: so many of the other complete ones, those of highest score; None sees them all.
        tried: so many more, drawn at random, whose share of attention is measured without being attended to.
    """

    sinks: int
    near: int
    best: int | None
    tried: int = 0


class Choice(NamedTuple):
    """Blocks of some queries, and what their index says of them where it was asked.

    Attributes:
        listed: [B,Q,J,K] int32, as kernels.sparse_attention reads it.
        scores: [B,Q,J,K] float32 of each entry, or None.
    """

    listed: Tensor
    scores: Tensor | None


@torch.no_grad()
def choose(
    asks: Tensor, blocks: Blocks, documents: Tensor, positions: Tensor, sight: Sight, scored: bool
) -> Choice:
    """The blocks that each query sees; no gradient runs through the choice.

    A block's score is log Σ exp of the products of the query's index vector with those of its parts: with
    attention's own queries and keys, the logarithm of the block's weight in the softmax.

    Args:
        asks: [B,Q,J,W] index vectors of the queries; F divides J.
        blocks: that there are.
        documents, positions: [B,Q], of the queries; a document of -1 sees nothing.
        sight: what is seen.
        scored: whether scores are wanted also where everything is seen.
    """
    count, length = blocks.starts.shape[1], blocks.keys.shape[2]
    number, own = (blocks.starts // length)[:, None], (positions // length)[..., None]
    same = (blocks.documents[:, None] == documents[..., None]) & (documents >= 0)[..., None]
    past = same & (number < own)
    always = same & (number <= own) & ((number < sight.sinks) | (number >= own - sight.near))
    lists, most = asks.shape[2], sight.sinks + sight.near + 1 + (sight.best or 0)
    everything = sight.best is None or count - 1 <= most  # the last place is never seen
    scores = _scores(asks, blocks) if scored or not everything else None
    if everything:
        place = torch.arange(count, dtype=torch.int32, device=asks.device)
        listed = torch.where(past | always, place, NONE)[:, :, None].expand(-1, -1, lists, -1)
        return Choice(listed, scores)
    past, always = past[:, :, None], always[:, :, None]
    ranked = scores.masked_fill(~past, -torch.inf).masked_fill(always, torch.inf)
    best = ranked.topk(most, dim=-1)
    listed = torch.where(best.values > -torch.inf, best.indices, NONE).int()
    if sight.tried:
        rest = past.expand_as(ranked).scatter(-1, best.indices, False)
        listed = torch.cat([listed, watched(_drawn(rest, positions, sight.tried))], dim=-1)
    return Choice(listed, scores.gather(-1, _named(listed).clamp_min(0)) if scored else None)


def _scores(asks: Tensor, blocks: Blocks) -> Tensor:
    """[B,Q,J,M] float32."""
    heads = blocks.index.shape[3]
    products = _products(_by_heads(asks, heads), _index_keys(blocks.index)).unflatten(
        -1, blocks.index.shape[1:3]
    )
    scores = products.squeeze(-1) if products.shape[-1] == 1 else products.logsumexp(-1)
    return _by_tokens(scores, asks.shape[1])


def _index_keys(index: Tensor) -> Tensor:
    """[B,M,P,F,W] -> [B,F,M·P,W] in float32."""
    return wide(index).flatten(1, 2).transpose(1, 2)


def _by_heads(lists: Tensor, heads: int) -> Tensor:
    """[B,Q,J,x] -> [B,F,Q·J/F,x] in float32."""
    return wide(lists).unflatten(2, (heads, -1)).transpose(1, 2).flatten(2, 3)


def _by_tokens(by_heads: Tensor, tokens: int) -> Tensor:
    """The reverse."""
    return by_heads.unflatten(2, (tokens, -1)).transpose(1, 2).flatten(2, 3)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """[B,F,x,W], [B,F,M·P,W] -> [B,F,x,M·P], in float32 whatever autocast says."""
    with without_autocast(queries.device.type):
        return queries @ keys.to(queries.dtype).transpose(-1, -2)


def _drawn(candidates: Tensor, positions: Tensor, count: int) -> Tensor:
    """[B,Q,J,count] int32, some of the candidates [B,Q,J,M] as they come: the same for the same token."""
    blocks = torch.arange(candidates.shape[-1], device=candidates.device)
    lists = torch.arange(candidates.shape[2], device=candidates.device)[:, None]
    mixed = (positions[..., None, None] * 40503 + blocks * 2654435761 + lists * 97531) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32 + 1
    drawn = torch.where(candidates, mixed, 0).topk(min(count, candidates.shape[-1]), dim=-1)
    return torch.where(drawn.values > 0, drawn.indices, NONE).int()


def _named(listed: Tensor) -> Tensor:
    """The blocks of a list, attended or only watched; -1 for none."""
    return torch.where(listed >= 0, listed, -2 - listed).long()


def index_loss(asks: Tensor, blocks: Blocks, choice: Choice, share: Tensor, positions: Tensor) -> Tensor:
    """How far the index is from attention: KL(true share of each complete block ‖ softmax of the scores),
    over the complete blocks that are listed; the mean over queries and lists with more than one of them, in
    nats. With several processes each returns its share, so that their mean is the mean over all queries.

    Its gradient is the difference of the two distributions. It reaches the index alone.

    Args:
        asks: [B,T,J,W] index vectors of the queries.
        blocks: with the index keys.
        choice: of these queries, with scores.
        share: [B,T,J,K] of attention, as kernels.sparse_attention returns it.
        positions: [B,T].
    """
    with torch.no_grad():
        place, length = _named(choice.listed), blocks.keys.shape[2]
        number = (blocks.starts // length)[:, None, None].expand(*place.shape[:3], -1)
        number = number.gather(-1, place.clamp_min(0))
        taken = (place >= 0) & (number < (positions // length)[..., None, None])
        target = share.float().masked_fill(~taken, 0)
        total = target.sum(-1, keepdim=True)
        counts = (taken.sum(-1, keepdim=True) > 1) & (total > 0)
        target = target / total.clamp_min(torch.finfo(target.dtype).tiny)
        logs = choice.scores.masked_fill(~taken, -torch.inf).masked_fill(~counts, 0).log_softmax(-1)
        logs = logs.masked_fill(~taken, 0)
        number = ranks.mean(counts.sum().float()).clamp_min(1)
        loss = (torch.special.xlogy(target, target) - target * logs).masked_fill(~counts, 0).sum() / number
        slopes = (logs.exp().masked_fill(~taken, 0) - target).masked_fill(~counts, 0) / number
    return _WithSlopes.apply(asks, blocks.index, place, slopes, loss)


class _WithSlopes(torch.autograd.Function):
    """A loss whose slopes with regard to some scores are known."""

    @staticmethod
    def forward(ctx, asks: Tensor, index: Tensor, place: Tensor, slopes: Tensor, loss: Tensor) -> Tensor:
        """asks [B,T,J,W], index [B,M,P,F,W]; place (a block, or -1) and slopes [B,T,J,K]; a scalar."""
        ctx.save_for_backward(asks, index, place, slopes)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The products are made again, some queries at a time: a score's slope falls on the parts of its
        block by their softmax."""
        asks, index, place, slopes = ctx.saved_tensors
        keys, heads, blocks = _index_keys(index), index.shape[3], index.shape[1]
        of_asks, of_keys = torch.empty_like(asks), torch.zeros_like(keys)
        for some in some_tokens(asks, index):
            queries = _by_heads(asks[:, some], heads)
            of_blocks = slopes.new_zeros(*slopes[:, some].shape[:3], blocks)
            of_blocks.scatter_add_(-1, place[:, some].clamp_min(0), slopes[:, some] * upstream)
            of_parts = _products(queries, keys).unflatten(-1, index.shape[1:3]).softmax(-1)
            of_parts = (of_parts * _by_heads(of_blocks, heads)[..., None]).flatten(-2)
            with without_autocast(asks.device.type):
                of_asks[:, some] = _by_tokens(of_parts @ keys, queries.shape[2] * heads // asks.shape[2])
                of_keys += of_parts.transpose(-1, -2) @ queries
        of_index = of_keys.transpose(1, 2).unflatten(1, index.shape[1:3]).to(index.dtype)
        return of_asks, of_index, None, None, None


def some_tokens(asks: Tensor, index: Tensor) -> Iterator[slice]:
    """Queries whose products may exist at one time.

    Args:
        asks: [B,T,J,W].
        index: [B,M,P,F,W].
    """
    per_token = asks.shape[0] * asks.shape[2] * index.shape[1] * index.shape[2]
    step = max(1, PRODUCTS // per_token)
    for start in range(0, asks.shape[1], step):
        yield slice(start, start + step)
