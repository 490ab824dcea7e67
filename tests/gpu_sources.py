"""What checks the GPU kernels without a GPU: the same source run on the CPU through a shim, and the reports
of the CUDA and HIP compilers."""

import importlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compilers import require_compiler

from kernels import dispatch, jit_build
from kernels.custom_ops import Operators, register, wants_gradient
from kernels.dispatch import Backend
from kernels.gpu import library

KERNEL = re.compile(r"(\w+_kernel(?:<[^(]*>)?)\(")
Report = dict[str, tuple[int, int]]  # by kernel: registers of a thread, bytes in memory for want of them


@cache
def operators(operator: str) -> Operators:
    """The GPU backend's functions as operators for CPU tensors, which the library gives to the shim."""
    module, signature = _parts(operator)
    fills = (module.forward, module.backward, module.step_into)
    return register(operator, "shim", ["cpu"], signature, *fills)


def _parts(operator: str) -> tuple[ModuleType, object]:
    signature = importlib.import_module(f"kernels.{operator}.signature").SIGNATURE
    return importlib.import_module(f"kernels.{operator}.cuda"), signature


@contextmanager
def shim(operator: str, split: bool = False) -> Iterator[str]:
    """Makes the GPU backend's own glue and kernels run on CPU tensors, as a backend with the name given.

    Args:
        operator: its name.
        split: whether heads are shared by more threads, as where there are few of them.
    """
    require_compiler()
    made = operators(operator)
    outputs = 2

    def run(*arguments):
        return made.forward(*arguments, wants_gradient(arguments))[:outputs]

    backend = Backend("shim", lambda _: None, run, "for tests", native=True, step=made.step)
    package = importlib.import_module(f"kernels.{operator}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "BACKENDS", (*package.BACKENDS, backend))
        patch.setitem(package.TABLE, "shim", backend)
        patch.setattr(library, "split", lambda units, device: split)
        dispatch.forget()
        yield "shim"
    dispatch.forget()


def _named(mangled: dict[str, tuple[int, int]]) -> Report:
    """The kernels by their names in the source, with template arguments."""
    shown = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True, timeout=20
    ).stdout.splitlines()
    return {KERNEL.search(name).group(1): x for name, x in zip(shown, mangled.values(), strict=True)}


@cache
def nvcc_report(source: Path, arch: str, size: int = 64, dtype: torch.dtype = torch.float32) -> Report:
    """What ptxas says of every kernel: registers per thread, and bytes spilled.

    Args:
        source: a cuda.cu.
        arch: such as "sm_90".
        size: head size.
        dtype: of the 16- or 32-bit tensors.
    """
    require_compiler(jit_build.NVCC)
    command = [
        *jit_build.find_compiler(jit_build.NVCC), "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin",
        f"-arch={arch}", *library.variant_flags(dtype, size), "-o", "/dev/null", str(source),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        result.stderr,
        re.DOTALL,
    )
    return _named({name: (int(registers), int(out) + int(back)) for name, out, back, registers in found})


CLANG = "clang-19"
# What the bitcode of ROCm's maths library wants to know; the driver of a ROCm installation links it as files.
CONSTANTS = {
    "finite_only_opt": ("i8", 0),
    "unsafe_math_opt": ("i8", 0),
    "daz_opt": ("i8", 0),
    "correctly_rounded_sqrt32": ("i8", 1),
    "ABI_version": ("i32", 500),
}


def _constants(folder: Path, arch: str) -> Path:
    """The bitcode file of the constants for an architecture, such as "gfx942"."""
    major, minor, stepping = int(arch[3:-2]), int(arch[-2]), int(arch[-1], 16)
    values = CONSTANTS | {
        "ISA_version": ("i32", major * 1000 + minor * 100 + stepping),
        "wavefrontsize64": ("i8", int(major < 10)),
    }
    text = folder / "constants.ll"
    kind = "linkonce_odr hidden local_unnamed_addr addrspace(4) constant"
    text.write_text("".join(f"@__oclc_{n} = {kind} {type_} {x}\n" for n, (type_, x) in values.items()))
    made = folder / "constants.bc"
    _clang("-x", "ir", "--target=amdgcn-amd-amdhsa", "-nogpulib", "-c", "-emit-llvm", text, "-o", made)
    return made


def _clang(*arguments: object) -> str:
    result = subprocess.run([CLANG, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _rocm() -> Path:
    """The HIP headers and bitcode inside Triton's wheel; skips the test where there are none."""
    if shutil.which(CLANG) is None:
        pytest.skip(f"{CLANG} is not installed: HIP sources cannot be compiled here")
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("triton is not installed: its wheel has the HIP headers")
    folder = Path(triton.origin).parent / "backends" / "amd"
    if not (folder / "include" / "hip" / "hip_runtime.h").exists() or not (folder / "lib/ocml.bc").exists():
        pytest.skip("this version of triton has no HIP headers or bitcode")
    return folder


def hip_report(
    source: Path, arch: str, folder: Path, size: int = 64, dtype: torch.dtype = torch.float32
) -> Report:
    """What clang says of every kernel: vector registers per thread, and bytes of memory instead of registers.

    Args:
        source: a cuda.cu.
        arch: such as "gfx942".
        folder: where files may be made.
        size, dtype: as for `nvcc_report`.
    """
    wheel = _rocm()
    include = folder / "rocm" / "include"
    include.mkdir(parents=True, exist_ok=True)
    if not (include / "hip").exists():
        (include / "hip").symlink_to(wheel / "include" / "hip")
    assembly = folder / "kernels.s"
    bitcode = (wheel / "lib" / "ocml.bc", _constants(folder, arch))
    linked = [x for path in bitcode for x in ("-Xclang", "-mlink-builtin-bitcode", "-Xclang", path)]
    wrappers = Path(_clang("-print-resource-dir").strip()) / "include" / "cuda_wrappers"
    _clang(
        "-x", "hip", "--cuda-device-only", f"--offload-arch={arch}", f"--rocm-path={include.parent}",
        "-nogpulib", "-isystem", wrappers, "-include", "__clang_hip_runtime_wrapper.h", "-std=c++17", "-O3",
        *library.variant_flags(dtype, size), *linked, "-S", source, "-o", assembly,
    )  # fmt: skip
    found = re.findall(
        r"\.name: +(_Z\w+)\n.*?\.private_segment_fixed_size: +(\d+)\n.*?\.vgpr_count: +(\d+)",
        assembly.read_text(),
        re.DOTALL,
    )
    return _named({name: (int(registers), int(private)) for name, private, registers in found})
