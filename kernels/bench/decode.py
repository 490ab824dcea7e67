"""What one more token costs: a decoding step launched one by one, and replayed from a CUDA graph."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from kernels.bench.calls import STEP, Contestant, Shape, contestants, first_token, make_call
from kernels.bench.checks import RIGHT, UNABLE, WRONG, Verdict, check_small, guarded, obstacle
from kernels.bench.floors import Peaks, floor_ms

STEPS = 50  # timed together
RUNS = 7  # the median counts


def decode(
    op: str, shape: Shape, dtype: torch.dtype, device: str, backends: Sequence[str] | None, peaks: Peaks
) -> Iterator[dict]:
    """Microseconds of one token of every row.

    Args:
        op, shape, dtype, device: of the step; the shape's length does not matter.
        backends: names; None for all that there are.
        peaks: for the floor.

    Yields:
        A row for each backend: plain_us and graph_us (None on a CPU, or where it cannot be captured, with the
        reason), floor_us, and the fields of checks.Verdict.
    """
    short = Shape(shape.batch_size, 1, shape.heads, shape.head_size)
    floor = floor_ms(STEP, op, short, dtype, peaks) * 1e3
    for each in contestants(op, short.case(device, dtype), backends):
        row = {
            "op": op, "backend": each.name, "rows_times_heads": short.units, "head_size": short.head_size,
            "dtype": str(dtype).split(".")[1], "floor_us": floor, "plain_us": None, "graph_us": None,
        }  # fmt: skip
        verdict = obstacle(each)
        if verdict is None and each.step is None:
            verdict = Verdict(UNABLE, reason="it has no decoding step")
        if verdict is None:
            verdict = guarded(check_small, op, each, short.head_size, dtype, device)
        if verdict.check == RIGHT:
            inputs, _ = make_call(op, short, dtype, device, seed=0)
            verdict = guarded(_time, each, *first_token(inputs), row, verdict)
        yield row | {"check": verdict.check, "error": verdict.error, "reason": verdict.reason}


def _time(
    contestant: Contestant, token: dict[str, torch.Tensor], state: torch.Tensor, row: dict, verdict: Verdict
) -> Verdict:
    """Fills plain_us and graph_us."""

    def many() -> torch.Tensor:
        for _ in range(STEPS):
            y = contestant.step(**token, state=state)
        return y

    row["plain_us"] = _microseconds(many, state.device)
    if state.device.type != "cuda":
        return verdict
    start = torch.zeros_like(state)
    state.copy_(start)
    expected, last = many().clone(), state.clone()
    graph, captured = _capture(many)
    state.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    if not (torch.equal(captured, expected) and torch.equal(state, last)):
        return Verdict(
            WRONG, verdict.error, "a CUDA graph gives something else than the same steps without one"
        )
    row["graph_us"] = _microseconds(graph.replay, state.device)
    return verdict


def _capture(function: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of what a function launches, and the tensor that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def _microseconds(function: Callable[[], object], device: torch.device) -> float:
    """Median wall-clock time of one of the STEPS steps that a function makes, the launches included."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS * 1e6

    once()
    return statistics.median(once() for _ in range(RUNS))
