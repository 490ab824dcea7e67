"""What mixers share that are softmax attention themselves: an output gate, and queries in blocks.

Shape letters: B rows, S keys, T tokens of a call, Q queries of a block, D hidden width, H heads, N head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.mixers.base import AttentionShape, wide
from models.mixers.heads import HeadMixer, output_gate

QUERY_BLOCK = 128  # queries whose mask [B,1 or H,Q,S] exists at one time


class SoftmaxMixer(HeadMixer):
    """A mixer that is softmax attention over some of the tokens before; the receptance is the query.

    Args:
        shape: head counts, biases and norms of the attention that it replaces.
        options: have `rope` and `gate`.
        layer_index: of the decoder layer, from 0.
        layer_count, first: make no difference here.
    """

    head_sizes = range(1, 1025)

    def __init__(
        self, shape: AttentionShape, options: Any, *, layer_index: int, layer_count: int, first: bool
    ):
        super().__init__(shape, options, layer_index)
        self.gate = output_gate(options.gate, shape.hidden_size, shape.heads * shape.head_size)

    def project(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B,T,H,N], scaled, key and value [B,T,kv_heads,N], all of one type."""
        query, key, value = self.project_heads(dict.fromkeys("rkv", hidden), position_embeddings)
        return query.to(value.dtype), key.to(value.dtype), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """One exact softmax per query.

        Args:
            query: [B,Q,H,N], scaled.
            key, value: [B,S,kv_heads,N].
            visible: [B,1,Q,S] bool, some key for each query; None means S = Q, and no query sees later keys.

        Returns:
            [B,Q,H,N].
        """
        query, key, value = (x.transpose(1, 2) for x in (query, self.repeat_kv(key), self.repeat_kv(value)))
        if self.shape.score_cap is not None:
            return self._attend_capped(query, key, value, visible).transpose(1, 2)
        causal = visible is None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=causal, scale=1.0
        ).transpose(1, 2)

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """`attend` on [B,H,..,N] with the teacher's cap of scores, which no fused attention has."""
        cap, scores = self.shape.score_cap, query @ key.transpose(-1, -2)
        if visible is None:
            visible = torch.ones_like(scores, dtype=torch.bool).tril()
        scores = (cap * torch.tanh(wide(scores) / cap)).masked_fill(~visible, -torch.inf)
        return scores.softmax(-1).to(value.dtype) @ value

    def finish(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """Gate and output projection: [B,T,H,N] and what the gate reads, [B,T,D], -> [B,T,D]."""
        flat = mixed.flatten(2)
        return self.output(flat if self.gate is None else flat * self.gate(hidden))


def in_query_blocks(attend: Callable[[int, int], Tensor], length: int, block: int) -> Tensor:
    """[B,T,H,N], a block of queries at a time; for the backward pass each block is computed again, because
    the masks of all blocks would add up.

    Args:
        attend: (first, last (exclusive) query) -> [B,Q,H,N].
        length: T.
        block: the largest Q.
    """
    outputs = []
    for start in range(0, length, block):
        span = start, min(start + block, length)
        if torch.is_grad_enabled() and length > block:
            outputs.append(checkpoint(attend, *span, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(attend(*span))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
