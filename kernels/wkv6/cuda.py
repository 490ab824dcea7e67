"""WKV-6 on GPUs (cuda.cu, CUDA and HIP), built on first use, as custom operators with fake and autograd
versions."""

from torch import Tensor

from kernels.case import Case
from kernels.custom_ops import register, wants_gradient
from kernels.gpu import library
from kernels.gpu.library import supports
from kernels.wkv6.signature import SIGNATURE

__all__ = ["OPERATORS", "backward", "forward", "prepare", "run", "step", "step_into", "supports"]


def prepare(case: Case) -> None:
    """Build, load and check the kernels on this device; raises jit_build.BuildError."""
    library.check("wkv6", run, case)


def forward(*tensors: Tensor | None) -> None:
    """Inputs and outputs in the order of the signature; the last, what was to be saved, is None."""
    library.call("wkv6", "forward", tensors[0].shape, tensors[:-1])


def backward(*tensors: Tensor | None) -> None:
    """The gradients of the outputs, inputs, and the gradients, in the order of the signature."""
    shape = tensors[0].shape
    library.call("wkv6", "backward", shape, (*tensors, library.scratch("wkv6", shape, tensors[0])))


def step_into(*tensors: Tensor | None) -> None:
    """Inputs and the output in the order of the signature."""
    library.step("wkv6", tensors)


OPERATORS = register("wkv6", "cuda", ["cuda"], SIGNATURE, forward, backward, step_into)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """WKV-6 in one kernel forward and two backward; r, k, v of one dtype of float32, bfloat16, float16, the
    rest as in kernels/wkv6/reference.py, in float32."""
    tensors = (r, log_w, k, v, u, state, codes)
    y, state_out, _ = OPERATORS.forward(*tensors, wants_gradient(tensors))
    return y, state_out


def step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> Tensor:
    """One token; arguments and result as in kernels/wkv6/reference.py, dtypes as in `run`."""
    return OPERATORS.take_step(r, log_w, k, v, u, state, codes)
