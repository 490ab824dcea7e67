"""Keys and values in blocks of one document each, in places that are made once: what sparse attention reads,
in training and while decoding.

Shape letters: B rows, T tokens of a call, M places for blocks, C tokens of a block, G key/value heads, N head
size, P parts of a block that the index tells apart, F index heads, W index width, J lists of a token, K
entries of a list.
"""

import bisect
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from kernels.sparse_attention import PoolTensors
from models.sequence_state import MixerCacheLayer, Places, own_layer, writable

EMPTY = 1 << 30  # where a block starts that is not there: behind every token
KEPT = 8  # newest blocks that are never evicted
FIRST = 1  # blocks of a document that are never evicted
HALF_LIVES = 8  # that a pool's tokens live through until all of them have been replaced


class Blocks(NamedTuple):
    """Blocks that tokens may see.

    Attributes:
        keys, values: [B,M,C,G,N].
        index: [B,M,P,F,W], the mean index key of each part of a block; while a part fills, tokens that are
            missing count as zeros.
        starts: [B,M] int32, position in its document of a block's first token; EMPTY where no block is.
        documents: [B,M] int64, a number for each document; -1 where no block is.
    """

    keys: Tensor
    values: Tensor
    index: Tensor
    starts: Tensor
    documents: Tensor


class BlockPool(MixerCacheLayer):
    """Places for M blocks, the last of which takes what nobody is to see, such as padding.

    A block is filled token by token. When all places are taken, the one block of the current document goes to
    which least attention has been paid, older attention counting less; blocks of documents that have ended go
    first, the document's first blocks and its newest never.

    Attributes:
        keys, values, index, starts, documents: as in `Blocks`.
        attention: [B,M] float32, decayed sum of the shares of attention that a block has received.
        counts: [B,3] int64: tokens of the current document, its number, the place that is being filled.
        last_hidden: [B,D] the last token's mixer input, for token shift, or None.
        kept, first: how many newest and first blocks are never evicted.
    """

    tensors = ("keys", "values", "index", "starts", "documents", "attention", "counts", "last_hidden")
    keys: Tensor | None
    values: Tensor | None
    index: Tensor | None
    starts: Tensor | None
    documents: Tensor | None
    attention: Tensor | None
    counts: Tensor | None
    last_hidden: Tensor | None

    def __init__(self, kept: int = KEPT, first: int = FIRST) -> None:
        super().__init__()
        self.kept, self.first = kept, first

    @property
    def blocks(self) -> Blocks:
        """What it holds."""
        return Blocks(self.keys, self.values, self.index, self.starts, self.documents)

    @property
    def held(self) -> PoolTensors:
        """The tensors that one token of each row changes."""
        return PoolTensors(*self.blocks, self.attention, self.counts)

    def make(
        self,
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        places: int,
        length: int,
        parts: int,
        index_dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the places at first use.

        Args:
            keys, values: [B,T,G,N], of the first call.
            index: [B,T,F,W] index keys, of the first call.
            places: M.
            length: C.
            parts: P.
            index_dtype: of the index keys that are held; None means that of `index`.
        """
        if self.counts is not None:
            return
        rows, device = keys.shape[0], keys.device
        self.keys, self.values = (x.new_zeros(rows, places, length, *x.shape[2:]) for x in (keys, values))
        self.index = index.new_zeros(rows, places, parts, *index.shape[2:], dtype=index_dtype)
        self.starts = torch.full((rows, places), EMPTY, dtype=torch.int32, device=device)
        self.documents = torch.full((rows, places), -1, dtype=torch.int64, device=device)
        self.attention = torch.zeros(rows, places, device=device)
        self.counts = torch.tensor([0, 0, places - 1], device=device).repeat(rows, 1)

    def begin(self, continues: Tensor | None) -> None:
        """Ends the document of the rows [B] that begin a new one with this call."""
        if continues is not None and self.counts is not None:
            fresh = self.counts * self.counts.new_tensor([0, 1, 1]) + self.counts.new_tensor([0, 1, 0])
            self.counts = torch.where(continues[:, None], self.counts, fresh)
        if continues is not None and self.last_hidden is not None:
            self.last_hidden = self.last_hidden * continues[:, None].to(self.last_hidden.dtype)

    def advance(self, keys: Tensor, values: Tensor, index: Tensor, places: Places) -> Blocks:
        """Takes over tokens, evicting what they have no room beside.

        Args:
            keys, values: [B,T,G,N].
            index: [B,T,F,W].
            places: of these tokens; `documents` are numbered as the pool numbers them (`numbered`).
        """
        length, bin_ = self.keys.shape[2], self.keys.shape[1] - 1
        real = places.documents >= 0
        opens = real & (places.positions % length == 0)
        number = opens.long().cumsum(1)
        opened = number[:, -1:]
        most = min(keys.shape[1], bin_)  # a bound that needs no look at the device
        new = self._least_wanted(most)
        new = torch.where(torch.arange(most, device=new.device) < opened, new, bin_)
        table = torch.cat([self.counts[:, 2:], new], dim=1)
        place = torch.where(real, table.gather(1, number), bin_)
        self._open(new, torch.where(opens, place, bin_), places)
        offset, part = places.positions % length, length // self.index.shape[2]
        self.keys = self._put(self.keys, (place, offset), keys)
        self.values = self._put(self.values, (place, offset), values)
        self.index = self._put(self.index, (place, offset // part), index / part, accumulate=part > 1)
        document = torch.where(real, places.documents, self.counts[:, 1:2]).amax(1, keepdim=True)
        self.counts = torch.cat([places.seen[:, None], document, table.gather(1, opened)], dim=1)
        self.seen += keys.shape[1]
        self.is_initialized = True
        return self.blocks

    def numbered(self, places: Places) -> Places:
        """The places of a call, whose documents are numbered from 0, with the pool's numbers."""
        documents = torch.where(places.documents < 0, -1, places.documents + self.counts[:, 1:2])
        return Places(documents, places.positions, places.seen)

    def rounds(self, places: Places) -> list[tuple[int, int]]:
        """First and last (exclusive) tokens of the parts of a call to `advance` by, one after the other: as
        much as there is room for at first, then a few blocks at a time, so that eviction follows attention.
        """
        tokens = places.positions.shape[1]
        if tokens == 1:
            return [(0, 1)]
        free = int((self.documents < 0).sum(1).min()) - 1
        step = min(KEPT, self.keys.shape[1] - 1 - self.kept - self.first)
        opens = (places.documents >= 0) & (places.positions % self.keys.shape[2] == 0)
        opened = opens.any(0).long().cumsum(0).tolist()
        found, start = [], 0
        room = max(free, step)
        while start < tokens:
            before = opened[start - 1] if start else 0
            stop = bisect.bisect_right(opened, before + room, lo=start)
            found.append((start, stop))
            start, room = stop, step
        return found

    @torch.no_grad()
    def attend(self, listed: Tensor, share: Tensor, real: Tensor) -> None:
        """Remembers which blocks the last tokens attended to.

        Args:
            listed: [B,T,J,K] int32 blocks, -1 for none.
            share: [B,T,J,K] of each token's attention.
            real: [B,T] bool, not padding.
        """
        capacity = self.keys.shape[1] * self.keys.shape[2]
        decay = 2.0 ** (-HALF_LIVES / capacity)
        age = real.flip(1).long().cumsum(1).flip(1) - real.long()  # real tokens that come after each
        factor = torch.where(real, decay**age, 0.0)[:, :, None, None] / listed.shape[2]
        place = torch.where(listed < 0, self.keys.shape[1] - 1, listed).flatten(1).long()
        kept = self.attention * decay ** real.sum(1, keepdim=True)
        self.attention = kept.scatter_add(1, place, (share.float() * factor).flatten(1))

    def _least_wanted(self, count: int) -> Tensor:
        """[B,count] places to be filled next: empty ones, then ended documents, then by attention."""
        number = self.starts // self.keys.shape[2]
        current = (self.documents == self.counts[:, 1:2]) & (self.documents >= 0)
        newest = torch.where(current, number, -1).amax(1, keepdim=True)
        wanted = torch.where(current, self.attention, -1.0).masked_fill(self.documents < 0, -2.0)
        needed = current & ((number < self.first) | (number > newest - self.kept))
        wanted = wanted.masked_fill(needed, torch.inf)
        wanted[:, -1] = torch.inf
        if count == 1:
            return wanted.argmin(1, keepdim=True)
        return wanted.sort(dim=1, stable=True).indices[:, :count]

    def _open(self, new: Tensor, place: Tensor, places: Places) -> None:
        """Begins blocks.

        Args:
            new: [B,n] places that get another block; the last place where fewer do.
            place: [B,T] the place that a token begins, else the last place.
            places: of the tokens.
        """
        rows = torch.arange(len(new), device=new.device)[:, None]
        starts = self.starts.scatter(1, place, places.positions.int())
        documents = self.documents.scatter(1, place, places.documents)
        starts[:, -1], documents[:, -1] = EMPTY, -1
        self.starts, self.documents = starts, documents
        self.attention = self.attention.scatter(1, new, 0.0)
        if self.seen:
            self.index = self._put(self.index, (new,), self.index.new_zeros(()), rows=rows)

    def _put(
        self,
        held: Tensor,
        place: tuple[Tensor, ...],
        fresh: Tensor,
        accumulate: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`held` with `fresh` at [row, *place]; in place unless somebody differentiates."""
        rows = torch.arange(len(held), device=held.device)[:, None] if rows is None else rows
        fresh = fresh.to(held.dtype)
        if torch.is_grad_enabled() or not writable(held):
            return held.index_put((rows, *place), fresh, accumulate)
        return held.index_put_((rows, *place), fresh, accumulate)


def block_pool(cache: Cache, index: int, kept: int, first: int) -> BlockPool:
    """The pool at a place of a cache; whatever stands there unused is replaced at first use."""
    return own_layer(cache, index, BlockPool, kept, first)


def places_needed(places: Places, tokens: int, length: int, single: bool) -> int:
    """M, so that nothing is evicted from a fresh pool.

    Args:
        places: of all tokens of a call.
        tokens: T.
        length: C.
        single: whether each row is one document without padding.
    """
    if single:
        return -(-tokens // length) + 1
    opens = (places.documents >= 0) & (places.positions % length == 0)
    return int(opens.sum(1).max()) + 1
