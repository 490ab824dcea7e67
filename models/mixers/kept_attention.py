"""The teacher's softmax attention, kept but changed: without rotary positions, with an output gate, with
queries that grow with their position.

So kept, attention serves longer texts than the teacher has seen beside RNN layers that know positions (HALO,
arXiv 2601.22156).

Shape letters: B rows, S tokens read so far, T tokens of a call, D hidden width, H heads, N head size.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from models.backbone import SequenceContext
from models.mixers.heads import GATES, check_choice, position_scale
from models.mixers.softmax import QUERY_BLOCK, SoftmaxMixer, in_query_blocks
from models.sequence_state import ChunkedTokens, TokenCacheLayer, token_layer

WHOLE_DOCUMENT = sys.maxsize  # tokens of a chunk: a document is one


@dataclass(frozen=True, kw_only=True)
class KeptAttentionOptions:
    """What becomes of the teacher's attention in the layers that keep it; with the defaults nothing does, and
    the teacher's own module stays.

    Args:
        rope: rotate queries and keys as the teacher does.
        gate: `none`, `low` rank, `full` rank or `silu`; multiplies the heads' outputs, starts at exactly 1.
        log_position_scale: multiply the query at position t (from 0) by max(1, ln(t + 1) / ln(L0)), so that
            attention over ever more keys stays as sharp as it was (arXiv 2501.19399).
        training_length: L0, tokens up to which that factor is exactly 1.
    """

    rope: bool = True
    gate: str = "none"
    log_position_scale: bool = False
    training_length: int = 4096

    def __post_init__(self) -> None:
        check_choice("student.mixers.attention.gate", self.gate, GATES)
        if self.training_length < 2:
            raise ValueError(
                f"student.mixers.attention.training_length={self.training_length} must be at least 2 tokens."
            )

    @property
    def changes_attention(self) -> bool:
        """Whether anything differs from the teacher's attention."""
        return not self.rope or self.gate != "none" or self.log_position_scale


class KeptAttentionMixer(SoftmaxMixer):
    """Maps hidden states [B,T,D] to [B,T,D]; each token sees its document up to itself, or the window of it
    that the teacher's layer has. The decoding cache keeps all keys and values and grows with the text."""

    name = "attention"
    options_class = KeptAttentionOptions

    def mix(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        context: SequenceContext,
    ) -> Tensor:
        """As `Mixer.mix`."""
        query, key, value = self.project(hidden, positions)
        memory = TokenCacheLayer()
        if cache is not None:
            memory = token_layer(cache, self.layer_index)
            memory.begin(context.continues)
        within = self.shape.window is None or hidden.shape[1] <= self.shape.window
        alone = memory.seen == 0 and context.document_ids is None and within
        text = memory.advance(key, value, context.document_ids, WHOLE_DOCUMENT)
        if self.options.log_position_scale:
            query = query * position_scale(text.positions, self.options.training_length).to(query.dtype)
        mixed = self.attend(query, key, value, None) if alone else self._attend(query, text)
        return self.finish(mixed, hidden)

    def _attend(self, query: Tensor, text: ChunkedTokens) -> Tensor:
        """[B,T,H,N] queries of the last T tokens -> [B,T,H,N], where a row may hold several documents."""
        length = query.shape[1]
        earlier = text.keys.shape[1] - length
        place = torch.arange(text.keys.shape[1], device=query.device)

        def block(start: int, stop: int) -> Tensor:
            end = earlier + stop
            own = text.chunks[:, earlier + start : end, None]
            # Padding sees padding, so that no softmax is empty.
            distance = place[earlier + start : end, None] - place[:end]
            visible = (text.chunks[:, None, :end] == own) & (distance >= 0)
            if self.shape.window is not None:
                visible &= distance < self.shape.window
            return self.attend(
                query[:, start:stop], text.keys[:, :end], text.values[:, :end], visible[:, None]
            )

        return in_query_blocks(block, length, QUERY_BLOCK)
