"""WKV-7 by flash-linear-attention's chunked Triton kernels, where the package fla-core is installed."""

from functools import partial

from torch import Tensor

from kernels import flash_linear_attention
from kernels.case import Case
from kernels.flash_linear_attention import HELD_BACK, by_document, supports

__all__ = ["HELD_BACK", "prepare", "run", "supports"]


def prepare(case: Case) -> None:
    """Import the package and check it on this device; raises jit_build.BuildError."""
    flash_linear_attention.prepare("wkv7", run, case)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """WKV-7 in chunks; arguments and results as in kernels/wkv7/reference.py, every log_w finite."""
    from fla.ops.rwkv7 import chunk_rwkv7

    operator = partial(chunk_rwkv7, scale=1.0, output_final_state=True)
    return by_document(operator, (r, log_w, k, v, a, b), state, codes)
