"""Compiles Triton kernels for GPUs that are not here, and reads what they take of the device.

Nothing runs: a kernel that compiles may still be wrong, which the interpreter is for.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KINDS |= {torch.int8: "i8", torch.int32: "i32"}
# Shared memory of one program, in bytes.
SHARED = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10,
}  # fmt: skip
DEVICES = tuple(SHARED)
LANES = {"gfx90a": 64, "gfx942": 64, "gfx950": 64}  # of a warp, where they are not 32


class Report(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes (NVIDIA) or registers (AMD) of a thread that went to memory.
        shared: bytes of a program.
        warps: of a program.
        assembly: of the device.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    assembly: str


def compiled(kernel, arguments: dict, device: str, options: dict) -> Report:
    """Compile a kernel ahead of time.

    Args:
        kernel: a function of @triton.jit.
        arguments: by name and in order: a dtype for a pointer to such numbers, None for an absent tensor,
            int for a number; constants as ("constant", value).
        device: such as "sm_90" or "gfx942".
        options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, (name, kind) in enumerate(arguments.items()):
        if isinstance(kind, tuple) or kind is None:
            signature[name], constants[name] = "constexpr", kind[1] if kind else None
        elif kind is int:
            signature[name] = "i32"
        else:
            signature[name] = f"*{KINDS[kind]}"
            attributes[position,] = [["tt.divisibility", 16]]
    nvidia = device.startswith("sm_")
    target = (
        GPUTarget("cuda", int(device[3:]), 32) if nvidia else GPUTarget("hip", device, LANES.get(device, 32))
    )
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options)
    shared, warps = made.metadata.shared, made.metadata.num_warps
    if nvidia:
        registers, spilled = _ptxas(made.asm["cubin"], made.name)
        return Report(registers, spilled, shared, warps, made.asm["ptx"])
    text = made.asm["amdgcn"]
    read = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", text)}
    return Report(read["vgpr_count"], read["vgpr_spill_count"], shared, warps, text)


def _ptxas(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers and bytes of local memory of a kernel, as the tools of the compiler read them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(knobs.nvidia.cuobjdump.path)
        text = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    found = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])
