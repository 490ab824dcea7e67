"""One token of each row of a pool of blocks in one call: taken over, blocks chosen, attended and remembered.

What models/block_pool.py and models/mixers/block_choice.py do in torch, in some sixty calls, is its
definition.

Shape letters: B rows, H heads, N head size, M places for blocks of C tokens, G key/value heads, J lists, P
parts of a block that the index tells apart, F index heads, W index width.
"""

import torch
from torch import Tensor

from kernels import native
from kernels.sparse_attention.pool import PoolTensors, StepSight, Tokens

WIDTH = 16  # head sizes and index widths are multiples of it
INDEX_CELLS = {torch.float32: torch.float32, torch.bfloat16: torch.int16}  # as C++ is handed them


def fits(token: Tokens, pool: PoolTensors) -> bool:
    """Whether the C++ step takes these tensors; what is being compiled or only pretends goes the other
    way."""
    given = (*token, *pool)
    plain = not torch.compiler.is_compiling() and all(type(x) is Tensor for x in given)
    numbers = (*token, pool.keys, pool.values, pool.attention)
    return (
        plain
        and token.q.shape[1] == 1
        and all(x.dtype == torch.float32 for x in numbers)
        and pool.index.dtype in INDEX_CELLS
        and all(x.is_contiguous() for x in pool)
        and token.q.shape[3] % WIDTH == 0
        and token.asks.shape[3] % WIDTH == 0
    )


def take(token: Tokens, pool: PoolTensors, sight: StepSight) -> Tensor | None:
    """y [B,1,H,N], and the pool is changed in place; None, and nothing has happened, where they do not
    fit."""
    if not fits(token, pool):
        return None
    token = Tokens(*(x.contiguous() for x in token))
    parts, heads, width = pool.index.shape[2:]
    held = pool._replace(index=pool.index.view(INDEX_CELLS[pool.index.dtype]))
    cell = held.index.element_size()
    sizes = (*token.q.shape, *pool.keys.shape[1:4], token.asks.shape[2], parts, heads, width, cell, *sight)
    y = torch.empty_like(token.q)
    native.call("sparse_attention", "step", sizes, (*token, *held, y))
    return y
