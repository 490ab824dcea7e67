"""Builds, loads and calls the GPU backends (kernels/<operator>/cuda.cu), which know nothing of torch.

A library holds the kernels of one head size and one dtype, for one kind of GPU: seconds to build, not
minutes. CPU tensors go to a library of the same source built by the C++ compiler (shim.h), which is for tests
alone. The kernels have been compiled for GPUs, but never measured on one.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import custom_ops, jit_build, self_check
from kernels.case import Case
from kernels.compilers import Compiler

FOLDER = Path(__file__).parent
HEADERS = (FOLDER / "portable.h", FOLDER / "scan.h", FOLDER / "shim.h")
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as portable.h calls them
LAUNCH_FAILED = 1  # as in portable.h
SHIM_FLAGS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE")  # fortified, longjmp refuses to change the stack
ALIGNMENT = 16  # bytes: what the kernels read at once


def supports(case: Case) -> str | None:
    """Why the GPU backends cannot run a case, or None."""
    if case.device_type != "cuda":
        return f"the GPU kernels run on cuda (or ROCm), not {case.device_type}"
    if case.dtype not in TYPES:
        return f"the GPU kernels compute in float32, not {case.dtype}"
    if not torch.cuda.is_available():
        return "torch sees no GPU that it can use"
    return None


def source(operator: str) -> Path:
    """The one file with an operator's kernels."""
    return FOLDER.parent / operator / "cuda.cu"


def variant_flags(dtype: torch.dtype, size: int) -> tuple[str, ...]:
    """Of the head size and the dtype of the 16- or 32-bit tensors."""
    return f"-DTRANSMUTE_HEAD_SIZE={size}", f"-DTRANSMUTE_TYPE={TYPES[dtype]}"


@cache
def target(device: torch.device) -> tuple[Compiler, tuple[str, ...]]:
    """The compiler for a device, and its flags."""
    if device.type == "cpu":
        return jit_build.CXX, SHIM_FLAGS
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return jit_build.HIPCC, ("-std=c++17", "-O3", f"--offload-arch={name}")
    major, minor = torch.cuda.get_device_capability(device)
    number = f"{major}{minor}"
    return jit_build.NVCC, ("-std=c++17", "-O3", f"-gencode=arch=compute_{number},code=sm_{number}")


@cache
def library(operator: str, dtype: torch.dtype, size: int, device: torch.device) -> ctypes.CDLL:
    """Build (once per machine) and load an operator's kernels; raises jit_build.BuildError."""
    compiler, flags = target(device)
    name = f"{operator}_{compiler.language}_{TYPES[dtype]}_{size}".replace("+", "p")
    flags = [*flags, *variant_flags(dtype, size)]
    own = sorted(source(operator).parent.glob("*.cuh"))
    path = jit_build.build(name, [source(operator)], flags, headers=[*HEADERS, *own], compiler=compiler)
    loaded = jit_build.load(path)
    loaded.transmute_message.restype = ctypes.c_char_p
    getattr(loaded, f"{operator}_scratch").restype = ctypes.c_int64
    return loaded


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks a device runs side by side, at least."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def split(units: int, device: torch.device) -> bool:
    """Whether there are so few rows times heads that each should be shared by more threads."""
    return units <= multiprocessors(device)


def _sizes(shape: Sequence[int], device: torch.device) -> list[ctypes.c_int64]:
    batch, tokens, heads, _ = shape
    return [ctypes.c_int64(n) for n in (batch, tokens, heads, split(batch * heads, device))]


def scratch(operator: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """What an operator's backward pass needs beside its outputs, float32, not filled.

    Args:
        operator: its name.
        shape: (B, T, H, N).
        like: an input of the library's dtype.
    """
    count = getattr(library(operator, like.dtype, shape[3], like.device), f"{operator}_scratch")
    return custom_ops.allocate((count(*_sizes(shape, like.device)),), torch.float32, like.device)


def check(operator: str, run: Callable, case: Case) -> None:
    """Build, load and check an operator's kernels on this device: those for few heads and those for many.

    Args:
        operator: its name.
        run: the backend's function.
        case: the kind of call to check.

    Raises:
        BuildError: they cannot be built or launched, or are wrong here.
    """

    def among_many(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of a call among so many copies of them that heads are not split."""
        rows = len(tensors[0])
        copies = multiprocessors(tensors[0].device) + 1
        by_row = [x is not None and (x.dim() == 4 or x.dtype == torch.int8) for x in tensors]
        copied = (
            x.repeat(copies, *[1] * (x.dim() - 1)) if yes else x
            for x, yes in zip(tensors, by_row, strict=True)
        )
        y, state = run(*copied)
        return y[:rows], state[:rows]

    tolerance = "fp32" if case.dtype == torch.float32 else "16-bit"
    for way in (run, among_many):
        self_check.verify(operator, "cuda", way, case, tolerance, native=True)


def aligned(x: Tensor) -> Tensor:
    """A tensor where the kernels can read it: itself, or a copy."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def step(operator: str, tensors: Sequence[Tensor | None]) -> None:
    """Call `<operator>_step`: tokens [B,H,N], ..., state (changed in place), codes, output; as `call`."""
    *inputs, state, codes, output = tensors
    batch, heads, size = output.shape
    placed = aligned(state)
    call(operator, "step", (batch, 1, heads, size), (*inputs, placed, codes, output))
    if placed is not state:
        state.copy_(placed)


def call(operator: str, entry: str, shape: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
    """Call `<operator>_<entry>` on the device of the tensors, on the stream that is current there.

    Args:
        operator, entry: such as "wkv7" and "forward".
        shape: (B, T, H, N).
        tensors: contiguous, in the order of the entry's arguments; the first one has the library's dtype.

    Raises:
        BuildError: the library cannot be built.
        RuntimeError: the launch failed.
    """
    first = tensors[0]
    device = first.device
    loaded = library(operator, first.dtype, shape[3], device)
    # A view may begin anywhere. Outputs, which torch has just allocated, never do.
    placed = [None if x is None else aligned(x) for x in tensors]
    addresses = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in placed]
    on_gpu = device.type != "cpu"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if on_gpu else None)
        status = getattr(loaded, f"{operator}_{entry}")(*_sizes(shape, device), stream, *addresses)
    if status:
        raise RuntimeError(
            f"{operator}_{entry} at [B,T,H,N] = {tuple(shape)} on {device}: "
            f"{loaded.transmute_message().decode() or 'nothing was launched'}"
        )
