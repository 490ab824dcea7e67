"""Sparse softmax attention over chosen blocks of the past: RWKV-X's choice (arXiv 2504.21463), and a learned
one (as in arXiv 2502.11089 and 2512.02556, over blocks).

Shape letters: B rows, T tokens of a call, D hidden width, H heads, G key/value heads, N head size, M blocks
of C tokens, J lists of a token, K entries of a list, F index heads, W index width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from kernels.sparse_attention import StepSight, Tokens, sparse_attention, sparse_step
from models.backbone import SequenceContext
from models.block_pool import FIRST, HALF_LIVES, KEPT, BlockPool, Blocks, block_pool, places_needed
from models.mixers.base import AttentionShape
from models.mixers.block_choice import Choice, Sight, choose, index_loss, some_tokens
from models.mixers.heads import HeadMixer, check_choice, position_scale, rotate
from models.mixers.token_shift import last_token, previous_token
from models.sequence_state import Places, read_places, writable

SELECTORS = ("gated", "published")


@dataclass(frozen=True, kw_only=True)
class SparseAttentionOptions:
    """What a token may see: its own block up to itself, and of the complete blocks before it the first
    `sinks`, those that cover the last `window` tokens, and the best `top_k` others.

    Args:
        selector: who says which are best. `gated`: an index of its own, learned from attention itself, for
            the heads of a key/value head together. `published`: the product of query and mean key, for each
            head, as in RWKV-X; then sinks=0, window=1, block_length=2048 and top_k=2 are its published
            setting.
        block_length: C, tokens of one document.
        sinks: blocks.
        window: tokens, the token itself among them.
        top_k: blocks.
        pool_blocks: blocks that the decoding memory holds; made once, it never grows.
        index_width: W of `gated`.
        index_part: tokens whose mean is one index key of `gated`; divides block_length. 1 looks at each
            token, with keys rounded to bfloat16: decoding reads them all at each token.
        index_tried: blocks drawn at random that the index also learns about, while it trains sparsely.
        rope: rotate queries and keys as the teacher does, and index vectors that are wide enough for it;
            without, any length is alike.
        key_shift: mix what keys read with the token before, by a share of each channel that starts at this
            and is learned; None does not. With it, one layer finds what followed a token that it sees again.
        qk_norm: scale queries and keys to unit mean square, with a learned factor for each head.
        log_position_scale: queries beyond training_length grow with the logarithm of their position
            (`heads.position_scale`): the more blocks there are to choose from, the more come near the best.
        training_length: tokens up to which that factor is exactly 1.
        backend: of the operator `sparse_attention`.
    """

    selector: str = "gated"
    block_length: int = 64
    sinks: int = 1
    window: int = 512
    top_k: int = 32
    pool_blocks: int = 512
    index_width: int = 64
    index_part: int = 1
    index_tried: int = 8
    rope: bool = False
    key_shift: float | None = None
    qk_norm: bool = False
    log_position_scale: bool = False
    training_length: int = 4096
    backend: str = "auto"

    def __post_init__(self) -> None:
        key = "student.mixers.sparse"
        check_choice(f"{key}.selector", self.selector, SELECTORS)
        least = {"block_length": 1, "sinks": 0, "window": 1, "top_k": 0, "index_width": 1, "index_part": 1}
        for name, value in (least | {"index_tried": 0, "training_length": 2}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be at least {value}.")
        fewest = self.first + self.kept + 1
        if self.pool_blocks < fewest:
            raise ValueError(
                f"{key}.pool_blocks={self.pool_blocks} must be at least {fewest}: the first {self.first} and "
                f"the newest {self.kept} blocks stay (sinks={self.sinks}, window={self.window}, block_length="
                f"{self.block_length})."
            )
        if self.key_shift is not None and not 0 <= self.key_shift <= 1:
            raise ValueError(f"{key}.key_shift={self.key_shift} must lie between 0 and 1, or be null.")
        if self.block_length % self.index_part:
            raise ValueError(
                f"{key}.index_part={self.index_part} must divide {key}.block_length={self.block_length}."
            )

    @property
    def near(self) -> int:
        """Blocks before the own that are always seen."""
        return -(-(self.window - 1) // self.block_length)

    @property
    def kept(self) -> int:
        """Newest blocks that are never evicted."""
        return max(KEPT, self.near + 1)

    @property
    def first(self) -> int:
        """First blocks that are never evicted."""
        return max(FIRST, self.sinks)

    @property
    def parts(self) -> int:
        """Index keys of a block."""
        return self.block_length // self.index_part if self.selector == "gated" else 1

    @property
    def rounds_index(self) -> bool:
        """Whether index keys are rounded to bfloat16; those of several tokens are summed first, in full."""
        return self.selector == "gated" and self.index_part == 1


def rounded(keys: Tensor) -> Tensor:
    """The nearest numbers that bfloat16 has, in the dtype of `keys`; gradients go through as they are."""
    return keys + (keys.bfloat16().to(keys.dtype) - keys).detach()


class GatedIndex(nn.Module):
    """Index vectors of a choice that is learned: a query for each key/value head, one key for all of them.
    What it reads gets no gradient from it.

    Args:
        width: D.
        lists: J.
        size: W.
    """

    def __init__(self, width: int, lists: int, size: int):
        super().__init__()
        self.query = nn.Linear(width, lists * size, bias=False)
        self.key = nn.Linear(width, size, bias=False)
        self.query_norm, self.key_norm = (nn.Parameter(torch.ones(size)) for _ in range(2))
        with torch.no_grad():  # what is alike chooses each other
            self.key.weight.copy_(self.query.weight[:size])
        self.size = size

    def forward(self, hidden: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
        """What queries and keys read, [B,T,D] -> queries [B,T,J,W], scaled, and keys [B,T,1,W]."""
        query = self.query(hidden.detach()).unflatten(-1, (-1, self.size))
        query = F.rms_norm(query, (self.size,), self.query_norm)
        key = F.rms_norm(self.key(of_keys.detach()), (self.size,), self.key_norm)
        return query * self.size**-0.5, key[..., None, :]


class SparseAttentionMixer(HeadMixer):
    """The teacher's attention, except that each token sees only some blocks of its document. While a document
    has no more blocks than a token sees, this is causal attention.

    One exact softmax runs over all that is visible; no gradient runs through the choice. Training, prefill
    and decoding are one function: keys and values always lie in a pool of blocks (models/block_pool.py). That
    of a row in training has a place for every block; that of a cache has `pool_blocks` and evicts whole
    blocks.

    Args:
        shape: head counts, biases and norms of the attention that it replaces.
        options: what is visible.
        layer_index: of the decoder layer, from 0.
        layer_count, first: make no difference here.

    Attributes:
        dense: whether every block is seen (while the index is preheated).
        index: the learned choice, or None.
    """

    name = "sparse"
    operator = "sparse_attention"
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
        self.dense = False
        gated = options.selector == "gated"
        self.index = GatedIndex(shape.hidden_size, shape.kv_heads, options.index_width) if gated else None
        shifts = options.key_shift is not None
        self.shift_mix = nn.Parameter(torch.full((shape.hidden_size,), options.key_shift)) if shifts else None
        self.sharpness = nn.Parameter(torch.ones(shape.heads, 1)) if options.qk_norm else None

    def drawn(self) -> None:
        """Keys begin like the queries of their first head: what is alike attends to each other."""
        like = self.receptance.weight.unflatten(0, (self.kv_heads, -1, self.shape.head_size))[:, 0]
        self.key.weight.copy_(like.flatten(0, 1))

    @property
    def operator_heads(self) -> tuple[int, int]:
        """As `Mixer.operator_heads`."""
        return self.shape.heads, self.shape.head_size

    def mix(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        context: SequenceContext,
    ) -> Tensor:
        """As `Mixer.mix`."""
        pool = BlockPool()
        if cache is not None:
            pool = block_pool(cache, self.layer_index, self.options.kept, self.options.first)
            pool.begin(context.continues)
        tokens = self.read(hidden, positions, pool, context)
        mixed = self._one_token(tokens, pool, context)
        if mixed is None:
            mixed = self._all_tokens(tokens, pool, cache, context)
        return self.output(mixed.flatten(2))

    def read(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        pool: BlockPool,
        context: SequenceContext,
    ) -> Tokens:
        """What tokens [B,T,D] ask, and are asked by; the pool remembers the last one."""
        of_keys = self._shifted(hidden, pool, context)
        query, key, value = self.project_heads({"r": hidden, "k": of_keys, "v": hidden}, positions)
        if self.sharpness is not None:
            query, key = (F.rms_norm(x, x.shape[-1:]) for x in (query, key))
            query = query * (self.sharpness * self.read_scale)
        if self.options.log_position_scale:
            fresh = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            seen = fresh if pool.counts is None else pool.counts[:, 0]
            places = read_places(seen, context.document_ids, hidden.shape[1])
            query = query * position_scale(places.positions, self.options.training_length)
        query, key = query.to(value.dtype), key.to(value.dtype)
        asks, index_keys = (query, key) if self.index is None else self.index(hidden, of_keys)
        if self.index is not None and self.rotates(positions) and positions[0].shape[-1] <= asks.shape[-1]:
            asks, index_keys = (rotate(x, positions, self.shape.rotation) for x in (asks, index_keys))
        index_keys = rounded(index_keys) if self.options.rounds_index else index_keys
        return Tokens(query, key, value, asks, index_keys)

    def _one_token(self, token: Tokens, pool: BlockPool, context: SequenceContext) -> Tensor | None:
        """[B,1,H,N] of one more token of each row's text, in one call; None where there is none for it."""
        fresh = pool.counts is None or token.q.shape[1] > 1
        if fresh or context.document_ids is not None or torch.is_grad_enabled() or not writable(pool.keys):
            return None
        if self.index is not None and context.index_losses is not None:
            return None
        options = self.options
        best = -1 if self.dense else options.top_k
        sight = StepSight(options.sinks, options.near, best, options.first, options.kept, HALF_LIVES)
        mixed = sparse_step(token, pool.held, sight, backend=options.backend)
        pool.seen += mixed is not None
        return mixed

    def _all_tokens(
        self, tokens: Tokens, pool: BlockPool, cache: Cache | None, context: SequenceContext
    ) -> Tensor:
        """[B,T,H,N] of a call, of which the pool may have no room for all at one time."""
        query, key, value, asks, index_keys = tokens
        places = self.places(pool, tokens, context, whole=cache is None)
        losses = None if self.index is None else context.index_losses
        outputs = []
        for start, stop in [(0, key.shape[1])] if cache is None else pool.rounds(places):
            part = slice(start, stop)
            now = Places(places.documents[:, part], places.positions[:, part], places.seen)
            blocks = pool.advance(key[:, part], value[:, part], index_keys[:, part], now)
            choice = self.choice(asks[:, part], blocks, now, scored=losses is not None)
            mixed, share = self.attend(query[:, part], blocks, choice, now)
            if cache is not None:
                pool.attend(choice.listed, share, now.documents >= 0)
            if losses is not None:
                losses.append(index_loss(asks[:, part], blocks, choice, share, now.positions))
            outputs.append(mixed)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _shifted(self, hidden: Tensor, pool: BlockPool, context: SequenceContext) -> Tensor:
        """What keys read, [B,T,D]; the pool remembers the last token."""
        if self.shift_mix is None:
            return hidden
        before = previous_token(hidden, context.document_ids, pool.last_hidden)
        pool.last_hidden = last_token(hidden, context.document_ids, pool.last_hidden)
        return hidden + (before - hidden) * self.shift_mix

    def places(self, pool: BlockPool, tokens: Tokens, context: SequenceContext, whole: bool) -> Places:
        """Where the call's tokens stand; makes the pool, for these tokens alone if they are `whole` rows."""
        options, ids, (rows, count) = self.options, context.document_ids, tokens.k.shape[:2]
        needed = options.pool_blocks + 1
        if whole:
            places = read_places(torch.zeros(rows, dtype=torch.int64, device=tokens.k.device), ids, count)
            needed = places_needed(places, count, options.block_length, single=ids is None)
        held = torch.bfloat16 if options.rounds_index and not whole else None
        size = needed, options.block_length, options.parts
        pool.make(tokens.k, tokens.v, tokens.index_keys, *size, index_dtype=held)
        return pool.numbered(places if whole else read_places(pool.counts[:, 0], ids, count))

    def choice(self, asks: Tensor, blocks: Blocks, places: Places, scored: bool) -> Choice:
        """The blocks of all tokens, some tokens at a time."""
        options = self.options
        best = None if self.dense else options.top_k
        tried = options.index_tried if scored else 0
        sight = Sight(options.sinks, options.near, best, tried)
        found = [
            choose(asks[:, part], blocks, places.documents[:, part], places.positions[:, part], sight, scored)
            for part in some_tokens(asks, blocks.index)
        ]
        if len(found) == 1:
            return found[0]
        parts = zip(*found, strict=True)
        return Choice(*(None if part[0] is None else torch.cat(part, dim=1) for part in parts))

    def attend(self, query: Tensor, blocks: Blocks, choice: Choice, places: Places) -> tuple[Tensor, Tensor]:
        """[B,T,H,N] -> [B,T,H,N], and the share of each listed block [B,T,J,K]."""
        at = torch.where(places.documents >= 0, places.positions, -1).int()
        listed, starts = choice.listed.contiguous(), blocks.starts.contiguous()
        return sparse_attention(
            query, blocks.keys, blocks.values, listed, starts, at, backend=self.options.backend
        )
