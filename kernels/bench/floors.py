"""The least time a call can take on a device: what must be moved, and what must be computed.

A floor is the larger of two times. Memory: every input read once and every output written once, at the rate
of a large copy measured on the device; what a backend keeps for its backward pass is its own choice and not
counted. Arithmetic: the operations of the token-by-token recurrence, at the rate of a large matrix product of
torch; code that beats that matrix product, or needs fewer operations, can come out under it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.bench.calls import BOTH, FORWARD, STEP, Shape
from kernels.examples import INPUTS

# Multiplications and additions per token, row, head and N_k * N_v: the forward scan, the backward scans.
FLOPS = {"wkv7": (9, 22), "wkv6": (5, 12)}


@dataclass(frozen=True)
class Peaks:
    """Measured: bytes read and written per second, and floating-point operations per second."""

    bandwidth: float
    flops: float


def measure_peaks(device: str, copied: int | None = None, edge: int | None = None, runs: int = 15) -> Peaks:
    """The device's rates, the best of some runs, with as many threads as torch has now.

    Args:
        device: "cpu" or "cuda".
        copied: bytes of the buffer that is copied; far more than any cache by default.
        edge: of the square matrices multiplied; float32 on a CPU, bfloat16 elsewhere.
        runs: the best counts.
    """
    fast = torch.device(device).type != "cpu"
    source = torch.ones(copied or (2**31 if fast else 2**27), dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    copying = _best(lambda: target.copy_(source), device, runs)
    edge = edge or (8192 if fast else 768)
    factor = torch.randn(edge, edge, device=device, dtype=torch.bfloat16 if fast else torch.float32)
    product = torch.empty_like(factor)
    multiplying = _best(lambda: torch.mm(factor, factor, out=product), device, 2 * runs)
    return Peaks(2 * source.numel() / copying, 2 * edge**3 / multiplying)


def _best(function: Callable[[], object], device: str, runs: int) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def bytes_moved(
    op: str, shape: Shape, dtype: torch.dtype, decay: torch.dtype = torch.float32
) -> dict[str, int]:
    """Bytes of every input and every output, each once: of a forward pass, of a backward pass, of a step.

    Args:
        op: operator name.
        shape: of the call; a step has one token, whatever its length.
        dtype: of r, k, v, a, b, y and their gradients.
        decay: of log_w and its gradient.
    """
    narrow, inputs = dtype.itemsize, (len(INPUTS[op]) - 1) * dtype.itemsize + decay.itemsize
    state = 4 * shape.units * shape.head_size**2
    return {
        FORWARD: shape.elements * (inputs + narrow) + 2 * state,
        "backward": shape.elements * (2 * inputs + narrow)
        + 3 * state,  # state, its gradient's way in and out
        STEP: shape.units * shape.head_size * (inputs + narrow) + 2 * state,
    }


def flops(op: str, shape: Shape) -> dict[str, int]:
    """Operations of the recurrence: of a forward pass, of a backward pass, of a step."""
    ahead, back = FLOPS[op]
    each = shape.units * shape.head_size**2
    tokens = each * shape.sequence_length
    return {FORWARD: ahead * tokens, "backward": back * tokens, STEP: ahead * each}


def floor_ms(what: str, op: str, shape: Shape, dtype: torch.dtype, peaks: Peaks) -> float:
    """Milliseconds that a pass of calls.PASSES takes at least, at the device's measured rates."""
    moved, computed = bytes_moved(op, shape, dtype), flops(op, shape)
    parts = (FORWARD, "backward") if what == BOTH else (what,)
    return 1e3 * sum(max(moved[part] / peaks.bandwidth, computed[part] / peaks.flops) for part in parts)
