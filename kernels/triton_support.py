"""Whether Triton kernels can run here, and in which precision their matrix products are made.

Importing this imports no Triton: it is optional.
"""

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch

from kernels.case import Case

# Matrix units that read float32 as TF32; the others make exact float32 products in theirs, or without any.
TF32 = ("sm_", "gfx940", "gfx941", "gfx942")
OLDEST = (8, 0)  # NVIDIA: the first with bfloat16 and TF32


class Precision(NamedTuple):
    """How a kernel multiplies matrices; the accumulators are float32 always.

    Attributes:
        products: "bf16" rounds both factors to it, "tf32" to that, "ieee" rounds nothing.
        sensitive: the same for products whose errors spread: inverses and what is carried from chunk to
            chunk.
        parts: bfloat16 parts that a factor is split into where it must stay nearly exact (3: exact).
        kept: dtype of the factors of `products` that lie in memory between two kernels.
        tolerance: a key of kernels.examples.TOLERANCES that the results satisfy.
    """

    products: str
    sensitive: str
    parts: int
    kept: torch.dtype
    tolerance: str


EXACT = Precision("ieee", "ieee", 3, torch.float32, "fp32")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unusable(case: Case) -> str | None:
    """Why Triton kernels cannot run a case, or None."""
    if case.dtype == torch.float64:
        return "the Triton backend computes in float32, not float64"
    if case.device_type not in ("cpu", "cuda"):
        return f"the Triton backend runs on GPUs, not {case.device_type}"
    if case.device_type == "cpu" and not interpreted():
        return "the Triton backend runs on GPUs; on cpu only in Triton's interpreter (TRITON_INTERPRET=1)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if case.device_type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch finds no usable GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
        return f"{torch.cuda.get_device_name()} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def architecture(device: torch.device) -> str:
    """The compiler's name of a device: "sm_90", "gfx942", ..., and "interpreter" for the CPU."""
    return "interpreter" if device.type == "cpu" else _gpu(device.index)


@cache
def _gpu(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def precision(dtype: torch.dtype, device: str) -> Precision:
    """How to multiply.

    Float32 inputs stay exact, unless the user lets torch multiply float32 matrices as TF32
    (torch.set_float32_matmul_precision("high")) and the device can. 16-bit inputs are multiplied as bfloat16,
    float16 ones too: scaled by a decay they may leave the range of float16.

    Args:
        dtype: of the inputs.
        device: as `architecture` names it.
    """
    rounds = device.startswith(TF32)
    if dtype == torch.float32:
        allowed = rounds and torch.get_float32_matmul_precision() != "highest"
        return Precision("tf32", "tf32", 3, torch.float32, "tf32") if allowed else EXACT
    return Precision("bf16", "tf32" if rounds else "ieee", 2, torch.bfloat16, "16-bit")
