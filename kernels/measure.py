"""Holds backends of WKV-7 against float64 and times them in turns, for benchmark.py."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kernels.jit_build import BuildError
from kernels.wkv7 import wkv7

FASTEST = "cpu"  # the ratios' denominator
PASSES = ("forward", "forward+backward")


def make_inputs(
    batch: int, tokens: int, heads: int, size: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """RWKV-7-like float32 inputs and the gradients to send back.

    Returns:
        [r, log_w, k, v, a, b (each [B,T,H,N]), state [B,H,N,N]], which require gradients, and
        [gradient of y, gradient of the final state].
    """
    generator = torch.Generator().manual_seed(seed)
    r, k, v, key, decay, rate, dy = torch.randn((7, batch, tokens, heads, size), generator=generator).unbind()
    state, dstate = torch.randn((2, batch, heads, size, size), generator=generator).unbind()
    key = torch.nn.functional.normalize(key, dim=-1)
    inputs = [r, -math.exp(-0.5) * decay.sigmoid(), k * size**-0.5, v, -key, key * rate.sigmoid(), state]
    return [x.clone().requires_grad_() for x in inputs], [dy, dstate]


def run_pass(kind: str, backend: str, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """One forward, or one forward and backward: y, the final state and, if computed, all seven gradients."""
    with torch.set_grad_enabled(kind != "forward"):
        outputs = list(wkv7(*inputs[:6], state=inputs[6], backend=backend))
    return outputs if kind == "forward" else outputs + list(torch.autograd.grad(outputs, inputs, upstream))


def worst_error(results: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative RMS error among pairs of tensors; infinite when there is a NaN."""
    errors = [((x - t).norm() / t.norm()).item() for x, t in zip(results, truth, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors)


def interleaved(jobs: Mapping[object, tuple[int, Callable]]) -> dict[object, float]:
    """Median milliseconds of jobs {name: (repeats, function)}, run in turns: all meet the same noise."""
    times: dict[object, list[float]] = {name: [] for name in jobs}
    for turn in range(max((repeats for repeats, _ in jobs.values()), default=0)):
        for name, (repeats, function) in jobs.items():
            if turn < repeats:
                start = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def check_and_time(
    repeats: Mapping[str, int], tolerance: float, inputs: list[Tensor], upstream: list[Tensor]
) -> list[dict]:
    """Check every backend of `repeats` {name: times to run}, and time those that are right.

    Returns:
        One row a backend: "check" ("right", "WRONG" or "unavailable: why"), "error" (worst relative RMS
        against float64), and for each pass milliseconds and the ratio to FASTEST, None where not timed.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = run_pass(PASSES[1], "reference", exact, [x.double() for x in upstream])
    rows, jobs = [], {}
    for name, count in repeats.items():
        row = {"backend": name, "check": "right", "error": None}
        rows.append(row)
        try:
            row["error"] = worst_error(run_pass(PASSES[1], name, inputs, upstream), truth)
        except (BuildError, ValueError) as problem:
            row["check"] = f"unavailable: {problem}"
            continue
        if row["error"] > tolerance:
            row["check"] = "WRONG"
            continue
        jobs |= {(name, kind): (count, partial(run_pass, kind, name, inputs, upstream)) for kind in PASSES}
    times = interleaved(jobs)
    for row in rows:
        for kind in PASSES:
            ms, base = times.get((row["backend"], kind)), times.get((FASTEST, kind))
            row |= {f"{kind} ms": ms, f"{kind} ratio": ms / base if ms and base else None}
    return rows


def thread_times(
    counts: list[int], repeats: int, inputs: list[Tensor], upstream: list[Tensor]
) -> list[float]:
    """Milliseconds of forward+backward of FASTEST with each number of torch threads."""

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        run_pass(PASSES[1], FASTEST, inputs, upstream)

    before = torch.get_num_threads()
    times = interleaved({threads: (repeats, partial(run, threads)) for threads in counts})
    torch.set_num_threads(before)
    return [times[threads] for threads in counts]
