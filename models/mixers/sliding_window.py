"""Softmax attention over a window of the last tokens and the first ones of a document (StreamingLLM, arXiv
2309.17453).

Shape letters: B rows, S keys, T tokens of a call, D hidden width, H heads, G key/value heads, N head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from models.backbone import SequenceContext
from models.mixers.heads import GATES, check_choice
from models.mixers.softmax import QUERY_BLOCK, SoftmaxMixer, in_query_blocks
from models.sequence_state import Places, WindowCacheLayer, read_places, window_layer, writable

NOWHERE = -2  # document of a key that no query sees; padding has -1


@dataclass(frozen=True, kw_only=True)
class SlidingWindowOptions:
    """What a token may see.

    Args:
        window: last tokens of its document, itself among them.
        sinks: first tokens of its document.
        rope: rotate queries and keys as the teacher does, by their positions in the document.
        gate: `none`, `low` rank, `full` rank or `silu`; multiplies the heads' outputs, starts at exactly 1.
    """

    window: int = 1024
    sinks: int = 4
    rope: bool = True
    gate: str = "none"

    def __post_init__(self) -> None:
        check_choice("student.mixers.sliding_window.gate", self.gate, GATES)
        for key, least in (("window", 1), ("sinks", 0)):
            if getattr(self, key) < least:
                raise ValueError(
                    f"student.mixers.sliding_window.{key}={getattr(self, key)} must be at least {least}."
                )


class SlidingWindowMixer(SoftmaxMixer):
    """Maps hidden states [B,T,D] to [B,T,D]. Time is linear in T; the decoding memory is made once and holds
    `window` + `sinks` keys and values, rotated at their positions. A document that is not longer than that
    is seen whole."""

    name = "sliding_window"
    options_class = SlidingWindowOptions

    def mix(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        context: SequenceContext,
    ) -> Tensor:
        """As `Mixer.mix`."""
        query, key, value = self.project(hidden, positions)
        memory, ids = WindowCacheLayer(), context.document_ids
        if cache is not None:
            memory = window_layer(cache, self.layer_index)
            memory.make(key, value, self.options.window + self.options.sinks)
            memory.begin(context.continues)
        seen = torch.zeros(len(key), dtype=torch.int64, device=key.device) if cache is None else memory.count
        places = read_places(seen, ids, key.shape[1])
        one_token = cache is not None and key.shape[1] == 1 and not torch.is_grad_enabled()
        if one_token and writable(memory.keys):
            memory.put(key, value, places, self.options.sinks)
            return self.finish(self._read(query, memory), hidden)
        if ids is None:
            mixed = self._attend(query, key, value, places, memory)
        else:  # with all padding behind, neighbours in a document are neighbours in the row
            order = (places.documents < 0).to(torch.int8).argsort(dim=1, stable=True)
            places = Places(*(x.gather(1, order) for x in places[:2]), places.seen)
            query, key, value = (_reordered(x, order) for x in (query, key, value))
            padding = (places.documents < 0)[..., None, None]
            key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
            mixed = _reordered(self._attend(query, key, value, places, memory), order.argsort(dim=1))
        if cache is not None:
            memory.advance(key, value, places, self.options.sinks)
        return self.finish(mixed, hidden)

    def _read(self, query: Tensor, memory: WindowCacheLayer) -> Tensor:
        """[B,1,H,N] -> [B,1,H,N]: a token sees what the memory holds; padding before any sees zeros."""
        stands = memory.positions >= 0
        visible = stands | ~stands.any(1, keepdim=True)
        return self.attend(query, memory.keys, memory.values, visible[:, None, None])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, places: Places, memory: WindowCacheLayer
    ) -> Tensor:
        """[B,T,H,N] queries of a call -> [B,T,H,N].

        A block of queries looks at the tokens of the call that are in reach, at the first tokens of the
        document that its first query belongs to, and at what the memory holds of earlier calls.
        """
        held = []  # as it is now: a backward pass computes blocks again when the memory has gone on
        if memory.seen:
            documents = torch.where(memory.positions >= 0, 0, NOWHERE)
            held = [(memory.keys, memory.values, documents, memory.positions)]

        def block(start: int, stop: int) -> Tensor:
            near = max(0, start - self.options.window + 1)
            spans = [(key[:, near:stop], value[:, near:stop], *(x[:, near:stop] for x in places[:2])), *held]
            if near and self.options.sinks:
                spans.append(self._sinks(key, value, places, start, near))
            keys, values, documents, positions = (torch.cat(parts, 1) for parts in zip(*spans, strict=True))
            own, at = (x[:, start:stop, None] for x in places[:2])
            distance = at - positions[:, None]
            reach = (distance < self.options.window) | (positions[:, None] < self.options.sinks)
            visible = (documents[:, None] == own) & (distance >= 0) & reach
            return self.attend(query[:, start:stop], keys, values, visible[:, None])

        return in_query_blocks(block, query.shape[1], QUERY_BLOCK)

    def _sinks(
        self, key: Tensor, value: Tensor, places: Places, start: int, near: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, documents and positions of the first tokens of query `start`'s document, those that
        stand before token `near` of the call."""
        position = torch.arange(self.options.sinks, device=key.device).expand(len(key), -1)
        index = start - places.positions[:, start, None] + position
        stands = (index >= 0) & (index < near)
        document = torch.where(stands, places.documents[:, start, None], NOWHERE)
        index = index.clamp(0, near - 1)
        return _reordered(key, index), _reordered(value, index), document, position


def _reordered(heads: Tensor, index: Tensor) -> Tensor:
    """[B,T,heads,N] at the places [B,S] -> [B,S,heads,N]."""
    return heads.gather(1, index[..., None, None].expand(-1, -1, *heads.shape[2:]))
