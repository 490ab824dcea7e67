"""The Triton kernels of WKV-7: forward pass, the scan of both passes, and decoding. See triton_chunk.py."""

import triton
import triton.language as tl

from kernels.wkv7.triton_chunk import (
    PADDING,
    RESET,
    SIZES,
    decays,
    earlier,
    first_level,
    inverse,
    later,
    level,
    matrix,
    pairs,
    place,
    product,
    rows,
    segments,
    through,
    tile,
    total,
)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    log_w, k, v, a, b, codes, solved, own, change, added, keep, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    LEVELS: tl.constexpr, PRODUCTS: tl.constexpr, SENSITIVE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a chunk does to any state: U = W S + own, S' = keep S + change S + added.

    Writes W and own [C,N], change and added [N,N], keep [N].
    """
    at = tl.program_id(0)
    chunk = at % chunks
    start, row, left = place(first_unit + at // chunks, chunk, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    first = first_level(log_w + start, real, HEADS, N, KEYS, LEVELS)
    a_b = tl.zeros([C, C], tl.float32)
    a_k = tl.zeros([C, C], tl.float32)
    for begin in range(0, N, KEYS):
        offsets = tile(begin + tl.arange(0, KEYS), HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        for number in range(first, LEVELS):
            read, read_before, key = level(number, first, x, LEVELS, PARTS)
            now = pairs(number, first, document, LEVELS)
            query = rows(a + start, offsets, real) * read_before
            keys = tl.trans(rows(b + start, offsets, real) * key)
            a_b += tl.where(now, product(query, keys, PRODUCTS), 0.0)
            keys = tl.trans(rows(k + start, offsets, real) * key)
            a_k += tl.where(now, product(query, keys, PRODUCTS), 0.0)
    x_ab = inverse(a_b, LEVELS, SENSITIVE)
    names = tl.arange(0, N)
    everywhere = tile(names, HEADS * N, C)
    x_all = decays(log_w + start, everywhere, real)
    tl.store(keep + at.to(tl.int64) * N + names, through(x_all, document))
    to_end = tl.where(reaches_end[:, None], tl.exp(total(later(C), x_all, PARTS)), 0.0)
    b_end = tl.trans(rows(b + start, everywhere, real) * to_end)
    k_end = tl.trans(rows(k + start, everywhere, real) * to_end)
    for begin in range(0, N, VALUES):
        columns = begin + tl.arange(0, VALUES)
        v_t = rows(v + start, tile(columns, HEADS * N, C), real)
        u = product(x_ab, product(a_k, v_t, PRODUCTS), SENSITIVE)
        tl.store(matrix(own, at, columns, C, N), u.to(own.dtype.element_ty))
        more = product(k_end, v_t, PRODUCTS) + product(b_end, u, PRODUCTS)
        tl.store(matrix(added, at, columns, N, N), more)
    for begin in range(0, N, KEYS):
        columns = begin + tl.arange(0, KEYS)
        offsets = tile(columns, HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        from_start = tl.where(sees_start[:, None], tl.exp(total(earlier(C), x, PARTS)), 0.0)
        w = product(x_ab, rows(a + start, offsets, real) * from_start, SENSITIVE)
        tl.store(matrix(solved, at, columns, C, N), w.to(solved.dtype.element_ty))
        tl.store(matrix(change, at, columns, N, N), product(b_end, w, PRODUCTS).to(change.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def scan(
    begin, end, added, keep, change, chunks, first_unit,
    N: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk, X = keep X + change X + added for BLOCK columns of X; `change` may be None.

    Begins with `begin` [all units,N,N], leaves the last X in `end`, if there is one, and in the place of each
    chunk's `added` the X that the chunk met. REVERSE: from the last chunk to the first.
    """
    unit = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    names = tl.arange(0, N)
    x = tl.load(matrix(begin, first_unit + unit, columns, N, N))
    for step in range(chunks):
        at = unit.to(tl.int64) * chunks + (chunks - 1 - step if REVERSE else step)
        here = matrix(added, at, columns, N, N)
        more = tl.load(here)
        tl.store(here, x)
        more += tl.load(keep + at * N + names)[:, None] * x
        if change is not None:
            more += product(tl.load(matrix(change, at, names, N, N)), x, PRECISION)
        x = more
    if end is not None:
        tl.store(matrix(end, first_unit + unit, columns, N, N), x)


@triton.jit(do_not_specialize=SIZES)
def read_out(
    r, log_w, k, v, b, codes, solved, own, states, y, sa, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    LEVELS: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Y, and U (`sa`, or None), from what `prepare` wrote and the state before each chunk."""
    at = tl.program_id(0)
    chunk = at % chunks
    start, row, left = place(first_unit + at // chunks, chunk, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    first = first_level(log_w + start, real, HEADS, N, KEYS, LEVELS)
    r_b = tl.zeros([C, C], tl.float32)
    r_k = tl.zeros([C, C], tl.float32)
    now_b = tl.zeros([C], tl.float32)
    now_k = tl.zeros([C], tl.float32)
    for begin in range(0, N, KEYS):
        offsets = tile(begin + tl.arange(0, KEYS), HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        r_t = rows(r + start, offsets, real).to(tl.float32)
        now_b += tl.sum(r_t * rows(b + start, offsets, real), 1)
        now_k += tl.sum(r_t * rows(k + start, offsets, real), 1)
        for number in range(first, LEVELS):
            read, read_before, key = level(number, first, x, LEVELS, PARTS)
            now = pairs(number, first, document, LEVELS)
            query = rows(r + start, offsets, real) * read
            keys = tl.trans(rows(b + start, offsets, real) * key)
            r_b += tl.where(now, product(query, keys, PRODUCTS), 0.0)
            keys = tl.trans(rows(k + start, offsets, real) * key)
            r_k += tl.where(now, product(query, keys, PRODUCTS), 0.0)
    names = tl.arange(0, N)
    everywhere = tile(names, HEADS * N, C)
    x_all = decays(log_w + start, everywhere, real)
    from_start = tl.where(sees_start[:, None], tl.exp(total(earlier(C), x_all, PARTS) + x_all), 0.0)
    from_start *= rows(r + start, everywhere, real)
    inside = (tl.arange(0, C) < left)[:, None]
    for begin in range(0, N, VALUES):
        columns = begin + tl.arange(0, VALUES)
        values = tile(columns, HEADS * N, C)
        state = tl.load(matrix(states, at, columns, N, N))
        u = product(tl.load(matrix(solved, at, names, C, N)), state, PRODUCTS)
        u += tl.load(matrix(own, at, columns, C, N))
        if sa is not None:
            tl.store(sa + start + values, u, mask=inside)
        v_t = rows(v + start, values, real)
        out = product(from_start, state, PRODUCTS) + product(r_k, v_t, PRODUCTS) + now_k[:, None] * v_t
        out += product(r_b, u, PRODUCTS) + now_b[:, None] * u
        tl.store(y + start + values, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def decode(
    r, log_w, k, v, a, b, state, codes, y, HEADS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token of a unit, BLOCK values; the state is changed in place."""
    unit = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    names = unit * N + tl.arange(0, N)
    code = 0
    if codes is not None:
        code = tl.load(codes + unit // HEADS).to(tl.int32)
    real = code != PADDING
    here = matrix(state, unit, columns, N, N)
    s = tl.where(code == RESET, 0.0, tl.load(here))
    w = tl.exp(tl.load(log_w + names, mask=real, other=0.0))[:, None]
    r_t = tl.load(r + names, mask=real, other=0.0).to(tl.float32)[:, None]
    k_t = tl.load(k + names, mask=real, other=0.0).to(tl.float32)[:, None]
    a_t = tl.load(a + names, mask=real, other=0.0).to(tl.float32)[:, None]
    b_t = tl.load(b + names, mask=real, other=0.0).to(tl.float32)[:, None]
    v_t = tl.load(v + unit * N + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    s = w * s + b_t * tl.sum(a_t * s, 0)[None, :] + k_t * v_t
    tl.store(here, s)
    tl.store(y + unit * N + columns, tl.sum(r_t * s, 0).to(y.dtype.element_ty))
