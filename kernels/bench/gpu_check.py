"""All that can be learned from a GPU in a few minutes, without Hydra: `make gpu-check`.

    python -m kernels.bench.gpu_check --out docs/benchmarks

Parity of every backend with float64, its speed beside the floor, what it keeps in memory, what a decoding
step costs, and the tests marked gpu. Each part is a process of its own with a time limit; what is found is
written even where a part fails. Exit status 1 where a backend of ours is wrong or cannot be built, or where a
test fails.
"""

import argparse
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from kernels import dispatch
from kernels.bench import sparse
from kernels.bench.calls import Shape
from kernels.bench.checks import RIGHT, UNABLE, UNBUILT, WRONG
from kernels.bench.child import ROOT, Child, stop
from kernels.bench.parity import Kind, kinds
from kernels.bench.report import report
from kernels.bench.results import Findings, facts, write
from kernels.bench.table import Row
from kernels.case import Case

log = logging.getLogger(__name__)
UNITS = ((1, 16), (2, 32), (8, 32), (16, 32))  # rows, heads
LENGTHS = (1024, 4096, 16384)
# Seconds that a part may take at most, of those that are left; the tests get what remains.
LIMITS = {"parity": 180.0, "peaks": 40.0, "speed": 150.0, "decode": 50.0, "sparse": 70.0}
SPARSE_LENGTHS = (16384, 65536, 262144)  # tokens
END_GRACE = 15.0  # seconds kept for writing the results


class Budget:
    """Seconds for everything.

    Args:
        seconds: from now on.
        now: a clock.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds

    def left(self, limit: float = float("inf")) -> float:
        """Seconds that a part with this limit may take."""
        return max(0.0, min(limit, self._end - self._now() - END_GRACE))


@dataclass(kw_only=True)
class Plan:
    """What is checked and measured.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        backends: names; the definition is none of them, it judges.
        kinds: for parity.
        shapes: for the speeds.
        decoding: shapes for the decoding steps; their length does not matter.
        operators, dtype: for the speeds and the steps.
        seconds: for one pass of one backend.
        peak_sizes: arguments of floors.measure_peaks other than the device.
        sparse: lengths at which sparse attention is measured.
        tests: whether the tests marked gpu are run.
    """

    device: str
    backends: Sequence[str]
    kinds: Sequence[Kind]
    shapes: Sequence[Shape]
    decoding: Sequence[Shape]
    operators: Sequence[str] = dispatch.RECURRENCES
    dtype: str = "bfloat16"
    seconds: float = 0.4
    peak_sizes: dict[str, int] = field(default_factory=dict)
    sparse: Sequence[int] = ()
    tests: bool = True


def default_plan(device: str) -> Plan:
    """For a GPU: every backend that has one, all kinds of call, rows times heads from 16 to 512."""
    case = Case(torch.device(device).type, torch.bfloat16, 64)
    able = [b.name for op in dispatch.RECURRENCES for b in dispatch.backends(op) if b.supports(case) is None]
    names = [name for name in dict.fromkeys(able) if name != "reference"]
    # The case that the aims are stated for comes first, then small before large.
    shapes = [Shape(rows, length, heads, 64) for length in LENGTHS for rows, heads in UNITS]
    shapes.sort(key=lambda shape: (shape != Shape(8, 4096, 32, 64), shape.elements))
    decoding = [Shape(rows, 1, heads, 64) for rows, heads in UNITS]
    return Plan(
        device=device, backends=names, kinds=kinds(), shapes=shapes, decoding=decoding, sparse=SPARSE_LENGTHS
    )  # fmt: skip


def check(plan: Plan, budget: Budget) -> Findings:
    """Run every part of a plan within a budget."""
    found = Findings(facts(plan.device))
    log.info("%s", "; ".join(f"{name}: {value}" for name, value in found.facts.items()))
    log.info("backends: %s", ", ".join(plan.backends))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backends = _parity(plan, budget, folder, found)
        (peaks,) = _run(found, folder, budget, "peaks", device=plan.device, sizes=plan.peak_sizes) or [None]
        found.peaks = peaks
        shared = {
            "device": plan.device, "dtype": plan.dtype, "backends": backends,
            "operators": list(plan.operators), "peaks": peaks,
        }  # fmt: skip
        if peaks is None:
            found.notes.append("speed and decode: not measured, for want of the device's rates")
        else:
            decoding = [asdict(shape) for shape in plan.decoding]
            found.decode = _run(found, folder, budget, "decode", shapes=decoding, **shared)
            limit = budget.left(LIMITS["speed"])
            rest = {
                "seconds": plan.seconds,
                "limit": 0.85 * limit,
                "shapes": [asdict(s) for s in plan.shapes],
            }
            rows = _run(found, folder, budget, "speed", **rest, **shared)
            found.notes += [row["skipped"] for row in rows if "skipped" in row]
            found.speed = [Row.from_flat(row) for row in rows if "skipped" not in row]
        if plan.sparse:
            names = sparse.able(plan.device, plan.dtype)
            found.sparse = _run(
                found, folder, budget, "sparse", device=plan.device, dtype=plan.dtype, backends=names,
                lengths=list(plan.sparse), seconds=plan.seconds,
            )  # fmt: skip
    if plan.tests:
        _tests(budget, found)
    return found


def _run(found: Findings, folder: Path, budget: Budget, part: str, **arguments) -> list[dict]:
    """The rows of one part; what went wrong goes to the findings."""
    seconds = budget.left(LIMITS[part])
    if seconds == 0:
        found.notes.append(f"{part}: skipped, no time was left")
        return []
    rows, reason, broke = Child(folder, part, {"part": part, **arguments}).finish(seconds)
    if reason is not None:
        found.notes.append(reason)
    if broke:
        found.broken.append(part)
    log.info("%s: %d rows%s", part, len(rows), f"; {reason}" if reason else "")
    return rows


def _parity(plan: Plan, budget: Budget, folder: Path, found: Findings) -> list[str]:
    """Parity of all backends at once; returns those that did not break."""
    wanted = {"part": "parity", "device": plan.device, "kinds": [asdict(kind) for kind in plan.kinds]}
    seconds = budget.left(LIMITS["parity"])
    if seconds == 0:
        found.notes.append("parity: skipped, no time was left")
        return list(plan.backends)
    end = time.monotonic() + seconds
    children = {
        name: Child(folder, f"parity of {name}", wanted | {"backend": name}) for name in plan.backends
    }
    sound = []
    for name, child in children.items():
        rows, reason, broke = child.finish(max(0.0, end - time.monotonic()))
        found.parity += rows
        if reason is not None:
            found.notes.append(f"{reason}; {len(rows)} of {len(plan.kinds)} kinds of call were checked")
        if broke:
            found.broken.append(child.name)
        else:
            sound.append(name)
        counts = {
            check: sum(row["check"] == check for row in rows) for check in (RIGHT, WRONG, UNBUILT, UNABLE)
        }
        shown = ", ".join(f"{count} {check}" for check, count in counts.items() if count)
        log.info("parity of %s: %s%s", name, shown or "nothing", f"; {reason}" if reason else "")
    return sound


def _tests(budget: Budget, found: Findings) -> None:
    """The tests marked gpu."""
    marked = re.compile(r"mark\.(multi_)?gpu\b")
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if marked.search(p.read_text())]
    seconds = budget.left()
    if seconds == 0 or not files:
        found.notes.append(
            "the tests marked gpu: skipped, " + ("there are none" if not files else "no time left")
        )
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-m",
        "gpu or multi_gpu",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        found.tests, _ = process.communicate(timeout=seconds)
        found.tests_failed = process.returncode not in (0, 5)  # 5: none was selected
    except subprocess.TimeoutExpired:
        stop(process)
        found.tests, _ = process.communicate()
        found.notes.append(f"the tests marked gpu: stopped after {seconds:.0f} s")
    log.info("%s", found.tests[-1500:])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.gpu_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder for the results"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for everything; what does not fit is skipped"
    )
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("kernels.bench").addHandler(handler)
    logging.getLogger("kernels.bench").setLevel(logging.INFO)
    if not torch.cuda.is_available():
        log.info("gpu-check: no GPU that torch can use; nothing was run")
        return 0
    budget = Budget(60 * options.minutes)
    found = check(default_plan("cuda"), budget)
    for path in write(options.out, found, report):
        log.info("written: %s", path)
    for note in found.notes:
        log.info("note: %s", note)
    log.info("gpu-check: %s", "FAILED" if found.failed() else "passed")
    return int(found.failed())


if __name__ == "__main__":
    sys.exit(main())
