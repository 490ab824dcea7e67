"""WKV-7 in C++ (cpu.cpp), built on first use, as custom operators with fake and autograd versions."""

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_build


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the C++ backend cannot run on this device type and dtype, or None."""
    if device_type != "cpu":
        return f"the C++ backend runs on cpu, not {device_type}"
    if dtype == torch.float64:
        return "the C++ backend computes in float32, not float64"
    return None


def compiler_flags() -> list[str]:
    """Flags for cpu.cpp; without -ffast-math, which would flush subnormals in the whole process."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    return ["-std=c++17", "-O3", "-march=native", "-pthread", *wide]


@cache
def library() -> ctypes.CDLL:
    """Build (once per machine) and load cpu.cpp; raises jit_build.BuildError."""
    source = Path(__file__).with_name("cpu.cpp")
    loaded = jit_build.load(jit_build.build("wkv7_cpu", [source], compiler_flags()))
    sizes = [ctypes.c_int64] * 5
    loaded.wkv7_forward.argtypes = sizes + [ctypes.c_void_p] * 11
    loaded.wkv7_backward.argtypes = sizes + [ctypes.c_void_p] * 18
    return loaded


def _packed(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as the library reads them: contiguous; ValueError unless float32 (codes: int8)."""
    for x in tensors:
        if x is not None and x.dtype not in (torch.float32, torch.int8):
            raise ValueError(f"the C++ wkv7 takes float32 tensors and int8 codes, got {x.dtype}")
    return [None if x is None else x.contiguous() for x in tensors]


def _call(function: Callable[..., int], shape: torch.Size, tensors: list[Tensor | None]) -> None:
    """Call an entry of the library with [B,T,H,N] sizes, the thread count and the tensors' addresses."""
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    status = function(*shape, torch.get_num_threads(), *addresses)
    if status == 1:
        raise MemoryError(f"the C++ wkv7 ran out of memory at [B,T,H,N] = {tuple(shape)}")
    if status == 2:
        raise ValueError(f"the C++ wkv7 is not compiled for head size {shape[3]}")


@torch.library.custom_op("transmute::wkv7_cpu", mutates_args=(), device_types="cpu")
def wkv7_cpu(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: y [B,T,H,N], the final state [B,H,N,N], and sa_t = S_{t-1}^T a_t [B,T,H,N], kept for the
    backward.

    Args are float32 [B,T,H,N], the initial state [B,H,N_k,N_v], and the token codes [B,T] int8 or None.
    """
    inputs = _packed(r, log_w, k, v, a, b, state, codes)
    y, state_out, sa = (torch.empty_like(inputs[i]) for i in (0, 6, 0))
    _call(library().wkv7_forward, r.shape, [*inputs, y, state_out, sa])
    return y, state_out, sa


@wkv7_cpu.register_fake
def _(r, log_w, k, v, a, b, state, codes):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, state, r))


@torch.library.custom_op("transmute::wkv7_cpu_backward", mutates_args=(), device_types="cpu")
def wkv7_cpu_backward(
    dy: Tensor,
    dstate_out: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    codes: Tensor | None,
    sa: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, a, b [B,T,H,N] and of the initial state [B,H,N_k,N_v].

    Args: the gradients of y [B,T,H,N] and of the final state, then the forward's arguments and its sa.
    """
    inputs = _packed(r, log_w, k, v, a, b, state, codes, sa, dy, dstate_out)
    gradients = [torch.empty_like(x) for x in inputs[:7]]
    _call(library().wkv7_backward, r.shape, [*inputs, *gradients])
    return tuple(gradients)


@wkv7_cpu_backward.register_fake
def _(dy, dstate_out, r, log_w, k, v, a, b, state, codes, sa):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, log_w, k, v, a, b, state))


def _setup_context(ctx, inputs, output) -> None:
    """Keep the inputs and sa, the only thing the backward needs of the forward's 1 + T states."""
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dy, dstate_out, _):
    """Autograd's entry to `wkv7_cpu_backward`; the codes have no gradient."""
    return *wkv7_cpu_backward(dy, dstate_out, *ctx.saved_tensors), None


wkv7_cpu.register_autograd(_backward, setup_context=_setup_context)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """C++ WKV-7; arguments and results as in kernels/wkv7/reference.py, in float32."""
    y, state_out, _ = wkv7_cpu(r, log_w, k, v, a, b, state, codes)
    return y, state_out
