"""Lists of blocks turned round for kernels that work block by block, with sorts on the device: the host waits
for nothing.

Shape letters: B rows, T tokens, J lists of a token, K entries of a list, M blocks; L entries of a tile.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Walks(NamedTuple):
    """The blocks that tiles of SPAN tokens list, each once, in rising order, and who lists them.

    Attributes:
        order: [B,tiles,J,L] int32 or int64, the entries of a tile's tokens, L = SPAN * K, sorted: with m the
            block, t the token in its tile and c the column in its list, (m * SPAN + t) * 2 K + 2 c, and 1
            more where m is only watched. What nobody has to visit comes last, as M * SPAN * 2 K.
        begins: [B,tiles,J,L] int32, where each block begins in `order`; behind the last block, where it ends.
        counts: [B,tiles,J] int32, how many blocks there are.
    """

    order: Tensor
    begins: Tensor
    counts: Tensor


def walks(blocks: Tensor, starts: Tensor, positions: Tensor, span: int, also_watched: bool) -> Walks:
    """The walks of tiles of `span` tokens, the last one filled up.

    Args:
        blocks: [B,T,J,K] int32.
        starts: [B,M] int32.
        positions: [B,T] int32.
        span: tokens of a tile.
        also_watched: visit blocks that are only watched too.
    """
    batch, tokens, lists, listed = blocks.shape
    count, device = starts.shape[1], blocks.device
    last = count * span * 2 * listed
    named = torch.where(blocks >= 0, blocks, -2 - blocks) if also_watched else blocks
    wanted = _seen(named, starts, positions)
    token = torch.arange(tokens, device=device) % span
    slot = 2 * (token[:, None, None] * listed + torch.arange(listed, device=device))
    keys = named.to(_narrow(last)) * (span * 2 * listed) + slot.to(_narrow(last)) + (blocks < 0)
    keys = F.pad(keys.masked_fill(~wanted, last), (0, 0, 0, 0, 0, -tokens % span), value=last)
    order = keys.unflatten(1, (-1, span)).transpose(2, 3).flatten(3).sort(-1).values
    at = order // (span * 2 * listed)
    fresh = at < count
    fresh[..., 1:] &= at[..., 1:] != at[..., :-1]
    end = (at < count).sum(-1, keepdim=True, dtype=torch.int32)
    place = torch.arange(order.shape[-1], dtype=torch.int32, device=device)
    begins = torch.where(fresh, place, end).sort(-1).values
    return Walks(order, begins, fresh.sum(-1, dtype=torch.int32))


class Readers(NamedTuple):
    """Who attends to each block.

    Attributes:
        order: [units,J,T*K] int32 or int64, m * T + t for each block m that token t attends to and sees,
            sorted; what is none comes last.
        begins: [units,J,M+1] int32, where each block begins in `order`, and where the last one ends.
    """

    order: Tensor
    begins: Tensor


def readers(blocks: Tensor, starts: Tensor, positions: Tensor) -> Readers:
    """The tokens that attend to each block.

    Args:
        blocks: [units,T,J,K] int32.
        starts: [units,M] int32.
        positions: [units,T] int32.
    """
    tokens, count, device = blocks.shape[1], starts.shape[1], blocks.device
    kind = _narrow(count * tokens)
    keys = blocks.to(kind) * tokens + torch.arange(tokens, dtype=kind, device=device)[:, None, None]
    keys = keys.masked_fill(~_seen(blocks, starts, positions), count * tokens)
    order = keys.transpose(1, 2).flatten(2).sort(-1).values
    firsts = torch.arange(count + 1, dtype=kind, device=device) * tokens
    begins = torch.searchsorted(order, firsts.expand(*order.shape[:2], -1).contiguous(), out_int32=True)
    return Readers(order, begins)


def _seen(named: Tensor, starts: Tensor, positions: Tensor) -> Tensor:
    """[B,T,J,K] bool: which entries name a block of which the token sees a key."""
    first = starts.gather(1, named.clamp_min(0).flatten(1).long()).view_as(named)
    return (named >= 0) & (first <= positions[:, :, None, None])


def _narrow(largest: int) -> torch.dtype:
    """The smaller integer type that holds a number: sorting it is faster."""
    return torch.int32 if largest < 2**31 else torch.int64
