"""The benchmark suite `kernels`: every backend of WKV-7 is held against float64, then timed."""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kernels.measure import FASTEST, PASSES, check_and_time, make_inputs, thread_times


@dataclass(frozen=True, kw_only=True)
class KernelSuite:
    """Checks and times the backends of WKV-7 on this machine; a wrong one gets no speed.

    Args:
        batch_size, sequence_length, heads, head_size: of the inputs, [B,T,H,N].
        threads: of the table; the C++ backend is also timed with twice as many.
        tolerance: largest relative RMS error against float64 of y, the final state and every gradient.
        repeats: backend -> times it is run; they take turns, and the table shows medians.
    """

    batch_size: int
    sequence_length: int
    heads: int
    head_size: int
    threads: int
    tolerance: float
    repeats: Mapping[str, int]

    def run(self, folder: Path, seed: int) -> None:
        """Prints the table and writes kernels.csv and kernels.png.

        Raises:
            SystemExit: where a backend is wrong.
        """
        console = Console()
        torch.set_num_threads(self.threads)
        shape = (self.batch_size, self.sequence_length, self.heads, self.head_size)
        inputs, upstream = make_inputs(*shape, seed=seed)
        rows = check_and_time(self.repeats, self.tolerance, inputs, upstream)
        title = "wkv7 B{} T{} H{} N{}, threads: {}".format(*shape, self.threads)
        _show(console, rows, title)
        counts = [self.threads, 2 * self.threads]
        fastest_right = any(row["backend"] == FASTEST and row["check"] == "right" for row in rows)
        if fastest_right and (os.cpu_count() or 1) >= counts[1]:
            few, many = thread_times(counts, self.repeats[FASTEST], inputs, upstream)
            console.print(
                f"{FASTEST} {PASSES[1]}: {counts[0]} thread(s) {few:.2f} ms, {counts[1]} threads {many:.2f} "
                f"ms, {few / many:.2f} x as fast"
            )
        _save(folder, rows, title)
        console.print(f"written to {folder}")
        if any(row["check"] == "WRONG" for row in rows):
            raise SystemExit("a backend is wrong; its speed was not measured")


def _show(console: Console, rows: list[dict], title: str) -> None:
    """Prints the rows of `check_and_time` as a table; long reasons go below it."""
    table = Table("backend", title=title)
    table.add_column("check", no_wrap=True)
    table.add_column("error", no_wrap=True)
    for kind in PASSES:
        table.add_column(f"{kind}\nms", justify="right", no_wrap=True)
        table.add_column(f"\nx {FASTEST}", justify="right", no_wrap=True)
    for row in rows:
        cells = [
            row["backend"],
            row["check"].split(":")[0],
            "" if row["error"] is None else f"{row['error']:.1e}",
        ]
        figures = [row[f"{kind} {unit}"] for kind in PASSES for unit in ("ms", "ratio")]
        table.add_row(*cells, *("" if figure is None else f"{figure:.2f}" for figure in figures))
    console.print(table)
    for row in rows:
        if ":" in row["check"]:
            console.print(f"{row['backend']} {row['check']}", markup=False)


def _save(folder: Path, rows: list[dict], title: str) -> None:
    """Writes kernels.csv and, where anything was timed, a bar plot (milliseconds, logarithmic)."""
    with open(folder / "kernels.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    timed = [row for row in rows if row["check"] == "right"]
    if not timed:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for offset, kind in zip((-0.2, 0.2), PASSES, strict=True):
        heights = [row[f"{kind} ms"] for row in timed]
        bars = axes.bar([i + offset for i in range(len(timed))], heights, 0.38, label=kind)
        axes.bar_label(bars, fmt="%.1f")
    axes.set(xticks=range(len(timed)), xticklabels=[row["backend"] for row in timed], title=title)
    axes.set(yscale="log", ylabel="milliseconds")
    axes.legend()
    figure.savefig(folder / "kernels.png", dpi=120, bbox_inches="tight")
