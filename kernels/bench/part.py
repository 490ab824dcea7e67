"""One part of gpu_check in a process of its own: a kernel that hangs or crashes takes nothing else with it.

    python -m kernels.bench.part wanted.json rows.jsonl

The rows are appended to the file as they come, so that a process that is stopped has not worked in vain.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kernels.bench import sparse
from kernels.bench.calls import BOTH, FORWARD, Shape
from kernels.bench.checks import RIGHT
from kernels.bench.decode import decode
from kernels.bench.floors import Peaks, measure_peaks
from kernels.bench.parity import Kind, parity
from kernels.bench.table import Bench


def run_parity(backend: str, device: str, kinds: list[dict]) -> Iterator[dict]:
    """The rows of parity.parity."""
    yield from parity(backend, device, [Kind(**kind) for kind in kinds])


def run_peaks(device: str, sizes: dict[str, int]) -> Iterator[dict]:
    """The device's rates."""
    peaks = measure_peaks(device, **sizes)
    yield {"bandwidth": peaks.bandwidth, "flops": peaks.flops}


def run_speed(
    device: str,
    dtype: str,
    backends: list[str],
    operators: list[str],
    shapes: list[dict],
    peaks: dict,
    seconds: float,
    limit: float,
    now=time.monotonic,
) -> Iterator[dict]:
    """Rows of table.Bench, forward and forward + backward; {"skipped": what} where the time is too short.

    Args:
        device, dtype, backends, operators, shapes: what to measure, in this order.
        peaks: floors.Peaks as a dictionary.
        seconds: for one pass of one backend.
        limit: seconds for everything; a call is begun only where the operator's last one would still fit. The
            first does not count: kernels are compiled and tuned in it.
        now: a clock.
    """
    start, last, fresh = now(), dict.fromkeys(operators, 0.0), set(operators)
    bench = Bench(
        device, getattr(torch, dtype), Peaks(**peaks), 10, seconds, backends, passes=(FORWARD, BOTH)
    )
    for shape in (Shape(**sizes) for sizes in shapes):
        for op in operators:
            begun = now()
            if begun - start + last[op] > limit:
                yield {"skipped": f"speed of {op} {shape}: no time was left"}
                continue
            for row in bench.measure(op, shape):
                yield row.flat()
            last[op] = 0.0 if op in fresh else now() - begun
            fresh.discard(op)
            if device != "cpu":
                torch.cuda.empty_cache()


def run_decode(
    device: str, dtype: str, backends: list[str], operators: list[str], shapes: list[dict], peaks: dict
) -> Iterator[dict]:
    """The rows of decode.decode."""
    for op in operators:
        for sizes in shapes:
            yield from decode(op, Shape(**sizes), getattr(torch, dtype), device, backends, Peaks(**peaks))


def run_sparse(
    device: str, dtype: str, backends: list[str], lengths: list[int], seconds: float
) -> Iterator[dict]:
    """Rows of sparse.parity, and of those that were right in all of them, of sparse.prefill and
    sparse.decoding."""
    right = set(backends)
    for row in sparse.parity(device, backends, sparse.kinds((sparse.SIZE,), (dtype,))):
        right -= {row["backend"]} if row["check"] != RIGHT else set()
        yield row
    names = [name for name in backends if name in right]
    for length in lengths:
        for measure in (sparse.prefill, sparse.decoding):
            yield from measure(device, dtype, names, [length], seconds)


PARTS = {
    "parity": run_parity,
    "peaks": run_peaks,
    "speed": run_speed,
    "decode": run_decode,
    "sparse": run_sparse,
}


def main(arguments: list[str]) -> None:
    """Run the part that the first file describes ({"part": name, ...}); write its rows to the second."""
    wanted = json.loads(Path(arguments[0]).read_text())
    torch.backends.cuda.matmul.allow_tf32 = False
    if wanted["device"] != "cpu":
        torch.set_num_threads(1)  # the definition's small operations, in several processes at once
    with Path(arguments[1]).open("a") as file:
        for row in PARTS[wanted.pop("part")](**wanted):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
