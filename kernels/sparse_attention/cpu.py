"""Sparse attention in C++ (cpu.cpp), built on first use, as custom operators with fake and autograd
versions."""

import torch.nn.functional as F
from torch import Tensor

from kernels import native
from kernels.case import Case
from kernels.custom_ops import register, wants_gradient
from kernels.native import supports
from kernels.sparse_attention.signature import SIGNATURE

__all__ = ["OPERATORS", "prepare", "run", "supports"]
WIDTH = 16  # head sizes are multiples of it


def prepare(_: Case) -> None:
    """Build and load the library; raises jit_build.BuildError."""
    native.library("sparse_attention")


def _call(entry: str, q: Tensor, k: Tensor, blocks: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
    """The library's entries take (B, T, H, N), (M, C, G), (J, K) and the tensors."""
    native.call("sparse_attention", entry, (*q.shape, *k.shape[1:4], *blocks.shape[2:]), tensors)


def _forward(*tensors: Tensor | None) -> None:
    """Inputs and outputs in the order of the signature."""
    _call("forward", tensors[0], tensors[1], tensors[3], tensors)


def _backward(*tensors: Tensor | None) -> None:
    """The gradient of y, inputs, y, the logarithms, and the gradients, in the order of the signature."""
    _call("backward", tensors[1], tensors[2], tensors[4], tensors)


OPERATORS = register("sparse_attention", "cpu", ["cpu"], SIGNATURE, _forward, _backward)


def run(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """C++ sparse attention; arguments and results as in kernels/sparse_attention/reference.py, in float32."""
    size = q.shape[3]
    if missing := -size % WIDTH:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    tensors = (q, k, v, blocks, starts, positions)
    y, share, _ = OPERATORS.forward(*tensors, wants_gradient(tensors))
    return y[..., :size], share
