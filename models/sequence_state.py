"""Decoding state of a recurrent layer, as a layer of a Hugging Face `Cache`; its size does not grow with the
text.

Shape letters: B rows, D hidden width, H heads, N head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class RecurrentCacheLayer(CacheLayerMixin):
    """One layer's recurrent state.

    Attributes:
        state: [B,H,N,N] float32 (key-major), or None before the first token.
        last_hidden: [B,D] the last token's mixer input, for token shift, or None.
        seen: tokens read so far, padding included (positions and masks are counted by it).
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets the text."""
        self.state: Tensor | None = None
        self.last_hidden: Tensor | None = None
        self.seen = 0

    def begin(self, continues: Tensor | None) -> None:
        """Forgets the text of the rows [B] that begin a new document with this call."""
        if continues is not None and self.state is not None:
            keep = continues.to(self.state.dtype)
            self.state = self.state * keep[:, None, None, None]
            if self.last_hidden is not None:
                self.last_hidden = self.last_hidden * keep[:, None].to(self.last_hidden.dtype)

    def advance(self, state: Tensor, last_hidden: Tensor | None, tokens: int) -> None:
        """Takes over the state after `tokens` more tokens."""
        self.state, self.last_hidden = state, last_hidden
        self.seen += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate; part of the cache protocol."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values never come here: only mixers use this layer."""
        raise TypeError("a recurrent cache layer holds no keys and values; its mixer calls `advance`")

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
        """Memory of one row's state."""
        tensors = [tensor for tensor in (self.state, self.last_hidden) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() // tensor.shape[0] for tensor in tensors)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = None if self.state is None else change(self.state)
        self.last_hidden = None if self.last_hidden is None else change(self.last_hidden)


def recurrent_layer(cache: Cache, index: int) -> RecurrentCacheLayer:
    """The recurrent layer at a place of a cache; whatever stands there unused is replaced at first use."""
    while len(cache.layers) <= index:
        cache.layers.append(RecurrentCacheLayer())
    layer = cache.layers[index]
    if not isinstance(layer, RecurrentCacheLayer):
        if layer.get_seq_length():
            raise ValueError(
                f"cache layer {index} already holds keys of another model; use a new cache per text"
            )
        cache.layers[index] = layer = RecurrentCacheLayer()
    return layer


def cache_bytes_per_row(cache: Cache) -> int:
    """Memory that one row of a cache holds, over all layers: states, or keys and values."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, RecurrentCacheLayer):
            total += layer.bytes_per_row()
        elif isinstance(layer.keys, torch.Tensor) and layer.keys.numel():
            total += sum(x.numel() * x.element_size() // x.shape[0] for x in (layer.keys, layer.values))
    return total
