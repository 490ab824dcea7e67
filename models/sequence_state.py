"""What mixers keep while decoding, as layers of a Hugging Face `Cache`: a recurrent state or a window, whose
size does not grow with the text, or all keys and values.

Shape letters: B rows, S tokens read so far, T tokens of a call, M places of a window, D hidden width,
H heads, G key/value heads, N head size.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kernels.segments import PADDING, RESET, token_codes


class MixerCacheLayer(CacheLayerMixin):
    """What all of them share: rows that move together, and lengths counted as for full attention.

    Attributes:
        tensors: names of the attributes that hold something per row: tensors [B,...], or None before the
            first token.
        seen: tokens read so far, padding included (positions and masks are counted by it).
    """

    tensors: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets the text."""
        for name in self.tensors:
            setattr(self, name, None)
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate; part of the cache protocol."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Attention's keys and values never come here: only mixers use this layer."""
        raise TypeError("this cache layer belongs to a mixer, which calls `advance`")

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a mask covers, offset of the first): as for full attention, since layers share masks."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become those that a beam search has chosen."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        self._rows(lambda tensor: tensor[indices])

    def bytes_per_row(self) -> int:
        """Memory of one row."""
        held = self._held().values()
        return sum(tensor.numel() * tensor.element_size() // tensor.shape[0] for tensor in held)

    def _held(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.tensors if getattr(self, name) is not None}

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self._held().items():
            setattr(self, name, change(tensor))


class RecurrentCacheLayer(MixerCacheLayer):
    """One layer's recurrent state.

    Attributes:
        state: [B,H,N,N] float32 (key-major), or None before the first token.
        last_hidden: [B,D] the last token's mixer input, for token shift, or None.
        bank_state: [B,M,N,N] float32 of the layer's induction bank, or None.
        last_match: [B,M·N] the key that the bank stores the next token under, or None.
    """

    tensors = ("state", "last_hidden", "bank_state", "last_match")
    state: Tensor | None
    last_hidden: Tensor | None
    bank_state: Tensor | None
    last_match: Tensor | None

    def begin(self, continues: Tensor | None) -> None:
        """Forgets the text of the rows [B] that begin a new document with this call."""
        if continues is not None and self.state is not None:
            self._rows(lambda x: x * continues.to(x.dtype).view(-1, *[1] * (x.dim() - 1)))

    def advance(self, state: Tensor, last_hidden: Tensor | None, tokens: int) -> None:
        """Takes over the state after `tokens` more tokens."""
        self.state, self.last_hidden = state, last_hidden
        self.seen += tokens
        self.is_initialized = True


class Places(NamedTuple):
    """Where the tokens of a call stand in their documents.

    Attributes:
        documents: [B,T] int64: 0 in the document that the call goes on with, 1, 2, ... in those that begin
            later in the row, -1 on padding.
        positions: [B,T] int64: how many tokens of its document came before each; 0 on padding.
        seen: [B] int64: tokens of the last document, after the call.
    """

    documents: Tensor
    positions: Tensor
    seen: Tensor


def read_places(seen: Tensor, document_ids: Tensor | None, length: int) -> Places:
    """Counts the tokens of a call within their documents; padding counts for nothing.

    Args:
        seen: [B] int64, tokens of the document that the call goes on with.
        document_ids: [B,T] int32, -1 on padding, or None.
        length: T.
    """
    if document_ids is None:
        positions = seen[:, None] + torch.arange(length, device=seen.device)
        return Places(torch.zeros_like(positions), positions, seen + length)
    codes = token_codes(document_ids)
    real, resets = codes != PADDING, codes == RESET
    read = real.long().cumsum(1)
    # How many real tokens of the call came before the document; negative where it began before the call.
    origin = torch.where(resets, read - 1, -seen[:, None]).cummax(1).values
    documents = torch.where(real, resets.long().cumsum(1), -1)
    positions = torch.where(real, read - 1 - origin, 0)
    return Places(documents, positions, read[:, -1] - origin[:, -1])


class ChunkedTokens(NamedTuple):
    """All tokens of a text up to the end of a call.

    Attributes:
        keys, values: [B,S,G,N], 0 on padding.
        chunks: [B,S] int64, the number of each token's chunk in its row, -1 on padding. A document begins a
            chunk, and the last chunk of a document may be short; all others have the full length.
        first_chunks: [B,T] for the call's own tokens: the number of their document's first chunk.
        positions: [B,T] likewise: how many tokens of their document came before them.
    """

    keys: Tensor
    values: Tensor
    chunks: Tensor
    first_chunks: Tensor
    positions: Tensor


class TokenCacheLayer(MixerCacheLayer):
    """Keys and values of all tokens read so far, with the chunk that each belongs to; grows with the text.

    Attributes:
        keys, values, chunks: as in ChunkedTokens, or None before the first token.
        counts: [B,3] int64: tokens of the current document, chunks of the row, the document's first chunk.
    """

    tensors = ("keys", "values", "chunks", "counts")
    chunks: Tensor | None
    counts: Tensor | None

    def begin(self, continues: Tensor | None) -> None:
        """Ends the document of the rows [B] that begin a new one with this call."""
        if continues is not None and self.counts is not None:
            fresh = self.counts[:, [1]] * self.counts.new_tensor([0, 1, 1])
            self.counts = torch.where(continues[:, None], self.counts, fresh)

    def advance(
        self, keys: Tensor, values: Tensor, document_ids: Tensor | None, chunk_length: int
    ) -> ChunkedTokens:
        """Takes over the call's tokens and returns all.

        Args:
            keys, values: [B,T,G,N].
            document_ids: [B,T] int32, -1 on padding, or None.
            chunk_length: in real tokens of one document.
        """
        batch, length = keys.shape[:2]
        if self.counts is None:
            self.counts = torch.zeros(batch, 3, dtype=torch.int64, device=keys.device)
        places = read_places(self.counts[:, 0], document_ids, length)
        chunks, first, self.counts = _chunks(self.counts, places, chunk_length)
        padding = (chunks < 0)[..., None, None]
        new = keys.masked_fill(padding, 0), values.masked_fill(padding, 0), chunks
        old = (self.keys, self.values, self.chunks)
        self.keys, self.values, self.chunks = (
            fresh if held is None else torch.cat([held, fresh], dim=1)
            for held, fresh in zip(old, new, strict=True)
        )
        self.seen += length
        self.is_initialized = True
        return ChunkedTokens(self.keys, self.values, self.chunks, first, places.positions)


def _chunks(counts: Tensor, places: Places, chunk_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's chunk [B,T] (-1 on padding), its document's first chunk [B,T], and the counts [B,3] after
    the call; arguments as in TokenCacheLayer."""
    real = places.documents >= 0
    starts = real & (places.positions % chunk_length == 0)
    chunks = counts[:, 1:2] - 1 + starts.long().cumsum(1)
    begins = real & (places.positions == 0)
    first = torch.where(begins, chunks, counts[:, 2:]).cummax(1).values
    after = torch.stack([places.seen, chunks[:, -1] + 1, first[:, -1]], dim=1)
    return torch.where(real, chunks, -1), first, after


class WindowCacheLayer(MixerCacheLayer):
    """Keys and values of the current document's first tokens and of its last ones, in places that are made
    once: a token takes the place of the one that the window has left behind.

    Attributes:
        keys, values: [B,M,G,N], M = sinks + window: the token at position p < sinks stands in place p, later
            ones in place sinks + (p - sinks) mod window; 0 where no token stands.
        positions: [B,M] int64, of the token in its document; -1 where none stands.
        count: [B] int64, tokens of the current document.
    """

    tensors = ("keys", "values", "positions", "count")
    positions: Tensor | None
    count: Tensor | None

    def begin(self, continues: Tensor | None) -> None:
        """Forgets the text of the rows [B] that begin a new document with this call."""
        if continues is not None and self.count is not None:
            self.positions = self.positions.masked_fill(~continues[:, None], -1)
            self.count = self.count * continues

    def make(self, keys: Tensor, values: Tensor, size: int) -> None:
        """Makes the places at first use.

        Args:
            keys, values: [B,T,G,N], of the first call.
            size: M.
        """
        if self.count is None:
            rows = keys.shape[0]
            self.keys, self.values = (x.new_zeros(rows, size, *x.shape[2:]) for x in (keys, values))
            self.positions = torch.full((rows, size), -1, dtype=torch.int64, device=keys.device)
            self.count = torch.zeros(rows, dtype=torch.int64, device=keys.device)

    def advance(self, keys: Tensor, values: Tensor, places: Places, sinks: int) -> None:
        """Puts the call's tokens in their places.

        Args:
            keys, values: [B,T,G,N], all padding behind the real tokens.
            places: of these tokens.
            sinks: first tokens of a document that stay.
        """
        length, place = keys.shape[1], torch.arange(self.positions.shape[1], device=keys.device)
        last = places.seen[:, None] - 1  # position of the document's last token
        # The position that each place holds now: its own, or the latest that the window has put there.
        recent = last - (last - place) % (len(place) - sinks)
        stands = torch.where(place < sinks, place <= last, recent >= sinks)
        positions = torch.where(stands, torch.where(place < sinks, place, recent), -1)
        goes_on = places.documents.amax(1, keepdim=True) < 1
        new = positions >= self.count[:, None] * goes_on
        real = (places.documents >= 0).sum(1, keepdim=True)
        source = (real - 1 - last + positions).clamp(0, length - 1)[..., None, None]
        for name, fresh in (("keys", keys), ("values", values)):
            chosen = fresh.gather(1, source.expand(-1, -1, *fresh.shape[2:]))
            setattr(self, name, torch.where(new[..., None, None], chosen, getattr(self, name)))
        self.positions, self.count = positions, places.seen
        self._count_call(length)

    def put(self, keys: Tensor, values: Tensor, places: Places, sinks: int) -> None:
        """`advance` by one token [B,1,G,N], in place."""
        position, real = places.positions[:, 0], places.documents[:, 0] >= 0
        window = self.positions.shape[1] - sinks
        place = torch.where(position < sinks, position, sinks + (position - sinks) % window)
        rows = torch.arange(len(place), device=place.device)
        for held, fresh in ((self.keys, keys), (self.values, values)):
            held[rows, place] = torch.where(real[:, None, None], fresh[:, 0], held[rows, place])
        self.positions[rows, place] = torch.where(real, position, self.positions[rows, place])
        self.count = places.seen
        self._count_call(1)

    def _count_call(self, tokens: int) -> None:
        self.seen += tokens
        self.is_initialized = True


def writable(held: Tensor) -> bool:
    """Whether what a cache holds may be changed in place here: one made in inference mode may not outside of
    it."""
    return torch.is_inference_mode_enabled() or not held.is_inference()


Layer = TypeVar("Layer", bound=MixerCacheLayer)


def recurrent_layer(cache: Cache, index: int) -> RecurrentCacheLayer:
    """The recurrent layer at a place of a cache; whatever stands there unused is replaced at first use."""
    return own_layer(cache, index, RecurrentCacheLayer)


def token_layer(cache: Cache, index: int) -> TokenCacheLayer:
    """The layer of chunked keys and values at a place of a cache; as `recurrent_layer`."""
    return own_layer(cache, index, TokenCacheLayer)


def window_layer(cache: Cache, index: int) -> WindowCacheLayer:
    """The window at a place of a cache; as `recurrent_layer`."""
    return own_layer(cache, index, WindowCacheLayer)


def own_layer(cache: Cache, index: int, kind: type[Layer], *arguments: object) -> Layer:
    """The layer of a kind, made from `arguments`, at a place of a cache; one of another kind that stands
    there unused is replaced.

    Raises:
        ValueError: where one of another kind is in use.
    """
    while len(cache.layers) <= index:
        cache.layers.append(kind(*arguments))
    layer = cache.layers[index]
    if not isinstance(layer, kind):
        if layer.get_seq_length():
            raise ValueError(
                f"cache layer {index} already holds keys of another model; use a new cache per text"
            )
        cache.layers[index] = layer = kind(*arguments)
    return layer


def cache_bytes_per_row(cache: Cache) -> int:
    """Memory that one row of a cache holds, over all layers: states, or keys and values."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            total += layer.bytes_per_row()
        elif isinstance(layer.keys, torch.Tensor) and layer.keys.numel():
            total += sum(x.numel() * x.element_size() // x.shape[0] for x in (layer.keys, layer.values))
    return total
