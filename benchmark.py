"""Measures the backends of WKV-7 on this machine: `python benchmark.py suite=kernels`.

Every backend is first held against the float64 reference in the same process; a wrong one gets no speed.
"""

import csv
import os
from pathlib import Path

import hydra
import matplotlib
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from kernels.measure import FASTEST, PASSES, check_and_time, make_inputs, thread_times


def show(console: Console, rows: list[dict], title: str) -> None:
    """Print the rows of kernels.measure.check_and_time as a table; long reasons go below it."""
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


def save(folder: Path, rows: list[dict], title: str) -> None:
    """Write kernels.csv and, where anything was timed, a bar plot kernels.png (milliseconds, logarithmic)."""
    with open(folder / "kernels.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    timed = [row for row in rows if row["check"] == "right"]
    if not timed:
        return
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


@hydra.main(version_base="1.3", config_path="conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Check, time, print the table, and write it to the run folder."""
    suite, console, folder = config.suite, Console(), Path(HydraConfig.get().runtime.output_dir)
    torch.set_num_threads(suite.threads)
    shape = (suite.batch_size, suite.sequence_length, suite.heads, suite.head_size)
    inputs, upstream = make_inputs(*shape, seed=config.seed)
    rows = check_and_time(suite.repeats, suite.tolerance, inputs, upstream)
    title = "wkv7 B{} T{} H{} N{}, threads: {}".format(*shape, suite.threads)
    show(console, rows, title)
    counts = [suite.threads, 2 * suite.threads]
    fastest_right = any(row["backend"] == FASTEST and row["check"] == "right" for row in rows)
    if fastest_right and (os.cpu_count() or 1) >= counts[1]:
        few, many = thread_times(counts, suite.repeats[FASTEST], inputs, upstream)
        console.print(
            f"{FASTEST} {PASSES[1]}: {counts[0]} thread(s) {few:.2f} ms, {counts[1]} threads {many:.2f} ms, "
            f"{few / many:.2f} x as fast"
        )
    save(folder, rows, title)
    console.print(f"written to {folder}")
    if any(row["check"] == "WRONG" for row in rows):
        raise SystemExit("a backend is wrong; its speed was not measured")


if __name__ == "__main__":
    main()
