"""The Triton kernels of WKV-7: backward pass. See triton_chunk.py."""

import triton
import triton.language as tl

from kernels.wkv7.triton_chunk import (
    FORGOTTEN,
    SIZES,
    decays,
    earlier,
    first_level,
    inverse,
    later,
    level,
    matrix,
    meet,
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
def prepare_backward(
    r, log_w, k, v, a, b, codes, sa, dy, inverses, change, added, dadded, keep, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    LEVELS: tl.constexpr, PRODUCTS: tl.constexpr, SENSITIVE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a chunk does to any gradient: D' = keep D + change D + dadded; and S' = keep S + added.

    Writes X [C,C], change, added and dadded [N,N] and keep [N].
    """
    at = tl.program_id(0)
    chunk = at % chunks
    start, row, left = place(first_unit + at // chunks, chunk, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    first = first_level(log_w + start, real, HEADS, N, KEYS, LEVELS)
    a_b = tl.zeros([C, C], tl.float32)
    r_b = tl.zeros([C, C], tl.float32)
    now_b = tl.zeros([C], tl.float32)
    for begin in range(0, N, KEYS):
        offsets = tile(begin + tl.arange(0, KEYS), HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        now_b += tl.sum(rows(r + start, offsets, real).to(tl.float32) * rows(b + start, offsets, real), 1)
        for number in range(first, LEVELS):
            read, read_before, key = level(number, first, x, LEVELS, PARTS)
            now = pairs(number, first, document, LEVELS)
            keys = tl.trans(rows(b + start, offsets, real) * key)
            a_b += tl.where(now, product(rows(a + start, offsets, real) * read_before, keys, PRODUCTS), 0.0)
            r_b += tl.where(now, product(rows(r + start, offsets, real) * read, keys, PRODUCTS), 0.0)
    x_ab = inverse(a_b, LEVELS, SENSITIVE)
    tl.store(matrix(inverses, at, tl.arange(0, C), C, C), x_ab.to(inverses.dtype.element_ty))
    names = tl.arange(0, N)
    everywhere = tile(names, HEADS * N, C)
    x_all = decays(log_w + start, everywhere, real)
    tl.store(keep + at.to(tl.int64) * N + names, through(x_all, document))
    from_start = tl.where(sees_start[:, None], tl.exp(total(earlier(C), x_all, PARTS)), 0.0)
    w = product(x_ab, rows(a + start, everywhere, real) * from_start, SENSITIVE)
    # r~^T dY + a~^T H where H sees no D is (r~ + A_rb W)^T dY.
    seen = rows(r + start, everywhere, real) * (from_start * tl.exp(x_all)) + product(r_b, w, PRODUCTS)
    seen = tl.trans(seen + now_b[:, None] * w)
    for begin in range(0, N, VALUES):
        columns = begin + tl.arange(0, VALUES)
        dy_t = rows(dy + start, tile(columns, HEADS * N, C), real)
        tl.store(matrix(dadded, at, columns, N, N), product(seen, dy_t, PRODUCTS))
    w_t = tl.trans(w)
    for begin in range(0, N, KEYS):
        columns = begin + tl.arange(0, KEYS)
        offsets = tile(columns, HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        b_part = rows(b + start, offsets, real) * tl.exp(total(later(C), x, PARTS))
        b_part = tl.where(reaches_end[:, None], b_part, 0.0)
        tl.store(
            matrix(change, at, columns, N, N), product(w_t, b_part, PRODUCTS).to(change.dtype.element_ty)
        )
    x_all = decays(log_w + start, everywhere, real)
    to_end = tl.where(reaches_end[:, None], tl.exp(total(later(C), x_all, PARTS)), 0.0)
    k_end = tl.trans(rows(k + start, everywhere, real) * to_end)
    b_end = tl.trans(rows(b + start, everywhere, real) * to_end)
    for begin in range(0, N, VALUES):
        columns = begin + tl.arange(0, VALUES)
        values = tile(columns, HEADS * N, C)
        more = product(k_end, rows(v + start, values, real), PRODUCTS)
        more += product(b_end, rows(sa + start, values, real), PRODUCTS)
        tl.store(matrix(added, at, columns, N, N), more)


@triton.jit(do_not_specialize=SIZES)
def value_gradients(
    r, log_w, k, a, b, codes, dy, inverses, dstates, h, dv, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    LEVELS: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dV, and H [C,N], of a chunk, from the gradient of the state behind it."""
    at = tl.program_id(0)
    chunk = at % chunks
    start, row, left = place(first_unit + at // chunks, chunk, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    first = first_level(log_w + start, real, HEADS, N, KEYS, LEVELS)
    r_k = tl.zeros([C, C], tl.float32)
    a_k = tl.zeros([C, C], tl.float32)
    r_b = tl.zeros([C, C], tl.float32)
    now_k = tl.zeros([C], tl.float32)
    now_b = tl.zeros([C], tl.float32)
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
            query = rows(a + start, offsets, real) * read_before
            a_k += tl.where(now, product(query, keys, PRODUCTS), 0.0)
    r_k = tl.trans(r_k)
    a_k = tl.trans(a_k)
    r_b = tl.trans(r_b)
    everywhere = tile(tl.arange(0, N), HEADS * N, C)
    x_all = decays(log_w + start, everywhere, real)
    to_end = tl.where(reaches_end[:, None], tl.exp(total(later(C), x_all, PARTS)), 0.0)
    b_end = rows(b + start, everywhere, real) * to_end
    k_end = rows(k + start, everywhere, real) * to_end
    x_ab = tl.trans(tl.load(matrix(inverses, at, tl.arange(0, C), C, C)))
    inside = (tl.arange(0, C) < left)[:, None]
    for begin in range(0, N, VALUES):
        columns = begin + tl.arange(0, VALUES)
        values = tile(columns, HEADS * N, C)
        dstate = tl.load(matrix(dstates, at, columns, N, N))
        dy_t = rows(dy + start, values, real)
        grad = product(b_end, dstate, PRODUCTS) + product(r_b, dy_t, PRODUCTS) + now_b[:, None] * dy_t
        grad = product(x_ab, grad, PRODUCTS)
        tl.store(matrix(h, at, columns, C, N), grad.to(h.dtype.element_ty))
        grad = product(a_k, grad, PRODUCTS) + product(r_k, dy_t, PRODUCTS)
        grad += product(k_end, dstate, PRODUCTS) + now_k[:, None] * dy_t
        tl.store(dv + start + values, grad.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def contracted(
    x, y, z, state, real,
    X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over values: of token rows x with y, with z, and with KEYS rows of a state matrix.

    Returns x y^T and x z^T [C,C], and x state^T [C,KEYS].
    """
    with_y = tl.zeros([C, C], tl.float32)
    with_z = tl.zeros([C, C], tl.float32)
    with_state = tl.zeros([C, KEYS], tl.float32)
    for begin in range(0, N, VALUES):
        columns = begin + tl.arange(0, VALUES)
        x_t = rows(x, tile(columns, X_STRIDE, C), real)
        with_y += product(x_t, tl.trans(rows(y, tile(columns, Y_STRIDE, C), real)), PRECISION)
        with_z += product(x_t, tl.trans(rows(z, tile(columns, Z_STRIDE, C), real)), PRECISION)
        state_t = tl.load(state + tile(columns, N, KEYS))
        with_state += product(x_t, tl.trans(state_t), PRECISION)
    return with_y, with_z, with_state


@triton.jit
def from_keys(
    pair_k, pair_b, k, b, x, offsets, real, document, first, BEFORE: tl.constexpr,
    LEVELS: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What the earlier keys give to the gradient of the queries r (BEFORE: a), from those of their pairs."""
    grad = tl.zeros(x.shape, tl.float32)
    for number in range(first, LEVELS):
        read, read_before, key = level(number, first, x, LEVELS, PARTS)
        now = pairs(number, first, document, LEVELS)
        part = product(tl.where(now, pair_k, 0.0), rows(k, offsets, real) * key, PRODUCTS)
        part += product(tl.where(now, pair_b, 0.0), rows(b, offsets, real) * key, PRODUCTS)
        grad += part * (read_before if BEFORE else read)
    return grad


@triton.jit
def from_queries(
    pair_r, pair_a, r, a, x, offsets, real, document, first,
    LEVELS: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What the later queries give to the gradient of keys, from those of their pairs (keys in rows)."""
    grad = tl.zeros(x.shape, tl.float32)
    at = tl.arange(0, document.shape[0])
    for number in range(first, LEVELS):
        read, read_before, key = level(number, first, x, LEVELS, PARTS)
        now = meet(at[None, :], at[:, None], number, first, document[None, :], document[:, None], LEVELS)
        part = product(tl.where(now, pair_r, 0.0), rows(r, offsets, real) * read, PRODUCTS)
        part += product(tl.where(now, pair_a, 0.0), rows(a, offsets, real) * read_before, PRODUCTS)
        grad += part * key
    return grad


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    r, log_w, k, v, a, b, codes, sa, dy, states, dstates, h, dr, dlog_w, dk, da, db,
    tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    LEVELS: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """KEYS columns of the gradients of r, log_w, k, a and b, from the state before the chunk, the gradient of
    the state behind it, and H.

    The gradient of the log decay is a running sum within the chunk: what goes through the whole chunk or
    begins in S, plus what each token's keys add and its queries take out.
    """
    at = tl.program_id(0)
    chunk = at % chunks
    start, row, left = place(first_unit + at // chunks, chunk, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    first = first_level(log_w + start, real, HEADS, N, KEYS, LEVELS)
    inside = (tl.arange(0, C) < left)[:, None]
    names = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    offsets = tile(names, HEADS * N, C)
    h += at.to(tl.int64) * (C * N)
    states += at.to(tl.int64) * (N * N) + tl.program_id(1) * KEYS * N
    dstates += at.to(tl.int64) * (N * N) + tl.program_id(1) * KEYS * N
    now_k = tl.zeros([C], tl.float32)
    now_b = tl.zeros([C], tl.float32)
    passing = tl.zeros([KEYS], tl.float32)
    for begin in range(0, N, VALUES):
        columns = begin + tl.arange(0, VALUES)
        values = tile(columns, HEADS * N, C)
        dy_t = rows(dy + start, values, real).to(tl.float32)
        now_k += tl.sum(dy_t * rows(v + start, values, real), 1)
        now_b += tl.sum(dy_t * rows(sa + start, values, real), 1)
        state = tile(columns, N, KEYS)
        passing += tl.sum(tl.load(states + state) * tl.load(dstates + state), 1)
    now_k = now_k[:, None]
    now_b = now_b[:, None]
    x = decays(log_w + start, offsets, real)
    passing *= through(x, document)

    pair_k, pair_b, grad = contracted(
        dy + start, v + start, sa + start, states, real,
        HEADS * N, HEADS * N, HEADS * N, N, C, KEYS, VALUES, PRODUCTS,
    )  # fmt: skip
    grad *= tl.where(sees_start[:, None], tl.exp(total(earlier(C), x, PARTS) + x), 0.0)
    r_t = rows(r + start, offsets, real).to(tl.float32)
    passing += tl.sum(r_t * grad, 0)
    grad += from_keys(
        pair_k, pair_b, k + start, b + start, x, offsets, real, document, first, False,
        LEVELS, PRODUCTS, PARTS,
    )  # fmt: skip
    flow = -r_t * grad
    grad += now_k * rows(k + start, offsets, real) + now_b * rows(b + start, offsets, real)
    tl.store(dr + start + offsets, grad.to(dr.dtype.element_ty), mask=inside)

    to_end = tl.where(reaches_end[:, None], tl.exp(total(later(C), x, PARTS)), 0.0)
    pair_r, pair_a, grad = contracted(
        v + start, dy + start, h, dstates, real,
        HEADS * N, HEADS * N, N, N, C, KEYS, VALUES, PRODUCTS,
    )  # fmt: skip
    grad = grad * to_end + from_queries(
        pair_r, pair_a, r + start, a + start, x, offsets, real, document, first, LEVELS, PRODUCTS, PARTS
    )
    flow += rows(k + start, offsets, real) * grad
    grad += now_k * rows(r + start, offsets, real)
    tl.store(dk + start + offsets, grad.to(dk.dtype.element_ty), mask=inside)

    pair_r, pair_a, grad = contracted(
        sa + start, dy + start, h, dstates, real,
        HEADS * N, HEADS * N, N, N, C, KEYS, VALUES, PRODUCTS,
    )  # fmt: skip
    grad = grad * to_end + from_queries(
        pair_r, pair_a, r + start, a + start, x, offsets, real, document, first, LEVELS, PRODUCTS, PARTS
    )
    flow += rows(b + start, offsets, real) * grad
    grad += now_b * rows(r + start, offsets, real)
    tl.store(db + start + offsets, grad.to(db.dtype.element_ty), mask=inside)

    pair_k, pair_b, grad = contracted(
        h, v + start, sa + start, states, real,
        N, HEADS * N, HEADS * N, N, C, KEYS, VALUES, PRODUCTS,
    )  # fmt: skip
    grad *= tl.where(sees_start[:, None], tl.exp(total(earlier(C), x, PARTS)), 0.0)
    a_t = rows(a + start, offsets, real).to(tl.float32)
    passing += tl.sum(a_t * grad, 0)
    grad += from_keys(
        pair_k, pair_b, k + start, b + start, x, offsets, real, document, first, True,
        LEVELS, PRODUCTS, PARTS,
    )  # fmt: skip
    tl.store(da + start + offsets, grad.to(da.dtype.element_ty), mask=inside)
    grad *= a_t
    grad = passing[None, :] + total(earlier(C), flow - grad, 3) - grad
    grad = tl.where(real[:, None] & (x > FORGOTTEN), grad, 0.0)
    tl.store(dlog_w + start + offsets, grad, mask=inside)
