"""What one token of each row of a pool of blocks needs (step.py), in plain tensors.

Shape letters: B rows, T tokens, H heads, N head size, M places for blocks of C tokens, G key/value heads, J
lists, P parts of a block that the index tells apart, F index heads, W index width.
"""

from typing import NamedTuple

from torch import Tensor


class PoolTensors(NamedTuple):
    """What a pool holds, changed in place.

    Attributes:
        keys, values: [B,M,C,G,N] float32. The last place takes what nobody is to see.
        index: [B,M,P,F,W] mean index keys, float32, or bfloat16 where a part is one token.
        starts: [B,M] int32, the position of a block's first token.
        documents: [B,M] int64; -1 where no block is.
        attention: [B,M] float32, what the blocks have been paid.
        counts: [B,3] int64: tokens of the current document, its number, the place that is being filled.
    """

    keys: Tensor
    values: Tensor
    index: Tensor
    starts: Tensor
    documents: Tensor
    attention: Tensor
    counts: Tensor


class StepSight(NamedTuple):
    """What a token sees, and what stays, in blocks.

    Attributes:
        sinks, near, best: as in models.mixers.block_choice.Sight; a `best` below 0 sees all.
        first, kept: first and newest blocks that are never evicted.
        half_lives: of what blocks have been paid, until all tokens of the pool have been replaced.
    """

    sinks: int
    near: int
    best: int
    first: int
    kept: int
    half_lives: int


class Tokens(NamedTuple):
    """What is read off tokens; T = 1 in a step.

    Attributes:
        q: [B,T,H,N], scaled.
        k, v: [B,T,G,N].
        asks: [B,T,J,W] index queries.
        index_keys: [B,T,F,W].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    asks: Tensor
    index_keys: Tensor
