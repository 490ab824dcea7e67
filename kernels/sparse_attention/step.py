"""One token of each row of a pool of blocks in one call: taken over, blocks chosen, attended and remembered.

What models/block_pool.py and models/mixers/block_choice.py do in torch, in some sixty calls, is its
definition.

Shape letters: B rows, H heads, N head size, M places for blocks of C tokens, G key/value heads, J lists, P
parts of a block that the index tells apart, F index heads, W index width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native

WIDTH = 16  # head sizes and index widths are multiples of it


class PoolTensors(NamedTuple):
    """What a pool holds, changed in place.

    Attributes:
        keys, values: [B,M,C,G,N] float32. The last place takes what nobody is to see.
        index: [B,M,P,F,W] float32, mean index keys.
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


def fits(token: Tokens, pool: PoolTensors) -> bool:
    """Whether the C++ step takes these tensors; what is being compiled or only pretends goes the other
    way."""
    given = (*token, *pool)
    plain = not torch.compiler.is_compiling() and all(type(x) is Tensor for x in given)
    numbers = (*token, pool.keys, pool.values, pool.index, pool.attention)
    return (
        plain
        and token.q.shape[1] == 1
        and all(x.dtype == torch.float32 for x in numbers)
        and all(x.is_contiguous() for x in pool)
        and token.q.shape[3] % WIDTH == 0
        and token.asks.shape[3] % WIDTH == 0
    )


def take(token: Tokens, pool: PoolTensors, sight: StepSight) -> Tensor:
    """y [B,1,H,N]; the pool is changed in place."""
    token = Tokens(*(x.contiguous() for x in token))
    parts, heads, width = pool.index.shape[2:]
    sizes = (*token.q.shape, *pool.keys.shape[1:4], token.asks.shape[2], parts, heads, width, *sight)
    y = torch.empty_like(token.q)
    native.call("sparse_attention", "step", sizes, (*token, *pool, y))
    return y
