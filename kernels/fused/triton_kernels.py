"""The fused kernels in Triton; this module needs the triton package. Their definitions: reference.py.

A program takes TOKENS consecutive tokens (of all rows) of one head, key/value head or block of channels. It
works in float32 whatever it reads, and keeps nothing for the backward pass, which computes everything again
from the inputs. Gradients of parameters are sums over tokens: each program writes its own part, which the
caller adds up, so that results never depend on the order of execution.
"""

import triton
import triton.language as tl


@triton.jit
def _read(pointer, at, here):
    """A tile in float32; zero where there is no token."""
    return tl.load(pointer + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, at, here, value):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=here)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x in [-0.61, 0], to the last digits also near 0, where a difference would lose them."""
    sum = 1.0 + x * (1.0 / 10)
    for n in tl.static_range(9, 1, -1):
        sum = 1.0 + x * (1.0 / n) * sum
    return x * sum


@triton.jit
def _normalised(x, eps):
    """Rows of x [TOKENS,N] divided by their length, but at least by eps; and what they were divided by."""
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), eps)[:, None]
    return x / length, length


@triton.jit
def _normalised_backward(gradient, unit, length, eps):
    """The gradient of the rows that `_normalised` was given."""
    along = tl.sum(gradient * unit, axis=1)[:, None]
    return (gradient - tl.where(length > eps, unit * along, 0.0)) / length


@triton.jit
def prepare_forward(
    decay, rate, key, removed_scale, written_mix, log_w, written, a, b, tokens, rate_range, decay_scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, key/value heads); GROUP heads share a key."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    kv_head = tl.program_id(1)
    channel = tl.arange(0, N)[None, :]
    here = token < tokens
    x = _read(key, (token * (HEADS // GROUP) + kv_head) * N + channel, here)
    unit, _ = _normalised(x, eps)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        at = (token * HEADS + head) * N + channel
        log_decay = -decay_scale * tl.sigmoid(_read(decay, at, here))
        learned = rate_range * tl.sigmoid(_read(rate, at, here))
        if RAW:
            of_head = head * N + channel
            unit, _ = _normalised(x * tl.load(removed_scale + of_head), eps)
            k = x * (1.0 + (learned - 1.0) * tl.load(written_mix + of_head))
        else:
            k = unit * (learned - _expm1(log_decay))
        _write(log_w, at, here, log_decay)
        _write(written, at, here, k)
        _write(a, at, here, -unit)
        _write(b, at, here, unit * learned)


@triton.jit
def prepare_backward(
    dlog_w, dwritten, da, db, decay, rate, key, removed_scale, written_mix,
    ddecay, drate, dkey, dscale_parts, dmix_parts, tokens, rate_range, decay_scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Grid as `prepare_forward`; dscale_parts and dmix_parts are [blocks of tokens, H, N]."""
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)[:, None]
    kv_head = tl.program_id(1)
    channel = tl.arange(0, N)[None, :]
    here = token < tokens
    key_at = (token * (HEADS // GROUP) + kv_head) * N + channel
    x = _read(key, key_at, here)
    unit, length = _normalised(x, eps)
    dx = tl.zeros([TOKENS, N], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        at = (token * HEADS + head) * N + channel
        z = _read(decay, at, here)
        log_decay = -decay_scale * tl.sigmoid(z)
        s = _read(rate, at, here)
        learned = rate_range * tl.sigmoid(s)
        dlog_decay = _read(dlog_w, at, here)
        dk = _read(dwritten, at, here)
        d_b = _read(db, at, here)
        dunit = d_b * learned - _read(da, at, here)
        if RAW:
            of_head = head * N + channel
            scale = tl.load(removed_scale + of_head)
            mix = tl.load(written_mix + of_head)
            unit, length = _normalised(x * scale, eps)
            dscaled = _normalised_backward(dunit, unit, length, eps)
            dx += dscaled * scale + dk * (1.0 + (learned - 1.0) * mix)
            dlearned = d_b * unit + dk * x * mix
            part_at = (block * HEADS + head) * N + tl.arange(0, N)
            tl.store(dscale_parts + part_at, tl.sum(dscaled * x, axis=0))
            tl.store(dmix_parts + part_at, tl.sum(dk * x * (learned - 1.0), axis=0))
        else:
            kept = _expm1(log_decay)
            dunit += dk * (learned - kept)
            dx += _normalised_backward(dunit, unit, length, eps)
            dlearned = (d_b + dk) * unit
            dlog_decay -= dk * unit * (1.0 + kept)
        _write(ddecay, at, here, dlog_decay * log_decay * tl.sigmoid(-z))
        _write(drate, at, here, dlearned * learned * tl.sigmoid(-s))
    _write(dkey, key_at, here, dx)


@triton.jit
def _standardised(x, eps, N: tl.constexpr):
    """Rows of x [TOKENS,N] with mean 0 and variance 1; and one over their standard deviation."""
    centred = x - tl.sum(x, axis=1)[:, None] / N
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1)[:, None] / N + eps)
    return centred * scale, scale


@triton.jit
def finish_forward(
    y, norm_weight, norm_bias, r, k, v, bonus, gate, out, tokens, eps,
    HEADS: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr,
    NORM: tl.constexpr, BONUS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, heads)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1)
    channel = tl.arange(0, N)[None, :]
    here = token < tokens
    at = (token * HEADS + head) * N + channel
    of_head = head * N + channel
    x = _read(y, at, here)
    if NORM:
        standard, _ = _standardised(x, eps, N)
        x = standard * tl.load(norm_weight + of_head) + tl.load(norm_bias + of_head)
    if BONUS:
        weight = tl.sum(_read(r, at, here) * _read(k, at, here) * tl.load(bonus + of_head), axis=1)
        x += weight[:, None] * _read(v, at, here)
    if GATE:
        x *= _read(gate, at, here)
    _write(out, at, here, x)


@triton.jit
def finish_backward(
    d_out, y, norm_weight, norm_bias, r, k, v, bonus, gate,
    dy, dweight_parts, dbias_parts, dr, dk, dv, dbonus_parts, dgate, tokens, eps,
    HEADS: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr,
    NORM: tl.constexpr, BONUS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Grid as `finish_forward`; the parts are [blocks of tokens, H, N]."""
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1)
    channel = tl.arange(0, N)[None, :]
    here = token < tokens
    at = (token * HEADS + head) * N + channel
    of_head = head * N + channel
    part_at = (block * HEADS + head) * N + tl.arange(0, N)
    x = _read(y, at, here)
    g = _read(d_out, at, here)
    upstream = g
    if GATE:
        g *= _read(gate, at, here)
    if NORM:
        standard, scale = _standardised(x, eps, N)
        weight = tl.load(norm_weight + of_head)
        x = standard * weight + tl.load(norm_bias + of_head)
        tl.store(dweight_parts + part_at, tl.sum(g * standard, axis=0))
        tl.store(dbias_parts + part_at, tl.sum(g, axis=0))
        slope = g * weight
        along = tl.sum(slope * standard, axis=1)[:, None] / N
        _write(dy, at, here, (slope - tl.sum(slope, axis=1)[:, None] / N - standard * along) * scale)
    else:
        _write(dy, at, here, g)
    if BONUS:
        receptance = _read(r, at, here)
        key = _read(k, at, here)
        value = _read(v, at, here)
        u = tl.load(bonus + of_head)
        read = tl.sum(receptance * key * u, axis=1)[:, None]
        dread = tl.sum(g * value, axis=1)[:, None]
        x += read * value
        _write(dv, at, here, g * read)
        _write(dr, at, here, dread * key * u)
        _write(dk, at, here, dread * receptance * u)
        tl.store(dbonus_parts + part_at, tl.sum(dread * receptance * key, axis=0))
    if GATE:
        _write(dgate, at, here, upstream * x)


@triton.jit
def shift_forward(
    hidden, previous, mixes, out0, out1, out2, out3, out4, out5, tokens,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, blocks of channels)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    here = (token < tokens) & (channel < WIDTH)
    at = token * WIDTH + channel
    x = _read(hidden, at, here)
    change = _read(previous, at, here) - x
    real = channel < WIDTH
    _write(out0, at, here, x + change * _read(mixes, channel, real))
    _write(out1, at, here, x + change * _read(mixes, WIDTH + channel, real))
    _write(out2, at, here, x + change * _read(mixes, 2 * WIDTH + channel, real))
    _write(out3, at, here, x + change * _read(mixes, 3 * WIDTH + channel, real))
    _write(out4, at, here, x + change * _read(mixes, 4 * WIDTH + channel, real))
    _write(out5, at, here, x + change * _read(mixes, 5 * WIDTH + channel, real))


@triton.jit
def _one_mix(
    d_out, mixes, dmix_parts, at, here, channel, change, block, index: tl.constexpr, WIDTH: tl.constexpr
):
    """One mix's share of (the gradient of hidden, that of previous); writes the part of its own."""
    real = channel < WIDTH
    g = _read(d_out, at, here)
    mix = _read(mixes, index * WIDTH + channel, real)
    part = tl.sum(g * change, axis=0)[None, :]
    tl.store(dmix_parts + (block * 6 + index) * WIDTH + channel, part, mask=real)
    return g * (1.0 - mix), g * mix


@triton.jit
def shift_backward(
    d_out0, d_out1, d_out2, d_out3, d_out4, d_out5, hidden, previous, mixes,
    dhidden, dprevious, dmix_parts, tokens,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid as `shift_forward`; dmix_parts is [blocks of tokens, 6, D]."""
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    here = (token < tokens) & (channel < WIDTH)
    at = token * WIDTH + channel
    change = _read(previous, at, here) - _read(hidden, at, here)
    own0, last0 = _one_mix(d_out0, mixes, dmix_parts, at, here, channel, change, block, 0, WIDTH)
    own1, last1 = _one_mix(d_out1, mixes, dmix_parts, at, here, channel, change, block, 1, WIDTH)
    own2, last2 = _one_mix(d_out2, mixes, dmix_parts, at, here, channel, change, block, 2, WIDTH)
    own3, last3 = _one_mix(d_out3, mixes, dmix_parts, at, here, channel, change, block, 3, WIDTH)
    own4, last4 = _one_mix(d_out4, mixes, dmix_parts, at, here, channel, change, block, 4, WIDTH)
    own5, last5 = _one_mix(d_out5, mixes, dmix_parts, at, here, channel, change, block, 5, WIDTH)
    _write(dhidden, at, here, own0 + own1 + own2 + own3 + own4 + own5)
    _write(dprevious, at, here, last0 + last1 + last2 + last3 + last4 + last5)
