"""The Triton kernels of WKV-6: chunks in parallel, and between them the scan that WKV-7 has too.

Notation of one chunk of C tokens, rows over tokens; S is the state before the chunk, D the gradient of the
state behind it, g the running sum of the log decay within the chunk:
    r~ = r e^g (with a bonus u, of the token before), k_ = k e^{g_C - g}, A[i,j] = r_i . (k_j e^{g_i - g_j})
    for j < i (with u: g_{i-1}); own = r . k, with u weighed by it
    Y = r~ S + A V + own V ;  S' = e^{g_C} S + k_^T V
    G = dY V^T, its part below the diagonal ;  dV = A^T dY + own dY + k_ D ;  D' = e^{g_C} D + r~^T dY
    dr = e^g (dY S^T) + those k_j e^{g_i - g_j} of G ;  dk = e^{g_C - g} (V D^T) + those r_i of G^T
No sum of log decays that reaches an exponential is a difference of sums, so that no digits cancel.

Every kernel has one program for each chunk (key_gradients: and block of key channels) of each unit, a (row,
head). They go through the key channels in blocks, because registers are too few for all of them at once.
Scratch is [units of this launch, chunks, ...].
"""

import triton
import triton.language as tl

from kernels.wkv7.triton_chunk import (
    PADDING,
    RESET,
    earlier,
    later,
    matrix,
    place,
    product,
    rows,
    segments,
    through,
    tile,
    total,
)

FORGOTTEN = tl.constexpr(-110.0)  # e^-110 is 0 in float32: a log decay below this is taken as this


@triton.jit
def decays(log_w, offsets, real):
    """The log decays of a chunk [C, offsets], 0 for padding; finite, to be summed by matrix products."""
    return tl.maximum(rows(log_w, offsets, real), FORGOTTEN)


@triton.jit
def first_level(x, LOWEST: tl.constexpr, C: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr):
    """Where the loop over `level` begins: at the largest blocks over which no log decay x [C,N] sums to less
    than LOWEST, for there exponents of either sign stay harmless."""
    sums = x
    levels = tl.zeros([N], tl.int32)
    for number in tl.static_range(1, LEVELS):
        sums = tl.sum(tl.reshape(sums, [C >> number, 2, N]), 1)
        levels += (tl.min(sums, 0) > LOWEST).to(tl.int32)
    return tl.min(levels, 0)


@triton.jit
def level(number, first, x, BONUS: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """Decays of pairs, as factors of the queries and of the keys, measured from the middle between the two.

    The chunk is cut into blocks of 2^number tokens. In a level, queries of every second block meet the keys
    of the block before: no exponent is above 0, and all levels from 0 on make all pairs of the chunk. If the
    loop begins later, its first level makes the pairs within its blocks too; there exponents above 0 meet
    others that are at least as far below.

    Args:
        number, first: of the level and of the first level.
        x: [C,N] log decays.
        BONUS: the queries are read before the decay of their own token.

    Returns:
        Factors [C,N] of the queries and of the keys, and the pairs [C,C] of the level.
    """
    at = tl.arange(0, C)
    block = at >> number
    late = ((block & 1) == 1)[:, None]
    before = at[None, :] < at[:, None]
    within = block[None, :] == block[:, None]
    beyond = total(within & (before == late) & (at[None, :] != at[:, None]), x, PARTS)
    own = beyond + x
    centred = (number == first) & (first > 0)
    if BONUS:
        read = tl.where(late, beyond, -own)
    else:
        read = tl.where(late, own, -beyond)
    read = tl.where(late | centred, tl.exp(tl.where(late | centred, read, 0.0)), 0.0)
    key = tl.where(late, -own, beyond)
    key = tl.where(late & (not centred), 0.0, tl.exp(tl.where(late & (not centred), 0.0, key)))
    meet = (block[:, None] >> 1 == block[None, :] >> 1) & ((block[:, None] != block[None, :]) | centred)
    return read, key, before & meet


@triton.jit
def crossing(number, taken, added, BONUS: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """What the pairs of a level give each token's log decay [C,N].

    It belongs to the pairs whose key is earlier and whose query is not: before the middle between two blocks
    what the keys so far have added, behind it what is still to be taken by queries. Pairs within a block of
    the first level alone begin and end on one side of the middle and cancel.

    Args:
        taken, added: [C,N], query times its gradient, and key times its gradient, of the level.
    """
    at = tl.arange(0, C)
    block = at >> number
    late = ((block & 1) == 1)[:, None]
    side = ((at[None, :] < at[:, None]) != late) & (at[None, :] != at[:, None])
    flow = tl.where(late, taken - added, added - taken)
    found = total((block[None, :] == block[:, None]) & side, flow, PARTS)
    if BONUS:
        return found - tl.where(late, added, taken)
    else:
        return found + tl.where(late, flow, 0.0)


@triton.jit
def seen_from_start(x, sees_start, BONUS: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """Factors [C,N] of the queries of the state before the chunk."""
    sums = total(earlier(C), x, PARTS)
    if not BONUS:
        sums += x
    return tl.where(sees_start[:, None], tl.exp(sums), 0.0)


@triton.jit
def kept_to_end(x, reaches_end, C: tl.constexpr, PARTS: tl.constexpr):
    """Factors [C,N] of the keys in the state behind the chunk."""
    return tl.where(reaches_end[:, None], tl.exp(total(later(C), x, PARTS)), 0.0)


@triton.jit
def bonus(u, names, head):
    """Weights [1, names] of the current token, u from `head` on; ones without u."""
    weights = tl.full(names.shape, 1.0, tl.float32)
    if u is not None:
        weights = tl.load(u + head + names)
    return weights[None, :]


@triton.jit
def matrix_rows(x, at, names, N: tl.constexpr):
    """Pointers to some rows [names, N] of matrix number `at` of x [..., N, N]."""
    return x + at.to(tl.int64) * (N * N) + (names[:, None] * N + tl.arange(0, N)[None, :])


@triton.jit
def add_up(
    r, log_w, k, v, codes, dy, added, dadded, keep, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    BONUS: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a chunk does to any state, S' = keep S + added, and unless dy is None also to any gradient,
    D' = keep D + dadded.

    Writes added and dadded [N,N], keep [N].
    """
    at = tl.program_id(0)
    start, row, left = place(first_unit + at // chunks, at % chunks, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    values = tile(tl.arange(0, N), HEADS * N, C)
    v_t = rows(v + start, values, real)
    if dy is not None:
        dy_t = rows(dy + start, values, real)
    for begin in range(0, N, BLOCK):
        names = begin + tl.arange(0, BLOCK)
        offsets = tile(names, HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        tl.store(keep + at.to(tl.int64) * N + names, through(x, document))
        k_end = rows(k + start, offsets, real).to(tl.float32) * kept_to_end(x, reaches_end, C, PARTS)
        tl.store(matrix_rows(added, at, names, N), product(tl.trans(k_end), v_t, PRODUCTS))
        if dy is not None:
            query = rows(r + start, offsets, real).to(tl.float32)
            query *= seen_from_start(x, sees_start, BONUS, C, PARTS)
            tl.store(matrix_rows(dadded, at, names, N), product(tl.trans(query), dy_t, PRODUCTS))


@triton.jit
def read_out(
    r, log_w, k, v, u, codes, states, y, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    LOWEST: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Y, from the state before each chunk."""
    at = tl.program_id(0)
    unit = first_unit + at // chunks
    start, row, left = place(unit, at % chunks, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    pairs = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    out = tl.zeros([C, N], tl.float32)
    for begin in range(0, N, BLOCK):
        names = begin + tl.arange(0, BLOCK)
        offsets = tile(names, HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        r_t = rows(r + start, offsets, real).to(tl.float32)
        k_t = rows(k + start, offsets, real).to(tl.float32)
        weights = bonus(u, names, (unit % HEADS) * N)
        own += tl.sum(r_t * k_t * weights, 1)
        query = r_t * seen_from_start(x, sees_start, u is not None, C, PARTS)
        out += product(query, tl.load(matrix_rows(states, at, names, N)), PRODUCTS)
        first = first_level(x, LOWEST, C, BLOCK, LEVELS)
        for number in range(first, LEVELS):
            read, key, meet = level(number, first, x, u is not None, C, PARTS)
            pairs += tl.where(meet, product(r_t * read, tl.trans(k_t * key), PRODUCTS), 0.0)
    pairs = tl.where(document[:, None] == document[None, :], pairs, 0.0)
    values = tile(tl.arange(0, N), HEADS * N, C)
    v_t = rows(v + start, values, real).to(tl.float32)
    out += product(pairs, v_t, PRODUCTS) + own[:, None] * v_t
    tl.store(y + start + values, out.to(y.dtype.element_ty), mask=(tl.arange(0, C) < left)[:, None])


@triton.jit
def value_gradients(
    r, log_w, k, u, codes, dy, dstates, dv, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    LOWEST: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dV, from the gradient of the state behind each chunk."""
    at = tl.program_id(0)
    unit = first_unit + at // chunks
    start, row, left = place(unit, at % chunks, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    pairs = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    out = tl.zeros([C, N], tl.float32)
    for begin in range(0, N, BLOCK):
        names = begin + tl.arange(0, BLOCK)
        offsets = tile(names, HEADS * N, C)
        x = decays(log_w + start, offsets, real)
        r_t = rows(r + start, offsets, real).to(tl.float32)
        k_t = rows(k + start, offsets, real).to(tl.float32)
        weights = bonus(u, names, (unit % HEADS) * N)
        own += tl.sum(r_t * k_t * weights, 1)
        k_end = k_t * kept_to_end(x, reaches_end, C, PARTS)
        out += product(k_end, tl.load(matrix_rows(dstates, at, names, N)), PRODUCTS)
        first = first_level(x, LOWEST, C, BLOCK, LEVELS)
        for number in range(first, LEVELS):
            read, key, meet = level(number, first, x, u is not None, C, PARTS)
            pairs += tl.where(meet, product(r_t * read, tl.trans(k_t * key), PRODUCTS), 0.0)
    pairs = tl.where(document[:, None] == document[None, :], pairs, 0.0)
    values = tile(tl.arange(0, N), HEADS * N, C)
    dy_t = rows(dy + start, values, real).to(tl.float32)
    out += product(tl.trans(pairs), dy_t, PRODUCTS) + own[:, None] * dy_t
    tl.store(dv + start + values, out.to(dv.dtype.element_ty), mask=(tl.arange(0, C) < left)[:, None])


@triton.jit
def key_gradients(
    r, log_w, k, v, u, codes, dy, states, dstates, dr, dlog_w, dk, du, tokens, chunks, first_unit,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    LOWEST: tl.constexpr, PRODUCTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients of r, log_w and k, from the state before each chunk and the gradient of that behind it;
    of u, the chunk's part [all units, chunks, N]. One program for each BLOCK key channels.

    The gradient of a token's log decay is all that crosses it: from S to D, from S to later queries, from
    earlier keys to D, and from earlier keys to later queries. Pairs of consecutive tokens, which with a bonus
    cross nothing, are kept out of it: where all decays are strong, rounding them would cover the rest.
    """
    at = tl.program_id(0) // (N // BLOCK)
    names = tl.program_id(0) % (N // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    unit = first_unit + at // chunks
    start, row, left = place(unit, at % chunks, tokens, HEADS, N, C)
    real, sees_start, reaches_end, document = segments(codes, row, left, C)
    inside = (tl.arange(0, C) < left)[:, None]
    values = tile(tl.arange(0, N), HEADS * N, C)
    v_t = rows(v + start, values, real)
    dy_t = rows(dy + start, values, real)
    g = product(dy_t, tl.trans(v_t), PRODUCTS)
    g = tl.where(document[:, None] == document[None, :], g, 0.0)
    if u is not None:
        count = tl.cumsum(real.to(tl.int32), 0)
        consecutive = count[:, None] - count[None, :] == 1
        g_next = tl.where(consecutive, g, 0.0)
        g = tl.where(consecutive, 0.0, g)
    down = tl.sum(dy_t.to(tl.float32) * v_t.to(tl.float32), 1)[:, None]
    offsets = tile(names, HEADS * N, C)
    x = decays(log_w + start, offsets, real)
    r_t = rows(r + start, offsets, real).to(tl.float32)
    k_t = rows(k + start, offsets, real).to(tl.float32)
    state = tl.load(matrix_rows(states, at, names, N))
    dstate = tl.load(matrix_rows(dstates, at, names, N))
    decay = (tl.sum(state * dstate, 1) * through(x, document))[None, :]
    dr_t = product(dy_t, tl.trans(state), PRODUCTS) * seen_from_start(x, sees_start, u is not None, C, PARTS)
    dk_t = product(v_t, tl.trans(dstate), PRODUCTS) * kept_to_end(x, reaches_end, C, PARTS)
    taken = r_t * dr_t
    decay += total(later(C), taken, PARTS) + total(earlier(C), k_t * dk_t, PARTS)
    if u is None:
        decay += taken
    first = first_level(x, LOWEST, C, BLOCK, LEVELS)
    for number in range(first, LEVELS):
        read, key, meet = level(number, first, x, u is not None, C, PARTS)
        met = tl.where(meet, g, 0.0)
        query = read * product(met, k_t * key, PRODUCTS)
        written = key * product(tl.trans(met), r_t * read, PRODUCTS)
        dr_t += query
        dk_t += written
        decay += crossing(number, r_t * query, k_t * written, u is not None, C, PARTS)
    if u is not None:
        dr_t += product(g_next, k_t, PRODUCTS)
        dk_t += product(tl.trans(g_next), r_t, PRODUCTS)
    decay = tl.where(real[:, None] & (x > FORGOTTEN), decay, 0.0)
    tl.store(dlog_w + start + offsets, decay, mask=inside)
    weights = bonus(u, names, (unit % HEADS) * N)
    now = down * weights
    tl.store(dr + start + offsets, (dr_t + now * k_t).to(dr.dtype.element_ty), mask=inside)
    tl.store(dk + start + offsets, (dk_t + now * r_t).to(dk.dtype.element_ty), mask=inside)
    if u is not None:
        part = tl.sum(down * r_t * k_t, 0)
        tl.store(du + (unit.to(tl.int64) * chunks + at % chunks) * N + names, part)


@triton.jit
def decode(
    r, log_w, k, v, u, state, codes, y,
    HEADS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of a unit, BLOCK values; the state is changed in place."""
    unit = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    names = unit * N + tl.arange(0, N)
    values = unit * N + columns
    code = 0
    if codes is not None:
        code = tl.load(codes + unit // HEADS).to(tl.int32)
    real = code != PADDING
    here = matrix(state, unit, columns, N, N)
    s = tl.load(here)
    s = tl.where(code == RESET, 0.0, s)
    w = tl.exp(tl.load(log_w + names, mask=real, other=0.0))[:, None]
    r_t = tl.load(r + names, mask=real, other=0.0).to(tl.float32)[:, None]
    k_t = tl.load(k + names, mask=real, other=0.0).to(tl.float32)[:, None]
    v_t = tl.load(v + values, mask=real, other=0.0).to(tl.float32)[None, :]
    after = w * s + k_t * v_t
    if u is None:
        seen = after
    else:
        seen = s + tl.load(u + (unit % HEADS) * N + tl.arange(0, N))[:, None] * k_t * v_t
    tl.store(here, after)
    tl.store(y + values, tl.sum(r_t * seen, 0).to(y.dtype.element_ty))
