"""Sparse softmax attention over chosen chunks of the past, as RWKV-X has it (arXiv 2504.21463).

Shape letters: B rows, S tokens read so far, T tokens of a call, Q queries of a block, D hidden width,
H heads, G key/value heads, N head size, M chunks of a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from kernels.arguments import without_autocast
from models.backbone import SequenceContext
from models.mixers.base import AttentionShape, wide
from models.mixers.heads import HeadMixer
from models.mixers.softmax import QUERY_BLOCK, in_query_blocks
from models.sequence_state import ChunkedTokens, TokenCacheLayer, token_layer


@dataclass(frozen=True, kw_only=True)
class SparseAttentionOptions:
    """What a token may see; the defaults are those of RWKV-X.

    Args:
        chunk_length: C, tokens of one document in a chunk.
        top_k: chunks that a token sees, its own among them; 1 is the own chunk alone.
        rope: rotate queries and keys as the teacher does; RWKV-X has no positions here.
    """

    chunk_length: int = 2048
    top_k: int = 3
    rope: bool = False

    def __post_init__(self) -> None:
        for key in ("chunk_length", "top_k"):
            if getattr(self, key) < 1:
                raise ValueError(f"student.mixers.sparse.{key}={getattr(self, key)} must be at least 1.")


class SparseAttentionMixer(HeadMixer):
    """The teacher's attention, except that each token and head sees only a few chunks of its document: the
    token's own chunk up to the token, and the top_k - 1 complete earlier chunks of largest q · mean(keys).

    One exact softmax runs over all that is visible; no gradient runs through the choice. While a document has
    at most top_k chunks this is causal attention. The receptance is the query. Masks are dense but exist for
    one block of queries at a time, so memory is linear in T and time is not; the decoding cache keeps all
    keys and values and grows with the text.

    Args:
        shape: head counts, biases and norms of the attention that it replaces.
        options: what is visible.
        layer_index: of the decoder layer, from 0.
        layer_count, first: make no difference here.
    """

    name = "sparse"
    options_class = SparseAttentionOptions
    head_sizes = range(1, 1025)

    def __init__(
        self,
        shape: AttentionShape,
        options: SparseAttentionOptions,
        *,
        layer_index: int,
        layer_count: int,
        first: bool,
    ):
        super().__init__(shape, options, layer_index)

    def mix(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        context: SequenceContext,
    ) -> Tensor:
        """As `Mixer.mix`."""
        inputs = dict.fromkeys("rkv", hidden)
        query, key, value = self.project_heads(inputs, positions)
        memory = TokenCacheLayer()
        if cache is not None:
            memory = token_layer(cache, self.layer_index)
            memory.begin(context.continues)
        text = memory.advance(key, value, context.document_ids, self.options.chunk_length)
        return self.output(self._attend(query, text).flatten(2))

    def _attend(self, query: Tensor, text: ChunkedTokens) -> Tensor:
        """[B,T,H,N] scaled queries of the last T tokens -> [B,T,H,N], a block of queries at a time."""
        length, means = query.shape[1], self._chunk_means(text)

        def block(start: int, stop: int) -> Tensor:
            end = text.keys.shape[1] - length + stop  # no query of the block sees further
            seen = ChunkedTokens(*(x[:, :end] for x in text[:3]), *(x[:, start:stop] for x in text[3:]))
            return self._attend_block(query[:, start:stop], seen, means)

        return in_query_blocks(block, length, QUERY_BLOCK)

    def _attend_block(self, query: Tensor, text: ChunkedTokens, means: Tensor) -> Tensor:
        """[B,Q,H,N] of the last Q tokens of `text` -> [B,Q,H,N]."""
        keys, values = (self.repeat_kv(x).transpose(1, 2) for x in (text.keys, text.values))
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=self._visible(query, text, means), scale=1.0
        )
        return mixed.transpose(1, 2)

    @torch.no_grad()
    def _visible(self, query: Tensor, text: ChunkedTokens, means: Tensor) -> Tensor:
        """[B,H,Q,S] bool: what each query and head sees. A padded query sees padding, so that no softmax is
        empty."""
        count, own = query.shape[1], text.chunks[:, -query.shape[1] :, None]
        place = torch.arange(text.chunks.shape[1], device=query.device)
        near = (text.chunks[:, None] == own) & (place <= place[-count:, None])
        chunks = torch.arange(means.shape[1], device=query.device)
        candidates = (chunks >= text.first_chunks[..., None]) & (chunks < own)
        chosen = self._choose(query, means, candidates)
        far = chosen.gather(-1, text.chunks.clamp(min=0)[:, None, None].expand(*chosen.shape[:3], -1))
        return near[:, None] | (far & (text.chunks >= 0)[:, None, None])

    def _choose(self, query: Tensor, means: Tensor, candidates: Tensor) -> Tensor:
        """[B,H,Q,M] bool, the best top_k - 1 of the candidates [B,Q,M] for each query and head, by scores in
        float32."""
        with without_autocast(query.device.type):
            scores = wide(query).transpose(1, 2) @ means.permute(0, 2, 3, 1)
        scores = scores.masked_fill(~candidates[:, None], -torch.inf)
        best = scores.topk(min(self.options.top_k - 1, scores.shape[-1]), dim=-1)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best.indices, best.values > -torch.inf)

    @torch.no_grad()
    def _chunk_means(self, text: ChunkedTokens) -> Tensor:
        """[B,M,H,N] float32 mean key of each complete chunk; other chunks are never asked."""
        count = max(int(text.chunks.max()) + 1, 1)
        keys = wide(text.keys)
        place = text.chunks.clamp(min=0)[..., None, None].expand_as(keys)  # padding's keys are 0
        sums = keys.new_zeros(keys.shape[0], count, *keys.shape[2:]).scatter_add(1, place, keys)
        return self.repeat_kv(sums / self.options.chunk_length)
