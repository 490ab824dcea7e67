"""Runs sparse attention's Triton kernels in Triton's interpreter and prints how far they are from the float64
definition.

One line of JSON: check -> result -> relative RMS error (for "repeatable": 0 where two runs agree to the last
bit). A process of its own, because the interpreter must be chosen before Triton is imported. Outputs and
scratch memory begin as NaN, and NaN stands in the places of blocks that are not filled.
"""

import json
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from triton_parity import poisoned, repair_interpreter  # first: it chooses the interpreter

from kernels import custom_ops
from kernels.examples import errors
from kernels.sparse_attention import triton as backend
from kernels.sparse_attention.examples import Example, example, results, truth

FEW = backend.FEW


def far(call: Example, dtype: torch.dtype = torch.float32, few: int = 0) -> dict[str, float]:
    """Errors of a call; with `few` tokens each is a tile of its own."""
    backend.FEW = few
    return errors(results(call, backend.run, dtype), truth(call))


def in_parts(call: Example) -> dict[str, float]:
    """A launch for each tile, and for each key/value head."""
    backend.SCRATCH, scratch = 1, backend.SCRATCH
    try:
        return far(call)
    finally:
        backend.SCRATCH = scratch


def repeated(call: Example) -> dict[str, float]:
    backend.FEW = 0
    first, second = results(call, backend.run), results(call, backend.run)
    return {name: float(not torch.equal(x, second[name])) for name, x in first.items()}


def blind(call: Example) -> dict[str, float]:
    """A row whose lists are empty, and one of padding: what is right there is zero to the last bit."""
    call.blocks[0], call.positions[1] = -1, -1
    backend.FEW = 0
    found = results(call, backend.run)
    return {name: float(x[:2].count_nonzero()) for name, x in found.items()} | errors(found, truth(call))


def on(device: str, call: Example, dtype: torch.dtype) -> dict[str, float]:
    """Multiplying as a device of this name does, float32 as TF32 where it may."""
    torch.set_float32_matmul_precision("high")
    backend.architecture, architecture = lambda _: device, backend.architecture
    try:
        return far(call, dtype)
    finally:
        backend.architecture = architecture
        torch.set_float32_matmul_precision("highest")


def checks() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Names of checks and what runs them; a name ends in the tolerance that holds."""

    def made(*sizes: int, **options) -> Example:
        return example(*sizes, unfilled=math.nan, **options)

    calls = {
        "odd length": made(2, 37, 4, 2, 16, length=8, listed=3),
        "a list for each head": made(1, 50, 4, 2, 24, lists=4, length=16, listed=2),
        "a list for every head": made(1, 45, 6, 1, 48, length=24, listed=3),
        "long blocks": made(1, 130, 1, 1, 8, length=100, listed=2),
        "blocks of 64": made(1, 100, 6, 2, 64, length=64, listed=5),
        "documents": made(2, 61, 4, 2, 32, length=12, listed=4, documents=3),
        "watched": made(2, 40, 4, 2, 16, length=20, listed=5, watches=2, documents=2),
        "more heads than rows": made(1, 3, 70, 1, 16, length=8, context=20),
        "N=80": made(1, 20, 2, 1, 80, length=16),
    }
    for name, call in calls.items():
        yield f"{name}: fp32", lambda call=call: far(call)
    few = {
        "T=1": made(2, 1, 8, 2, 64, length=64, listed=7, context=300),
        "T=1, watched": made(1, 1, 4, 1, 32, length=80, listed=5, watches=2, context=300),
        "T=5 alone": made(2, 5, 4, 2, 16, length=8, context=30, documents=2, watches=1),
    }
    for name, call in few.items():
        yield f"{name}, one program a list: fp32", lambda call=call: far(call, few=1)
        yield f"{name}, lists in parts: fp32", lambda call=call: far(call, few=FEW)
    yield "a launch for each tile: fp32", lambda: in_parts(made(2, 37, 4, 2, 16, length=8, listed=3))
    yield "who sees nothing: fp32", lambda: blind(made(3, 20, 2, 1, 16, length=8))
    yield "repeatable: fp32", lambda: repeated(made(1, 33, 4, 2, 16, length=16))
    shape = (1, 90, 4, 2, 64)
    bf16, fp16 = torch.bfloat16, torch.float16
    yield "TF32: tf32", lambda: on("sm_90", made(*shape, length=64), torch.float32)
    for device, dtype in (("sm_90", bf16), ("gfx1100", bf16), ("gfx942", fp16)):
        call = made(*shape, length=64, documents=2, watches=1, rounded=dtype)
        yield f"{dtype} on {device}: 16-bit", lambda c=call, d=device, t=dtype: on(d, c, t)


def main() -> None:
    np.seterr(all="ignore")  # infinities that a mask then drops
    repair_interpreter()
    custom_ops.allocate = poisoned
    print(json.dumps({name: check() for name, check in checks()}))


if __name__ == "__main__":
    main()
