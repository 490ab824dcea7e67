"""Times jobs in turns, so that all of them meet the same noise, and counts what a pass keeps in memory."""

import time
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from kernels.bench.calls import Contestant

CACHE_BYTES = 2**28  # more than the second-level cache of any GPU


class Clock:
    """Milliseconds of one call of a function: events on a GPU, its caches emptied before; else wall-clock."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self._flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if self.on_gpu else None

    def __call__(self, function: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def interleaved(
    jobs: Mapping[Hashable, Callable[[], object]], clock: Callable, repeats: int, seconds: float
) -> dict[Hashable, list[float]]:
    """Milliseconds of every run of jobs that have been run before, taking turns.

    Args:
        jobs: name -> function.
        clock: says how many milliseconds a function takes.
        repeats: runs of a job at most.
        seconds: after which a job is not started again; every job runs at least once.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, function in jobs.items():
            if sum(times[name]) < seconds * 1e3:
                times[name].append(clock(function))
    return times


def memory_kept(
    contestant: Contestant, inputs: dict[str, Tensor], upstream: tuple[Tensor, Tensor]
) -> dict[str, int | None]:
    """What a forward pass keeps until its backward pass, in bytes.

    Returns:
        saved_bytes: of all tensors kept, each memory once, the inputs among them; extra_bytes: without the
        inputs; peak_bytes: the most that both passes took beyond what was there before, None on a CPU.
    """
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    device = inputs["r"].device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        outputs = contestant.run(**inputs)
    torch.autograd.grad(outputs, list(inputs.values()), upstream)
    return {
        "saved_bytes": sum(kept.values()),
        "extra_bytes": sum(size for place, size in kept.items() if place not in given),
        "peak_bytes": torch.cuda.max_memory_allocated(device) - before if on_gpu else None,
    }
