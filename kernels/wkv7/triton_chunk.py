"""What the Triton kernels of WKV-7 share: one chunk of tokens, its decays, its documents and its pairs.

Notation of a chunk of C tokens, rows over tokens; S is the state before the chunk, D the gradient of the
state behind it, g the running sum of the log decay within the chunk:
    r~ = r e^g (and a~, of the token before), k_ = k e^{g_C - g} (and b_), pairs such as
    A_rk[i,j] = r_i . (k_j e^{g_i - g_j}) for j < i; r.k on the diagonal is kept apart; X = (I - A_ab)^-1
    U = X (a~ S + A_ak V) = W S + own ;  Y = r~ S + A_rk V + A_rb U ;  S' = e^{g_C} S + k_^T V + b_^T U
    H = dU = X^T (b_ D + A_rb^T dY) ;  dV = A_rk^T dY + A_ak^T H + k_ D ;  D' = e^{g_C} D + r~^T dY + a~^T H
No sum of log decays that reaches an exponential is a difference of sums, so that no digits cancel.

Kernels over chunks have one program for each chunk of each unit, a (row, head). Their scratch is [units of
this launch, chunks, ...]. Where they load a tensor again instead of keeping it, registers are too few.
"""

import triton
import triton.language as tl

RESET, PADDING = tl.constexpr(1), tl.constexpr(2)  # kernels/segments.py
FORGOTTEN = tl.constexpr(-60.0)  # a log decay below this is taken as this: e^-60 is nothing beside 1
# The lowest sum of log decays over half a chunk with which `level` may go the short way.
CENTRED = tl.constexpr(-40.0)

# Arguments whose values do not make another compiled kernel.
SIZES = ("tokens", "chunks", "first_unit")


@triton.jit
def nearest(x):
    """x rounded to TF32, which matrix units would cut it down to."""
    bits = (x.to(tl.float32).to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x @ y, accumulated in float32."""
    if PRECISION == "bf16":
        return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
    elif PRECISION == "tf32":
        return tl.dot(nearest(x), nearest(y), input_precision="tf32")
    else:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)


@triton.jit
def total(counted, x, PARTS: tl.constexpr):
    """Sums over tokens: of x [C,N] float32 over those that `counted` [C,C] marks in each row.

    x is split into bfloat16 parts: three hold all of its bits, and the marks are exact.
    """
    marks = counted.to(tl.bfloat16)
    part = x.to(tl.bfloat16)
    sums = tl.dot(marks, part)
    for _ in tl.static_range(1, PARTS):
        x -= part.to(tl.float32)
        part = x.to(tl.bfloat16)
        sums += tl.dot(marks, part)
    return sums


@triton.jit
def earlier(C: tl.constexpr):
    """[C,C]: whether the column's token comes before the row's."""
    at = tl.arange(0, C)
    return at[None, :] < at[:, None]


@triton.jit
def later(C: tl.constexpr):
    """[C,C]: whether the column's token comes after the row's."""
    at = tl.arange(0, C)
    return at[None, :] > at[:, None]


@triton.jit
def place(unit, chunk, tokens, HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Of a chunk: the offset of its first token in [B,T,H,N] and in [B,T], and how many tokens it has."""
    row = (unit // HEADS).to(tl.int64) * tokens + chunk * C
    return (row * HEADS + unit % HEADS) * N, row, tokens - chunk * C


@triton.jit
def tile(columns, STRIDE: tl.constexpr, C: tl.constexpr):
    """Offsets [C, columns] within a chunk whose rows lie STRIDE numbers apart."""
    return tl.arange(0, C)[:, None] * STRIDE + columns[None, :]


@triton.jit
def matrix(x, at, columns, ROWS: tl.constexpr, N: tl.constexpr):
    """Pointers to some columns [ROWS, columns] of matrix number `at` of x [..., ROWS, N]."""
    return x + at.to(tl.int64) * (ROWS * N) + (tl.arange(0, ROWS)[:, None] * N + columns[None, :])


@triton.jit
def rows(x, offsets, real):
    """Tokens of a chunk [C, columns], 0 for padding."""
    return tl.load(x + offsets, mask=real[:, None], other=0.0)


@triton.jit
def decays(log_w, offsets, real):
    """The log decays of a chunk [C,N], 0 for padding."""
    return tl.maximum(rows(log_w, offsets, real), FORGOTTEN)


@triton.jit
def segments(codes, row, left, C: tl.constexpr):
    """The documents of a chunk.

    Returns [C]: which tokens are there and no padding; whether a token sees the state before the chunk;
    whether the state behind it sees the token; and each token's document, counted from the chunk's start.
    """
    at = tl.arange(0, C)
    real = at < left
    document = tl.zeros([C], tl.int32)
    if codes is not None:
        code = tl.load(codes + row + at, mask=real, other=PADDING)
        real = code != PADDING
        document = tl.cumsum((code == RESET).to(tl.int32), 0)
    return real, document == 0, document == tl.max(document, 0), document


@triton.jit
def through(x, document):
    """The decay of each column of x from the chunk's start to its end; 0 where a document begins between."""
    return tl.where(tl.max(document, 0) == 0, tl.exp(tl.sum(x, 0)), 0.0)


@triton.jit
def first_level(
    log_w, real, HEADS: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """Where the loop over `level` begins: at the last level if the decays of the chunk let one matrix product
    make all its pairs, else at 0."""
    C: tl.constexpr = real.shape[0]
    early = (tl.arange(0, C) < C // 2)[:, None]
    lowest = 0.0
    for begin in range(0, N, KEYS):
        x = decays(log_w, tile(begin + tl.arange(0, KEYS), HEADS * N, C), real)
        halves = tl.minimum(tl.sum(tl.where(early, x, 0.0), 0), tl.sum(tl.where(early, 0.0, x), 0))
        lowest = tl.minimum(lowest, tl.min(halves, 0))
    return tl.where(lowest > CENTRED, LEVELS - 1, 0)


@triton.jit
def level(number, first, x, LEVELS: tl.constexpr, PARTS: tl.constexpr):
    """Decays of pairs, as factors of the queries and of the keys, measured from the middle between the two.

    The chunk is cut into blocks of 2^number tokens. In a level, queries of every second block meet the keys
    of the block before: no exponent is above 0, and all levels together make all pairs of the chunk. Where
    the loop begins at its last level, the two halves of the chunk, that level makes the pairs within the
    halves too; there exponents above 0 meet others that are as far below.

    Args:
        number, first: of the level and of the first level.
        x: [C,N] log decays.

    Returns:
        Factors [C,N] of r, of a (which is read a token earlier) and of the keys; 0 for tokens that are none
        of these in this level.
    """
    C: tl.constexpr = x.shape[0]
    at = tl.arange(0, C)
    block = at >> number
    late = ((block & 1) == 1)[:, None]
    side = (at[None, :] < at[:, None]) == late
    centred = first == LEVELS - 1
    beyond = total((block[None, :] == block[:, None]) & side & (at[None, :] != at[:, None]), x, PARTS)
    own = beyond + x
    read = tl.where(late | centred, tl.exp(tl.where(late, own, -beyond)), 0.0)
    read_before = tl.where(late | centred, tl.exp(tl.where(late, beyond, -own)), 0.0)
    key = tl.where(late & (first == 0), 0.0, tl.exp(tl.where(late, -own, beyond)))
    return read, read_before, key


@triton.jit
def meet(query, key, number, first, document_query, document_key, LEVELS: tl.constexpr):
    """Which tokens make a pair in a level of `level`.

    Args:
        query, key: their places, shaped to broadcast, as are their documents.
        number, first: as for `level`.
    """
    apart = ((query >> number) != (key >> number)) & ((query >> number >> 1) == (key >> number >> 1))
    return (key < query) & (document_query == document_key) & (apart | (first == LEVELS - 1))


@triton.jit
def pairs(number, first, document, LEVELS: tl.constexpr):
    """[C,C]: pairs of a level, queries in rows."""
    at = tl.arange(0, document.shape[0])
    return meet(at[:, None], at[None, :], number, first, document[:, None], document[None, :], LEVELS)


@triton.jit
def inverse(a_b, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I - a_b)^-1 for strictly lower triangular a_b [C,C].

    The inverses of blocks are joined into those of blocks twice as large: no powers, which would grow like
    binomials when keys repeat.
    """
    C: tl.constexpr = a_b.shape[0]
    at = tl.arange(0, C)
    found = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    found += tl.where(at[:, None] >> 1 == at[None, :] >> 1, a_b, 0.0)
    for number in range(1, LEVELS):
        block = at >> number
        joins = (block[:, None] >> 1 == block[None, :] >> 1) & (block[:, None] != block[None, :])
        corner = product(tl.where(joins, a_b, 0.0), found, PRECISION)
        found += product(found, corner, PRECISION)
    return found
