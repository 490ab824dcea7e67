"""WKV-6 in C++ (cpu.cpp), built on first use, as custom operators with fake and autograd versions."""

from torch import Tensor

from kernels import native
from kernels.case import Case
from kernels.custom_ops import register, wants_gradient
from kernels.native import supports
from kernels.wkv6.signature import SIGNATURE

__all__ = ["OPERATORS", "prepare", "run", "step", "supports"]


def prepare(_: Case) -> None:
    """Build and load the library; raises jit_build.BuildError."""
    native.library("wkv6")


def _forward(*tensors: Tensor | None) -> None:
    """Inputs and outputs in the order of the signature; the last, what was to be saved, is None."""
    native.call("wkv6", "forward", tensors[0].shape, tensors[:-1])


def _backward(*tensors: Tensor | None) -> None:
    """The gradients of the outputs, inputs, and the gradients, in the order of the signature."""
    native.call("wkv6", "backward", tensors[0].shape, tensors)


def _step(*tensors: Tensor | None) -> None:
    """Inputs and the output in the order of the signature."""
    batch, heads, size = tensors[0].shape
    native.call("wkv6", "step", (batch, 1, heads, size), tensors)


OPERATORS = register("wkv6", "cpu", ["cpu"], SIGNATURE, _forward, _backward, _step)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """C++ WKV-6; arguments and results as in kernels/wkv6/reference.py, in float32."""
    tensors = (r, log_w, k, v, u, state, codes)
    y, state_out, _ = OPERATORS.forward(*tensors, wants_gradient(tensors))
    return y, state_out


def step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> Tensor:
    """One token in C++; arguments and result as in kernels/wkv6/reference.py, in float32."""
    return OPERATORS.take_step(r, log_w, k, v, u, state, codes)
