"""The Triton kernels of sparse attention: the backward pass. See triton_forward.py.

The weights are computed again from the logarithms of the denominators. With D = dy . y of a row, the gradient
of a score is its weight times (dy . v - D). Every sum has a fixed order: dq is summed along the walk of a
tile, dk and dv over the tokens that attend to a block, in their order.
"""

import triton
import triton.language as tl

from kernels.sparse_attention.triton_forward import (
    SIZES,
    load_keys,
    load_rows,
    multiply,
    place,
    row_offsets,
    step_of,
    visible_keys,
)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    dy, q, k, v, order, begins, counts, starts, positions, y, logs, meeting, dq,
    batch, tokens, blocks, first, tiles,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, LISTS: tl.constexpr, LISTED: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr,
    MEMBERS: tl.constexpr, PRODUCTS: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """dq, and D of each row in `meeting` [B,T,H]; programs as those of `attend`."""
    PIECES: tl.constexpr = (C + KEYS - 1) // KEYS
    b, j, tile, member, token, head, real = place(batch, tokens, first, tiles, HEADS, LISTS, ROWS, SPAN)
    row = row_offsets(b, token, head, tokens, HEADS)
    position = tl.load(positions + b.to(tl.int64) * tokens + token, mask=real, other=-1)
    there = real & (position >= 0)
    query = load_rows(q, row, there, N, W)
    upstream = load_rows(dy, row, there, N, W)
    mean = tl.sum(upstream.to(tl.float32) * load_rows(y, row, there, N, W).to(tl.float32), 1)
    tl.store(meeting + row, mean, mask=real)
    log = tl.load(logs + row, mask=there, other=0.0)
    here = (b.to(tl.int64) * tiles + tile) * LISTS + j
    order += here * (SPAN * LISTED)
    count = LISTED
    if SPAN > 1:
        begins += here * (SPAN * LISTED)
        count = tl.load(counts + here)
    sums = tl.zeros([ROWS, W], tl.float32)
    for step in range(count * PIECES):
        block, code = step_of(order, begins, step // PIECES, member, LISTED, SPAN, MEMBERS)
        attended = (code >= 0) & (code % 2 == 0)
        visible = tl.where(attended, visible_keys(starts, b, block, blocks, position, C), 0)
        keys = step % PIECES * KEYS + tl.arange(0, KEYS)
        filled = keys < tl.max(visible, 0)
        group = j // (LISTS // GROUPS)
        k_t = load_keys(k, b, block, blocks, keys, filled, group, GROUPS, N, C, W)
        v_t = load_keys(v, b, block, blocks, keys, filled, group, GROUPS, N, C, W)
        weights = tl.exp(multiply(query, tl.trans(k_t), PRODUCTS) - log[:, None])
        slopes = weights * (multiply(upstream, tl.trans(v_t), PRODUCTS) - mean[:, None])
        slopes = tl.where(keys[None, :] < visible[:, None], slopes, 0.0)
        sums += multiply(slopes, k_t, SLOPES)
    names = tl.arange(0, W)
    mask = real[:, None] & (names[None, :] < N)
    tl.store(dq + row[:, None] * N + names[None, :], sums.to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tokens", "blocks", "first", "units"))
def key_gradients(
    dy, q, k, v, order, begins, starts, positions, logs, meeting, dk, dv,
    tokens, blocks, first, units,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, LISTS: tl.constexpr, LISTED: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRODUCTS: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys of a block: ROWS of those rows at a time whose tokens attend to it.

    A unit is a (row of the batch, key/value head); this launch has `units` of them, from `first` on. `order`
    and `begins` are walks.Readers of these. Early blocks come first, because they have the most readers.
    """
    PER: tl.constexpr = HEADS // LISTS
    OF_GROUP: tl.constexpr = LISTS // GROUPS
    PIECES: tl.constexpr = (C + KEYS - 1) // KEYS
    at = tl.program_id(0)
    piece, unit = at % PIECES, at // PIECES % units
    block = at // (PIECES * units)
    b, group = (first + unit) // GROUPS, (first + unit) % GROUPS
    keys = piece * KEYS + tl.arange(0, KEYS)
    inside = keys < C
    # Places that nobody sees may hold anything: their numbers stay in their own rows, and are dropped there.
    k_t = load_keys(k, b, block, blocks, keys, inside, group, GROUPS, N, C, W)
    v_t = load_keys(v, b, block, blocks, keys, inside, group, GROUPS, N, C, W)
    of_keys = tl.zeros([KEYS, W], tl.float32)
    of_values = tl.zeros([KEYS, W], tl.float32)
    for number in range(OF_GROUP):
        here = unit.to(tl.int64) * OF_GROUP + number
        begin = tl.load(begins + here * (blocks + 1) + block)
        end = tl.load(begins + here * (blocks + 1) + block + 1)
        mine = order + here * (tokens.to(tl.int64) * LISTED) + begin
        for some in range(0, (end - begin) * PER, ROWS):
            rows = some + tl.arange(0, ROWS)
            real = rows < (end - begin) * PER
            token = tl.load(mine + rows // PER, mask=real, other=0) % tokens
            head = (group * OF_GROUP + number) * PER + rows % PER
            row = row_offsets(b, token, head, tokens, HEADS)
            query = load_rows(q, row, real, N, W)
            upstream = load_rows(dy, row, real, N, W)
            log = tl.load(logs + row, mask=real, other=0.0)
            mean = tl.load(meeting + row, mask=real, other=0.0)
            position = tl.load(positions + b.to(tl.int64) * tokens + token, mask=real, other=0)
            visible = tl.where(real, visible_keys(starts, b, block, blocks, position, C), 0)
            seen = keys[:, None] < visible[None, :]
            weights = tl.exp(multiply(k_t, tl.trans(query), PRODUCTS) - log[None, :])
            weights = tl.where(seen, weights, 0.0)
            of_values += multiply(weights, upstream, PRODUCTS)
            slopes = multiply(v_t, tl.trans(upstream), PRODUCTS) - mean[None, :]
            slopes = tl.where(seen, weights * slopes, 0.0)
            of_keys += multiply(slopes, query, SLOPES)
    names = tl.arange(0, W)
    out = (((b.to(tl.int64) * blocks + block) * C + keys) * GROUPS + group) * N
    mask = inside[:, None] & (names[None, :] < N)
    tl.store(dk + out[:, None] + names[None, :], of_keys.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + out[:, None] + names[None, :], of_values.to(dv.dtype.element_ty), mask=mask)
