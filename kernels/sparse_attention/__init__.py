"""Softmax attention over listed blocks of keys, as RWKV-X, MoBA and NSA have it: the one entry,
`sparse_attention`. Training, prefill and decoding are the same call: who lists which blocks, and where keys
and values come from, is the caller's business.

Shape letters: B rows, T queries, H heads, N head size, M blocks of C keys, G key/value heads, J lists of a
query, K entries of a list.
"""

import torch
from torch import Tensor

from kernels.arguments import check_kind, without_autocast
from kernels.case import MANY_UNITS, anything
from kernels.dispatch import Backend, chosen_name
from kernels.sparse_attention import chunked, cpu, reference, step, triton
from kernels.sparse_attention.lists import NONE, watched
from kernels.sparse_attention.pool import PoolTensors, StepSight, Tokens

__all__ = [
    "BACKENDS",
    "HEAD_SIZES",
    "NONE",
    "PoolTensors",
    "Tokens",
    "StepSight",
    "sparse_attention",
    "sparse_step",
    "watched",
]
HEAD_SIZES = range(1, 1025)
BACKENDS = (
    Backend(
        "triton",
        triton.supports,
        triton.run,
        "tensor cores on any GPU",
        triton.prepare,
        native=True,
        held_back=triton.HELD_BACK,
    ),
    Backend("cpu", cpu.supports, cpu.run, "compiled C++, the fastest on CPU", cpu.prepare, step=step.take),
    Backend("chunked", anything, chunked.run, "gathers what is listed, in plain torch, any device and dtype"),
    Backend("reference", anything, reference.run, "dense attention under a mask, the definition"),
)
TABLE = {backend.name: backend for backend in BACKENDS}


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    starts: Tensor,
    positions: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One exact softmax per query and head, over the keys of the blocks in its list that are not later.

    Key c of block m is at position starts[m] + c of its document, and a query at position p sees it where
    that is at most p. So places of a block that are not filled yet need nothing but that nobody is there yet;
    what stands in them, NaN included, changes nothing. A list with all blocks of a document is causal
    attention.

    Args:
        q: [B,T,H,N], scaled. float64 throughout, or any mix of float32, bfloat16 and float16.
        k, v: [B,M,C,G,N]; G divides H.
        blocks: [B,T,J,K] int32, distinct blocks in any order; G divides J and J divides H, so each of J equal
            groups of neighbouring heads has its own list. An entry below 0 is none, except those of
            `watched`.
        starts: [B,M] int32, the position of a block's first key.
        positions: [B,T] int32; below 0 sees nothing.
        backend: "auto" or one of "triton", "cpu" (C++), "chunked", "reference". A named backend never falls
            back.

    Returns:
        y [B,T,H,N] in q's dtype, 0 for a query that sees nothing; and the share [B,T,J,K] float32 of the
        softmax that falls on each entry, the mean over the heads of its list, without a gradient. For a
        watched block, which is not attended: its weight against all that is, which may be larger than 1.

    Raises:
        ValueError: wrong shape, dtype, device or backend name. BuildError: the named backend cannot be built.
    """
    _check(q, k, v, blocks, starts, positions)
    heads, size = q.shape[2:]
    device = q.device.type
    many = q.shape[0] * heads >= MANY_UNITS
    chosen = TABLE[chosen_name("sparse_attention", backend, device, q.dtype, size, many)]
    alike = chosen.native and q.dtype == k.dtype == v.dtype
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    taken = (q, k, v) if alike else (x.to(dtype) for x in (q, k, v))
    with without_autocast(device):
        y, share = chosen.run(*taken, blocks, starts, positions)
    return y.to(q.dtype), share.to(dtype)


def sparse_step(
    token: Tokens, pool: PoolTensors, sight: StepSight, *, backend: str = "auto"
) -> Tensor | None:
    """One token of every row of a pool of blocks, without gradients: taken over, evicting where need be, and
    its blocks chosen and attended (kernels/sparse_attention/step.py). The pool is changed in place.

    Args:
        token, pool, sight: as described there.
        backend: as for `sparse_attention`.

    Returns:
        y [B,1,H,N]; None, and nothing has happened, where the chosen backend has no such step: then
        `sparse_attention` and the pool do the same in several calls.
    """
    rows, _, heads, size = token.q.shape
    device = token.q.device.type
    many = rows * heads >= MANY_UNITS
    chosen = TABLE[chosen_name("sparse_attention", backend, device, token.q.dtype, size, many)]
    if chosen.step is None:
        return None
    with torch.no_grad():
        return chosen.step(token, pool, sight)


def _check(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor) -> None:
    """Refuses wrong shapes, dtypes and devices."""
    name = "sparse_attention"
    if q.dim() != 4 or 0 in q.shape or q.shape[3] not in HEAD_SIZES:
        raise ValueError(f"{name}: q must be [B,T,H,N], none empty, N up to 1,024; got {tuple(q.shape)}")
    batch, tokens, heads, size = q.shape
    if k.dim() != 5 or 0 in k.shape or k.shape[0] != batch or k.shape[4] != size or heads % k.shape[3]:
        raise ValueError(
            f"{name}: k must be [B,M,C,G,N] with B={batch}, N={size} and G a divisor of {heads} heads; got "
            f"{tuple(k.shape)}"
        )
    groups = k.shape[3]
    if v.shape != k.shape:
        raise ValueError(f"{name}: v has shape {tuple(v.shape)} where k has {tuple(k.shape)}")
    fits = blocks.dim() == 4 and blocks.shape[:2] == (batch, tokens) and 0 not in blocks.shape
    if not fits or heads % blocks.shape[2] or blocks.shape[2] % groups:
        raise ValueError(
            f"{name}: blocks must be [B,T,J,K] with B={batch}, T={tokens}, J a divisor of {heads} heads and "
            f"a multiple of {groups} key/value heads; got {tuple(blocks.shape)}"
        )
    for what, x, shape in (("starts", starts, k.shape[:2]), ("positions", positions, q.shape[:2])):
        if x.shape != shape:
            raise ValueError(f"{name}: {what} must be {tuple(shape)}, got {tuple(x.shape)}")
    for what, x in (("q", q), ("k", k), ("v", v)):
        check_kind(name, what, x, q, "q")
    for what, x in (("blocks", blocks), ("starts", starts), ("positions", positions)):
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(f"{name}: {what} must be int32 on {q.device}, got {x.dtype} on {x.device}")
