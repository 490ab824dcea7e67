"""Checks and times every contestant of an operator: one row for each pass."""

import csv
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from kernels import measured
from kernels.bench.calls import (
    BOTH,
    PASSES,
    STEP,
    Contestant,
    Shape,
    contestants,
    first_token,
    make_call,
    run_pass,
)
from kernels.bench.checks import (
    MEMORY,
    OUT_OF_MEMORY,
    RIGHT,
    UNABLE,
    Verdict,
    check_small,
    check_whole,
    guarded,
    obstacle,
)
from kernels.bench.floors import Peaks, floor_ms
from kernels.bench.timing import Clock, interleaved, memory_kept

STEPS = 10  # decoding steps that are timed together


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backend, one pass of one call.

    Attributes:
        op, backend, what, shape, dtype, device, threads: what was run; `what` is one of calls.PASSES, a step
            has one token; threads are torch's.
        check, error, reason: checks.Verdict; without RIGHT nothing was timed.
        ms: median, of one token for a step; None where not timed.
        runs: how many the median is of.
        floor_ms: floors.floor_ms.
        times_floor: ms / floor_ms.
        times_fastest: ms / that of the fastest right backend on the same call.
        saved_bytes, extra_bytes, peak_bytes: timing.memory_kept, for BOTH only.
    """

    op: str
    backend: str
    what: str
    shape: Shape
    dtype: str
    device: str
    threads: int
    check: str
    error: float | None = None
    reason: str | None = None
    ms: float | None = None
    runs: int = 0
    floor_ms: float
    times_floor: float | None = None
    times_fastest: float | None = None
    saved_bytes: int | None = None
    extra_bytes: int | None = None
    peak_bytes: int | None = None

    def flat(self) -> dict:
        """The row as columns, those of the shape among them."""
        columns = {}
        for name, value in asdict(self).items():
            columns |= value if name == "shape" else {name: value}
        return columns

    @classmethod
    def from_flat(cls, columns: dict) -> "Row":
        """The row that `flat` gave these columns."""
        sizes = {field.name for field in fields(Shape)}
        shape = Shape(**{name: columns[name] for name in sizes})
        return cls(shape=shape, **{name: x for name, x in columns.items() if name not in sizes})


@dataclass
class Bench:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of r, k, v, a, b.
        peaks: of the device, for the floors.
        repeats, seconds: runs of a pass at most, and after how much time it is not started again.
        backends: names; None for all.
        peers: as for calls.contestants.
        tolerance: instead of what the dtype allows (a key of kernels.examples.TOLERANCES).
        seed: of the inputs.
        passes: what is timed, of calls.PASSES.
        clock: times a function; None for the device's own.
    """

    device: str
    dtype: torch.dtype
    peaks: Peaks
    repeats: int = 15
    seconds: float = 3.0
    backends: Sequence[str] | None = None
    peers: Mapping[str, str] = field(default_factory=dict)
    tolerance: str | None = None
    seed: int = 0
    passes: Sequence[str] = PASSES
    clock: object = None
    _verdicts: dict[tuple, Verdict] = field(default_factory=dict, init=False)

    def measure(self, op: str, shape: Shape) -> list[Row]:
        """The rows of one call: all contestants are checked, then the right ones timed in turns."""
        everyone = contestants(op, shape.case(self.device, self.dtype), self.backends, self.peers)
        inputs, upstream = make_call(op, shape, self.dtype, self.device, self.seed)
        verdicts, kept, known = {}, {}, {}
        for each in everyone:
            verdict = self._small(op, each, shape)
            if verdict.check == RIGHT:
                whole = guarded(check_whole, op, each, shape, inputs, upstream, known, self.tolerance)
                worst = max(x for x in (verdict.error, whole.error or 0.0))
                verdict = Verdict(whole.check, worst, whole.reason)
            if verdict.check == RIGHT:
                try:
                    kept[each.name] = memory_kept(each, inputs, upstream)
                except OUT_OF_MEMORY as error:
                    verdict = Verdict(MEMORY, verdict.error, str(error).splitlines()[0])
            verdicts[each.name] = verdict
        known.clear()
        jobs = {}
        for each in everyone:
            if verdicts[each.name].check == RIGHT:
                jobs |= self._jobs(each, inputs, upstream)
        for function in jobs.values():
            function()  # every one has run once before the first is timed
        times = interleaved(jobs, self.clock or Clock(self.device), self.repeats, self.seconds)
        rows = []
        for what in self.passes:
            medians = {name: statistics.median(ms) for (name, key), ms in times.items() if key == what}
            if what == STEP:
                medians = {name: ms / STEPS for name, ms in medians.items()}
            floor, fastest = (
                floor_ms(what, op, shape, self.dtype, self.peaks),
                min(medians.values(), default=None),
            )
            for each in everyone:
                ms = medians.get(each.name)
                verdict = verdicts[each.name]
                if verdict.check == RIGHT and ms is None:
                    verdict = Verdict(UNABLE, reason="it has no decoding step")
                figures = {}
                if ms is not None:
                    figures = {"ms": ms, "runs": len(times[each.name, what])}
                    figures |= {"times_floor": ms / floor, "times_fastest": ms / fastest}
                rows.append(
                    Row(
                        op=op,
                        backend=each.name,
                        what=what,
                        shape=shape,
                        dtype=str(self.dtype).split(".")[1],
                        device=measured.device_name(torch.device(self.device).type),
                        threads=torch.get_num_threads(),
                        check=verdict.check,
                        error=verdict.error,
                        reason=verdict.reason,
                        floor_ms=floor,
                        **figures,
                        **(kept.get(each.name, {}) if what == BOTH else {}),
                    )  # fmt: skip
                )
        return rows

    def _small(self, op: str, contestant: Contestant, shape: Shape) -> Verdict:
        """The check that does not depend on the call's lengths, made once."""
        if contestant.obstacle is not None:
            return obstacle(contestant)
        key = (op, contestant.name, shape.head_size)
        if key not in self._verdicts:
            self._verdicts[key] = guarded(
                check_small, op, contestant, shape.head_size, self.dtype, self.device, self.tolerance
            )
        return self._verdicts[key]

    def _jobs(self, contestant: Contestant, inputs: dict, upstream: tuple) -> dict:
        """(name, pass) -> what is timed."""
        jobs = {
            (contestant.name, what): partial(run_pass, what, contestant, inputs, upstream)
            for what in self.passes
            if what != STEP
        }
        if contestant.step is not None and STEP in self.passes:
            token, state = first_token(inputs)
            jobs[contestant.name, STEP] = partial(repeat_step, contestant, token, state)
        return jobs


def repeat_step(contestant: Contestant, token: dict, state: torch.Tensor) -> None:
    """STEPS decoding steps: one alone is too short to be timed."""
    for _ in range(STEPS):
        contestant.step(**token, state=state)


def remember(rows: Sequence[Row], device: str) -> list[Path]:
    """Keep the times of the right backends of ours, so that `auto` takes the fastest here.

    Of several calls of one kind (operator, dtype, head size, few or many rows and heads) the largest counts.
    """
    found: dict[tuple, dict[str, float]] = {}
    ours = [row for row in rows if row.what == BOTH and row.ms is not None]
    for row in sorted(ours, key=lambda row: row.shape.elements):
        case = row.shape.case(device, getattr(torch, row.dtype))
        times = found.setdefault((row.op, case, row.shape), {})
        times[row.backend] = row.ms
    return [measured.remember(op, case, times) for (op, case, _), times in found.items()]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0].flat()))
        writer.writeheader()
        writer.writerows(row.flat() for row in rows)


def thread_times(bench: Bench, op: str, shape: Shape, backend: str, counts: Sequence[int]) -> list[float]:
    """Milliseconds of forward + backward of one backend with each number of torch threads."""
    (contestant,) = contestants(op, shape.case(bench.device, bench.dtype), [backend])
    inputs, upstream = make_call(op, shape, bench.dtype, bench.device, bench.seed)

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        run_pass(BOTH, contestant, inputs, upstream)

    before = torch.get_num_threads()
    try:
        jobs = {threads: partial(run, threads) for threads in counts}
        for job in jobs.values():
            job()
        times = interleaved(jobs, bench.clock or Clock(bench.device), bench.repeats, bench.seconds)
    finally:
        torch.set_num_threads(before)
    return [statistics.median(times[threads]) for threads in counts]


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
