"""Builds, loads and calls the C++ backends (kernels/<operator>/cpu.cpp), which know nothing of torch."""

import ctypes
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_build
from kernels.case import Case

FOLDER = Path(__file__).parent
TAKEN = (torch.float32, torch.int64, torch.int32, torch.int16, torch.int8)
OUT_OF_MEMORY, UNKNOWN_HEAD_SIZE = 1, 2  # as in native.h


def supports(case: Case) -> str | None:
    """Why the C++ backends cannot run a case, or None."""
    if case.device_type != "cpu":
        return f"the C++ backend runs on cpu, not {case.device_type}"
    if case.dtype == torch.float64:
        return "the C++ backend computes in float32, not float64"
    return None


def compiler_flags() -> list[str]:
    """Without -ffast-math, which would flush subnormals in the whole process."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    return ["-std=c++17", "-O3", "-march=native", "-pthread", *wide]


@cache
def library(operator: str) -> ctypes.CDLL:
    """Build (once per machine) and load an operator's cpu.cpp; raises jit_build.BuildError."""
    folder = FOLDER / operator
    headers = [FOLDER / "native.h", FOLDER / "recurrence.h", *sorted(folder.glob("*.h"))]
    built = jit_build.build(f"{operator}_cpu", [folder / "cpu.cpp"], compiler_flags(), headers=headers)
    return jit_build.load(built)


def call(operator: str, entry: str, sizes: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
    """Call `<operator>_<entry>` with as many threads as torch uses.

    Args:
        operator, entry: such as "wkv7" and "forward".
        sizes: (B, T, H, N), and what else the entry asks for.
        tensors: contiguous, float32, int64, int32, int16 (bits of bfloat16) or (codes) int8, in the order of
            the entry's arguments.

    Raises:
        BuildError: the library cannot be built.
        ValueError: a tensor of another dtype, or a head size that is not compiled.
        MemoryError: there is no memory for what the call keeps beside its outputs.
    """
    for x in tensors:
        if x is not None and x.dtype not in TAKEN:
            raise ValueError(f"the C++ {operator} takes float32 and integer tensors, got {x.dtype}")
    numbers = [ctypes.c_int64(size) for size in (*sizes, torch.get_num_threads())]
    addresses = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    status = getattr(library(operator), f"{operator}_{entry}")(*numbers, *addresses)
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"the C++ {operator} ran out of memory at [B,T,H,N] = {tuple(sizes[:4])}")
    if status == UNKNOWN_HEAD_SIZE:
        raise ValueError(f"the C++ {operator} is not compiled for head size {sizes[3]}")
