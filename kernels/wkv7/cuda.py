"""WKV-7 on GPUs (cuda.cu, CUDA and HIP), built on first use, as custom operators with fake and autograd
versions.

Beside its outputs the backward pass takes scratch: B T H N floats for h, and N / 64 times as many for copies
of the state's gradient; the forward pass keeps sa, B T H N floats. (At B = 8, T = 4096, H = 32, N = 64: 0.27
GB kept for each layer, 0.54 GB while one layer's backward pass runs.)
"""

from torch import Tensor

from kernels.case import Case
from kernels.custom_ops import register, wants_gradient
from kernels.gpu import library
from kernels.gpu.library import supports
from kernels.wkv7.signature import SIGNATURE

__all__ = ["OPERATORS", "backward", "forward", "prepare", "run", "step", "step_into", "supports"]


def prepare(case: Case) -> None:
    """Build, load and check the kernels on this device; raises jit_build.BuildError."""
    library.check("wkv7", run, case)


def forward(*tensors: Tensor | None) -> None:
    """Inputs and outputs in the order of the signature."""
    library.call("wkv7", "forward", tensors[0].shape, tensors)


def backward(*tensors: Tensor | None) -> None:
    """The gradients of the outputs, inputs, sa, and the gradients, in the order of the signature."""
    shape = tensors[0].shape
    library.call("wkv7", "backward", shape, (*tensors, library.scratch("wkv7", shape, tensors[0])))


def step_into(*tensors: Tensor | None) -> None:
    """Inputs and the output in the order of the signature."""
    library.step("wkv7", tensors)


OPERATORS = register("wkv7", "cuda", ["cuda"], SIGNATURE, forward, backward, step_into)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """WKV-7 in one kernel forward and two backward; r, k, v, a, b of one dtype of float32, bfloat16, float16,
    the rest as in kernels/wkv7/reference.py, in float32."""
    tensors = (r, log_w, k, v, a, b, state, codes)
    y, state_out, _ = OPERATORS.forward(*tensors, wants_gradient(tensors))
    return y, state_out


def step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> Tensor:
    """One token; arguments and result as in kernels/wkv7/reference.py, dtypes as in `run`."""
    return OPERATORS.take_step(r, log_w, k, v, a, b, state, codes)
