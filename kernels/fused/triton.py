"""The fused Triton kernels as custom operators, with fake and autograd versions.

They have not been measured on any GPU yet. On the CPU they run in Triton's interpreter alone, for tests.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import custom_ops
from kernels.case import HEAD_SIZES, Case
from kernels.fused.reference import DECAY_SCALE, SMALLEST_NORM
from kernels.triton_support import unusable

DEVICES = ("cpu", "cuda")
TILE = 1024  # numbers of one tensor that a program holds
CHANNELS = 128  # of them in a token, in the token shift
MIXES = 6


def _like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output on the device of x; of its shape and dtype where nothing else is said."""
    return custom_ops.allocate(shape or x.shape, dtype or x.dtype, x.device)


def _packed(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _blocks(x: Tensor, width: int) -> tuple[int, int]:
    """For x [B,T,...] in tiles of so many channels: tokens of a program, and how many programs they make."""
    size = TILE // width
    return size, -(-x.shape[0] * x.shape[1] // size)


def _launch(kernel: str, x: Tensor, grid: tuple[int, int], *arguments: Any, **constants: int) -> None:
    """Run a kernel of triton_kernels.py on x's device; `arguments` are tensors and numbers in its order.

    Raises:
        ValueError: it cannot run there.
    """
    size = constants.get("N", HEAD_SIZES[0])
    reason = unusable(Case(x.device.type, x.dtype, size))
    if reason is None and size not in HEAD_SIZES:
        reason = f"head size {size} is not one of {HEAD_SIZES}"
    if reason is not None:
        raise ValueError(f"the fused kernel {kernel} cannot run: {reason}; use backend=reference")
    from kernels.fused import triton_kernels

    lanes = torch.cuda.get_device_properties(x.device).warp_size if x.is_cuda else 32
    warps = TILE // (4 * lanes)  # 16 bytes of float32 for each thread
    with torch.cuda.device_of(x):
        getattr(triton_kernels, kernel)[grid](*arguments, **constants, num_warps=warps)


def _parts(x: Tensor | None, blocks: int) -> Tensor | None:
    """Room for each block's part of a parameter's gradient."""
    return None if x is None else _like(x, blocks, *x.shape, dtype=torch.float32)


def _summed(parts: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parts.sum(0).to(parameter.dtype)


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Operators return tensors only: gradients of inputs that are None are left out..."""
    return [x for x in tensors if x is not None]


def _spread(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """... and their places filled again."""
    left = iter(gradients)
    return [None if x is None else next(left) for x in inputs]


def _differentiate(forward: Any, backward: Callable, numbers: int) -> None:
    """Connect an operator with its backward pass (gradients of the outputs, then the inputs, to those of the
    inputs that are not None); the last so many inputs are numbers."""

    def keep(ctx, inputs, output) -> None:
        count = len(inputs) - numbers
        ctx.save_for_backward(*inputs[:count])
        ctx.numbers = inputs[count:]

    def gradients(ctx, *upstream):
        inputs = ctx.saved_tensors
        found = backward(*upstream, *inputs, *ctx.numbers)
        return *_spread(found, inputs), *(None for _ in ctx.numbers)

    forward.register_autograd(gradients, setup_context=keep)


# --- prepare ------------------------------------------------------------------------------------------------


def _prepare_constants(decay: Tensor, key: Tensor, removed_scale: Tensor | None) -> dict[str, int]:
    heads, size = decay.shape[2:]
    group, raw = heads // key.shape[2], removed_scale is not None
    return {"HEADS": heads, "GROUP": group, "N": size, "TOKENS": _blocks(decay, size)[0], "RAW": raw}


@torch.library.custom_op("transmute::fused_prepare", mutates_args=(), device_types=DEVICES)
def prepare(
    decay: Tensor,
    rate: Tensor,
    key: Tensor,
    removed_scale: Tensor | None,
    written_mix: Tensor | None,
    rate_range: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kernels.fused.prepare`."""
    inputs = _packed([decay, rate, key, removed_scale, written_mix])
    outputs = tuple(_like(decay) for _ in range(4))
    numbers = (decay.shape[0] * decay.shape[1], rate_range, DECAY_SCALE, SMALLEST_NORM)
    grid = _blocks(decay, decay.shape[3])[1], key.shape[2]
    constants = _prepare_constants(decay, key, removed_scale)
    _launch("prepare_forward", decay, grid, *inputs, *outputs, *numbers, **constants)
    return outputs


@torch.library.custom_op("transmute::fused_prepare_backward", mutates_args=(), device_types=DEVICES)
def _prepare_backward(
    dlog_w: Tensor,
    dk: Tensor,
    da: Tensor,
    db: Tensor,
    decay: Tensor,
    rate: Tensor,
    key: Tensor,
    removed_scale: Tensor | None,
    written_mix: Tensor | None,
    rate_range: float,
) -> list[Tensor]:
    upstream = _packed([dlog_w, dk, da, db])
    inputs = _packed([decay, rate, key, removed_scale, written_mix])
    grid = _blocks(decay, decay.shape[3])[1], key.shape[2]
    gradients = [_like(x) for x in inputs[:3]]
    parts = [_parts(x, grid[0]) for x in inputs[3:]]
    numbers = (decay.shape[0] * decay.shape[1], rate_range, DECAY_SCALE, SMALLEST_NORM)
    constants = _prepare_constants(decay, key, removed_scale)
    _launch("prepare_backward", decay, grid, *upstream, *inputs, *gradients, *parts, *numbers, **constants)
    return _present([*gradients, *map(_summed, parts, inputs[3:])])


@prepare.register_fake
def _(decay, *rest):
    return tuple(_like(decay) for _ in range(4))


@_prepare_backward.register_fake
def _(dlog_w, dk, da, db, *inputs):
    return [_like(x) for x in _present(inputs[:-1])]


_differentiate(prepare, _prepare_backward, numbers=1)


# --- finish -------------------------------------------------------------------------------------------------


def _finish_constants(y: Tensor, norm_weight, bonus, gate) -> dict[str, int]:
    heads, size = y.shape[2:]
    there = {"NORM": norm_weight is not None, "BONUS": bonus is not None, "GATE": gate is not None}
    return {"HEADS": heads, "N": size, "TOKENS": _blocks(y, size)[0], **there}


@torch.library.custom_op("transmute::fused_finish", mutates_args=(), device_types=DEVICES)
def finish(
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """As `kernels.fused.finish`."""
    inputs = _packed([y, norm_weight, norm_bias, r, k, v, bonus, gate])
    batch, tokens, heads, size = y.shape
    out = _like(y, batch, tokens, heads * size)
    grid = _blocks(y, size)[1], heads
    constants = _finish_constants(y, norm_weight, bonus, gate)
    _launch("finish_forward", y, grid, *inputs, out, batch * tokens, norm_eps, **constants)
    return out


@torch.library.custom_op("transmute::fused_finish_backward", mutates_args=(), device_types=DEVICES)
def _finish_backward(
    d_out: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
) -> list[Tensor]:
    inputs = _packed([y, norm_weight, norm_bias, r, k, v, bonus, gate])
    batch, tokens, heads, size = y.shape
    grid = _blocks(y, size)[1], heads
    parameters = (1, 2, 6)  # their gradients are summed over tokens
    made = [
        _parts(x, grid[0]) if i in parameters else None if x is None else _like(x)
        for i, x in enumerate(inputs)
    ]
    constants = _finish_constants(y, norm_weight, bonus, gate)
    numbers = (batch * tokens, norm_eps)
    _launch("finish_backward", y, grid, d_out.contiguous(), *inputs, *made, *numbers, **constants)
    return _present([_summed(x, inputs[i]) if i in parameters else x for i, x in enumerate(made)])


@finish.register_fake
def _(y, *rest):
    return _like(y, *y.shape[:2], y.shape[2] * y.shape[3])


@_finish_backward.register_fake
def _(d_out, *inputs):
    return [_like(x) for x in _present(inputs[:-1])]


_differentiate(finish, _finish_backward, numbers=1)


# --- shift --------------------------------------------------------------------------------------------------


@torch.library.custom_op("transmute::fused_shift", mutates_args=(), device_types=DEVICES)
def shift(hidden: Tensor, previous: Tensor, mixes: Tensor) -> list[Tensor]:
    """As `kernels.fused.shift`."""
    inputs = _packed([hidden, previous, mixes])
    outputs = [_like(hidden) for _ in range(MIXES)]
    batch, tokens, width = hidden.shape
    size, blocks = _blocks(hidden, CHANNELS)
    constants = {"WIDTH": width, "TOKENS": size, "CHANNELS": CHANNELS}
    grid = blocks, -(-width // CHANNELS)
    _launch("shift_forward", hidden, grid, *inputs, *outputs, batch * tokens, **constants)
    return outputs


@torch.library.custom_op("transmute::fused_shift_backward", mutates_args=(), device_types=DEVICES)
def _shift_backward(upstream: list[Tensor], hidden: Tensor, previous: Tensor, mixes: Tensor) -> list[Tensor]:
    inputs = _packed([hidden, previous, mixes])
    batch, tokens, width = hidden.shape
    size, blocks = _blocks(hidden, CHANNELS)
    made = [_like(hidden), _like(previous), _parts(mixes, blocks)]
    constants = {"WIDTH": width, "TOKENS": size, "CHANNELS": CHANNELS}
    grid = blocks, -(-width // CHANNELS)
    arguments = (*_packed(upstream), *inputs, *made, batch * tokens)
    _launch("shift_backward", hidden, grid, *arguments, **constants)
    return [*made[:2], _summed(made[2], mixes)]


@shift.register_fake
def _(hidden, *rest):
    return [_like(hidden) for _ in range(MIXES)]


@_shift_backward.register_fake
def _(upstream, *inputs):
    return [_like(x) for x in inputs]


_differentiate(shift, _shift_backward, numbers=0)
