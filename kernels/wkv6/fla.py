"""WKV-6 by flash-linear-attention's chunked Triton kernels, where the package fla-core is installed."""

from functools import partial

from torch import Tensor

from kernels import flash_linear_attention
from kernels.case import Case
from kernels.flash_linear_attention import HELD_BACK, by_document, supports

__all__ = ["HELD_BACK", "prepare", "run", "supports"]


def prepare(case: Case) -> None:
    """Import the package and check it on this device; raises jit_build.BuildError."""
    flash_linear_attention.prepare("wkv6", run, case)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """WKV-6 in chunks; arguments and results as in kernels/wkv6/reference.py, every log_w finite."""
    if u is None:  # reading the current token like every other is gated linear attention
        from fla.ops.gla import chunk_gla as operator
    else:
        from fla.ops.rwkv6 import chunk_rwkv6

        operator = partial(chunk_rwkv6, u=u)
    names = ("q" if u is None else "r", "k", "v", "g" if u is None else "w")

    def named(*inputs: Tensor, **sequences: Tensor | None) -> tuple[Tensor, Tensor]:
        arguments = dict(zip(names, inputs, strict=True))
        return operator(**arguments, scale=1.0, output_final_state=True, **sequences)

    return by_document(named, (r, k, v, log_w), state, codes)
