"""The benchmark suite `kernels`: every backend of every operator is held against float64, then timed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kernels import measured
from kernels.bench.calls import BOTH, PASSES, Shape
from kernels.bench.checks import RIGHT, UNABLE, UNBUILT, WRONG
from kernels.bench.floors import measure_peaks
from kernels.bench.plot import draw
from kernels.bench.table import Bench, Row, processors, remember, thread_times, write_csv
from kernels.case import HEAD_SIZES
from kernels.dispatch import RECURRENCES, backends
from kernels.examples import TOLERANCES

DTYPES = ("float32", "bfloat16", "float16")
SIZES = [field.name for field in fields(Shape)]
THREADED = "cpu"  # the backend that is also timed with twice the threads


@dataclass(frozen=True, kw_only=True)
class KernelSuite:
    """Checks and times the operators' backends on this machine; a wrong one gets no speed.

    Args:
        operators: of kernels.dispatch.RECURRENCES; kernels/bench/sparse.py measures sparse attention.
        backends: names; None for all that there are.
        shapes: each {batch_size, sequence_length, heads, head_size}.
        dtype: of r, k, v, a, b: float32, bfloat16 or float16.
        device: cpu, cuda, or auto for cuda where there is one.
        threads: of torch; the C++ backend is also timed with twice as many.
        repeats: runs of each pass at most; the backends take turns, and medians are shown.
        seconds: after which a pass of a backend is not run again.
        tolerance: a key of kernels.examples.TOLERANCES; None for what the dtype allows.
        peers: name -> package.module.function, called as WKV-7: (r, log_w, k, v, a, b, state) -> (y, state).
        remember: keep the times, so that `auto` takes the fastest on this machine from now on.

    Raises:
        ValueError: an operator, backend, dtype, device or tolerance that is unknown, no shape, or a shape
            that no operator takes.
    """

    operators: Sequence[str]
    shapes: Sequence[Mapping[str, int]]
    backends: Sequence[str] | None = None
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 1
    repeats: int = 15
    seconds: float = 3.0
    tolerance: str | None = None
    peers: Mapping[str, str] | None = None
    remember: bool = False

    def __post_init__(self) -> None:
        for op in self.operators:
            _one_of("operators", op, RECURRENCES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        if self.tolerance is not None:
            _one_of("tolerance", self.tolerance, TOLERANCES)
        if not self.operators or not self.shapes:
            raise ValueError("operators and shapes must each name at least one")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: torch finds no GPU here; choose device=cpu")
        for sizes in self.shapes:
            if set(sizes) != set(SIZES) or min(sizes.values()) < 1:
                raise ValueError(f"shapes: {dict(sizes)} must give {', '.join(SIZES)}, each at least 1")
            _one_of("head_size", sizes["head_size"], HEAD_SIZES)
        taken = {backend.name for op in RECURRENCES for backend in backends(op)}
        for name in self.backends or ():
            _one_of("backends", name, sorted(taken))
        if taken & set(self.peers or ()):
            names = ", ".join(taken & set(self.peers))
            raise ValueError(f"peers: {names} is the name of a backend; choose another")

    def run(self, folder: Path, seed: int) -> None:
        """Prints a table for each call and writes kernels.csv and kernels.png.

        Raises:
            SystemExit: where a backend is wrong.
        """
        console = Console()
        torch.set_num_threads(self.threads)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        peaks = measure_peaks(device)
        bench = Bench(
            device, getattr(torch, self.dtype), peaks, self.repeats, self.seconds, self.backends,
            self.peers or {}, self.tolerance, seed,
        )  # fmt: skip
        title = f"{measured.device_name(device)}, {self.dtype}" + (
            f", threads: {self.threads}" if device == "cpu" else ""
        )
        console.print(
            f"{title}\nfloors: {peaks.bandwidth / 1e9:.0f} GB/s copied (read and written), "
            f"{peaks.flops / 1e12:.3g} TFLOP/s in a matrix product",
            markup=False,
        )
        rows = []
        for op in self.operators:
            for shape in (Shape(**sizes) for sizes in self.shapes):
                found = bench.measure(op, shape)
                _show(console, found, f"{op} {shape}")
                rows += found
                self._threads(console, bench, found)
        write_csv(folder / "kernels.csv", rows)
        draw(folder / "kernels.png", rows, title)
        console.print(f"written to {folder}", markup=False)
        ours = [row for row in rows if row.backend not in (self.peers or {})]
        if self.remember:
            for path in dict.fromkeys(remember(ours, device)):
                console.print(f"backend=auto goes by these times from now on: {path}", markup=False)
        if any(row.check == WRONG for row in ours):
            raise SystemExit("a backend is wrong; its speed was not measured")

    def _threads(self, console: Console, bench: Bench, rows: Sequence[Row]) -> None:
        """Says what twice the threads bring, where the machine has them."""
        right = [row for row in rows if (row.backend, row.what) == (THREADED, BOTH) and row.ms is not None]
        counts = [self.threads, 2 * self.threads]
        if right and processors() >= counts[1]:
            few, many = thread_times(bench, right[0].op, right[0].shape, THREADED, counts)
            console.print(
                f"{THREADED} {BOTH}: {counts[0]} thread(s) {few:.2f} ms, {counts[1]} threads {many:.2f} ms, "
                f"{few / many:.2f} x as fast"
            )


def _one_of(key: str, value: object, known: Iterable) -> None:
    if value not in known:
        raise ValueError(f"{key}: {value!r} is unknown; choose from {', '.join(map(str, known))}")


def _show(console: Console, rows: Sequence[Row], title: str) -> None:
    """Prints the rows of one call as a table, narrow enough for a terminal; reasons go below it."""
    table = Table(title=title)
    for heading in ("backend", "check"):
        table.add_column(heading, no_wrap=True)
    for heading in ("worst\nerror", "time", "x\nfastest", "x\nfloor", "kept\n(MiB)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for what in PASSES:
        mine = [row for row in rows if row.what == what]
        table.add_row(f"[bold]{what}[/bold]")
        for row in mine:
            if row.check in (UNABLE, UNBUILT):
                continue
            kept = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}"
            error = "" if row.error is None else f"{row.error:.1e}"
            ratios = [_ratio(row.times_fastest), _ratio(row.times_floor)]
            table.add_row(row.backend, row.check, error, _time(row.ms), *ratios, kept)
        table.add_row("floor", "", "", _time(mine[0].floor_ms), end_section=True)
    console.print(table)
    for row in rows:
        if row.what == BOTH and row.check != RIGHT:
            console.print(f"{row.backend} {row.check}: {row.reason}", markup=False)


def _time(ms: float | None) -> str:
    """With its unit."""
    if ms is None:
        return ""
    return f"{ms * 1e3:.1f} µs" if ms < 1 else f"{ms:.2f} ms"


def _ratio(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"
