"""The Triton kernels of sparse attention: the forward pass, and what both passes share.

Shape letters and tensors as in kernels/sparse_attention/__init__.py. A tile is SPAN consecutive tokens of a
list j; its rows are the heads of the list at these tokens, R = H / J of them at a token, so that a row's
token is row // R. A program has ROWS rows of a tile (a strip, where a token has more heads than that) and
walks the blocks that any of its tokens lists (walks.py), KEYS keys at a time; who does not list a block is
masked. W is N filled up to a power of two. With SPAN = 1 there is nothing to merge: `order` is the list.

Every offset that grows with the call is of 64 bits.
"""

import triton
import triton.language as tl

from kernels.wkv7.triton_chunk import product

# Arguments whose values do not make another compiled kernel.
SIZES = ("batch", "tokens", "blocks", "first", "tiles")
LARGEST_SHARE = tl.constexpr(1e6)  # as in lists.py
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def multiply(x, y, PRODUCTS: tl.constexpr):
    """x @ y, accumulated in float32."""
    if PRODUCTS == "fp16":
        return tl.dot(x.to(tl.float16), y.to(tl.float16))
    else:
        return product(x, y, PRODUCTS)


@triton.jit
def place(
    batch, tokens, first, tiles,
    HEADS: tl.constexpr, LISTS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Where a program works; late tiles come first, because their lists are the longest.

    Returns the row of the batch, the list, the tile among those of this launch; and of each of the ROWS rows
    its token in the tile, its token in the text, its head, and whether there is one.
    """
    PER: tl.constexpr = HEADS // LISTS
    STRIPS: tl.constexpr = (SPAN * PER + ROWS - 1) // ROWS
    at = tl.program_id(0)
    within = at % (batch * LISTS * STRIPS)
    tile = tiles - 1 - at // (batch * LISTS * STRIPS)
    j = within // STRIPS % LISTS
    rows = within % STRIPS * ROWS + tl.arange(0, ROWS)
    member = rows // PER
    token = (first + tile) * SPAN + member
    real = (member < SPAN) & (token < tokens)
    return within // (STRIPS * LISTS), j, tile, member, token, j * PER + rows % PER, real


@triton.jit
def row_offsets(b, token, head, tokens, HEADS: tl.constexpr):
    """Of rows in [B,T,H]."""
    return (b.to(tl.int64) * tokens + token) * HEADS + head


@triton.jit
def load_rows(x, row, real, N: tl.constexpr, W: tl.constexpr):
    """Rows [ROWS,W] of x [B,T,H,N], zero where there is none."""
    names = tl.arange(0, W)
    mask = real[:, None] & (names[None, :] < N)
    return tl.load(x + row[:, None] * N + names[None, :], mask=mask, other=0.0)


@triton.jit
def step_of(
    order, begins, run, member, LISTED: tl.constexpr, SPAN: tl.constexpr, MEMBERS: tl.constexpr
):  # fmt: skip
    """One block of a walk, and what it is to each row: 2 times its column in the list of the row's token, and
    1 more where it is only watched; -1 where it is not listed.

    `order` and `begins` are those of the tile; MEMBERS is a power of two that is not below SPAN.
    """
    if SPAN == 1:
        entry = tl.load(order + run)
        block = tl.where(entry >= 0, entry, -2 - entry)
        mine = tl.where(block >= 0, 2 * run + (entry < 0).to(tl.int32), -1)
        code = tl.where(member == 0, mine, -1)
    else:
        EACH: tl.constexpr = 2 * LISTED
        begin = tl.load(begins + run)
        end = tl.load(begins + run + 1, mask=run + 1 < SPAN * LISTED, other=SPAN * LISTED)
        at = begin + tl.arange(0, MEMBERS)
        keys = tl.load(order + at, mask=at < end, other=-1)
        block = tl.max(keys, 0) // (SPAN * EACH)
        slot = (keys - block * (SPAN * EACH)).to(tl.int32)
        who = tl.where(at < end, slot // EACH, -1)
        code = tl.max(tl.where(member[:, None] == who[None, :], (slot % EACH)[None, :], -1), 1)
    return tl.maximum(block, 0), code


@triton.jit
def visible_keys(starts, b, block, blocks, position, C: tl.constexpr):
    """How many keys of a block each row sees, were it listed."""
    first = tl.load(starts + b.to(tl.int64) * blocks + block)
    return tl.minimum(tl.maximum(position - first + 1, 0), C)


@triton.jit
def load_keys(
    x, b, block, blocks, keys, filled, group,
    GROUPS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Keys [KEYS,W] of a block of x [B,M,C,G,N], zero where they are not filled."""
    names = tl.arange(0, W)
    at = (((b.to(tl.int64) * blocks + block) * C + keys) * GROUPS + group) * N
    return tl.load(x + at[:, None] + names[None, :], mask=filled[:, None] & (names[None, :] < N), other=0.0)


@triton.jit(do_not_specialize=SIZES)
def attend(
    q, k, v, order, begins, counts, starts, positions, y, logs, entries,
    batch, tokens, blocks, first, tiles,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, LISTS: tl.constexpr, LISTED: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """y, the logarithm of each softmax's denominator, and of the part of it that falls on each entry.

    With PARTS > 1 the walk is shared among programs: y and logs are [PARTS,B,T,H(,N)], each of a part of the
    walk. `entries` is [B,tokens of this launch,J,K,R].
    """
    PER: tl.constexpr = HEADS // LISTS
    PIECES: tl.constexpr = (C + KEYS - 1) // KEYS
    b, j, tile, member, token, head, real = place(batch, tokens, first, tiles, HEADS, LISTS, ROWS, SPAN)
    row = row_offsets(b, token, head, tokens, HEADS)
    position = tl.load(positions + b.to(tl.int64) * tokens + token, mask=real, other=-1)
    query = load_rows(q, row, real & (position >= 0), N, W)
    here = (b.to(tl.int64) * tiles + tile) * LISTS + j
    order += here * (SPAN * LISTED)
    count = LISTED
    if SPAN > 1:
        begins += here * (SPAN * LISTED)
        count = tl.load(counts + here)
    own = ((b.to(tl.int64) * tiles + tile) * SPAN + member) * LISTS + j  # of the row's list in `entries`
    own = own * (LISTED * PER) + head % PER
    level = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, W], tl.float32)
    of_level = tl.full([ROWS], NOTHING, tl.float32)
    of_total = tl.zeros([ROWS], tl.float32)
    each = (count + PARTS - 1) // PARTS
    begin = tl.program_id(1) * each
    for step in range(begin * PIECES, tl.minimum(begin + each, count) * PIECES):
        block, code = step_of(order, begins, step // PIECES, member, LISTED, SPAN, MEMBERS)
        visible = tl.where(code >= 0, visible_keys(starts, b, block, blocks, position, C), 0)
        attended = (code >= 0) & (code % 2 == 0)
        keys = step % PIECES * KEYS + tl.arange(0, KEYS)
        filled = keys < tl.max(visible, 0)
        group = j // (LISTS // GROUPS)
        k_t = load_keys(k, b, block, blocks, keys, filled, group, GROUPS, N, C, W)
        v_t = load_keys(v, b, block, blocks, keys, filled, group, GROUPS, N, C, W)
        scores = multiply(query, tl.trans(k_t), PRODUCTS)
        scores = tl.where(keys[None, :] < visible[:, None], scores, NOTHING)
        if PIECES > 1:
            of_level = tl.where(step % PIECES == 0, NOTHING, of_level)
            of_total = tl.where(step % PIECES == 0, 0.0, of_total)
        else:
            of_level = tl.full([ROWS], NOTHING, tl.float32)
            of_total = tl.zeros([ROWS], tl.float32)
        # An attended entry is measured by the row's own level; what is only watched has one of its own.
        known = tl.where(attended, level, of_level)
        new = tl.maximum(known, tl.max(scores, 1))
        safe = tl.where(new == NOTHING, 0.0, new)
        weights = tl.exp(scores - safe[:, None])
        added = tl.sum(weights, 1)
        of_total = of_total * tl.exp(of_level - safe) + added
        of_level = new
        keep = tl.where(attended, tl.exp(level - safe), 1.0)
        total = total * keep + tl.where(attended, added, 0.0)
        level = tl.where(attended, new, level)
        weights = tl.where(attended[:, None], weights, 0.0)
        sums = sums * keep[:, None] + multiply(weights, v_t, PRODUCTS)
        if PIECES == 1 or step % PIECES == PIECES - 1:
            tl.store(entries + own + code // 2 * PER, of_level + tl.log(of_total), mask=real & (code >= 0))
    part = tl.program_id(1) * (batch.to(tl.int64) * tokens * HEADS)
    tl.store(logs + part + row, level + tl.log(total), mask=real)
    out = sums / tl.where(total > 0, total, 1.0)[:, None]
    names = tl.arange(0, W)
    mask = real[:, None] & (names[None, :] < N)
    tl.store(y + (part + row)[:, None] * N + names[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("rows",))
def combine(part_y, part_logs, y, logs, rows, N: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    """One row of [B,T,H] from its parts: the mean of their y, each weighed with its denominator."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS).to(tl.int64) * rows + row
    names = tl.arange(0, W)
    mask = names < N
    of_parts = tl.load(part_logs + parts)
    level = tl.max(of_parts, 0)
    weights = tl.exp(of_parts - tl.where(level == NOTHING, 0.0, level))
    total = tl.sum(weights, 0)
    each = tl.load(part_y + parts[:, None] * N + names[None, :], mask=mask[None, :], other=0.0)
    out = tl.sum(each * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(y + row * N + names, out.to(y.dtype.element_ty), mask=mask)
    tl.store(logs + row, level + tl.log(total))


@triton.jit(do_not_specialize=SIZES)
def shares(
    list_, starts, positions, logs, entries, share, tokens, blocks, first, tiles,
    HEADS: tl.constexpr, LISTS: tl.constexpr, LISTED: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The share of BLOCK entries of one token's lists: the mean of the heads' shares.

    Programs: (token of this launch times row, piece of the token's J * K entries).
    """
    PER: tl.constexpr = HEADS // LISTS
    here = tl.program_id(0).to(tl.int64)
    b = here // (tiles * SPAN)
    token = first * SPAN + here % (tiles * SPAN)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < LISTS * LISTED) & (token < tokens)
    row = b * tokens + token
    place = row * (LISTS * LISTED) + at
    entry = tl.load(list_ + place, mask=inside, other=-1)
    block = tl.where(entry >= 0, entry, -2 - entry)
    named = inside & (block >= 0)
    start = tl.load(starts + b * blocks + block, mask=named, other=0)
    seen = named & (start <= tl.load(positions + row, mask=token < tokens, other=-1))
    mean = tl.zeros([BLOCK], tl.float32)
    for head in range(PER):
        of_entry = tl.load(entries + (here * (LISTS * LISTED) + at) * PER + head, mask=seen, other=NOTHING)
        of_all = tl.load(logs + row * HEADS + at // LISTED * PER + head, mask=seen, other=NOTHING)
        some = of_all != NOTHING
        part = tl.exp(of_entry - tl.where(some, of_all, 0.0))
        mean += tl.where(some, tl.minimum(part, LARGEST_SHARE), 0.0)
    tl.store(share + place, mean / PER, mask=inside)
