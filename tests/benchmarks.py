"""What the tests of the kernel benchmark share: somebody else's WKV-7, invented rows, a changed backend."""

import math
from dataclasses import replace

import torch

import kernels.wkv7 as wkv7_package
from kernels.bench.calls import BOTH, Shape
from kernels.bench.checks import RIGHT
from kernels.bench.floors import Peaks
from kernels.bench.table import Row
from kernels.wkv7 import reference

SMALL = Shape(1, 20, 2, 32)
AIMED = Shape(8, 4096, 32, 64)
PEAKS = Peaks(bandwidth=1e10, flops=1e11)
FP32 = torch.float32


def right_peer(r, log_w, k, v, a, b, state):
    """Somebody else's WKV-7."""
    return reference.run(r, log_w, k, v, a, b, state, None)


def wrong_peer(r, log_w, k, v, a, b, state):
    y, state = reference.run(r, log_w, k, v, a, b, state, None)
    return y * 1.01, state


def nan_peer(r, log_w, k, v, a, b, state):
    """Right on short calls only."""
    y, state = reference.run(r, log_w, k, v, a, b, state, None)
    return (y if r.shape[1] < 70 else y * math.nan), state


def raising_peer(*_):
    raise RuntimeError("an illegal memory access was encountered")


def row(backend="cuda", shape=AIMED, what=BOTH, ms=1.0, floor=0.5, **options) -> Row:
    """An invented one."""
    figures = {"op": "wkv7", "dtype": "bfloat16", "device": "a GPU", "threads": 1, "check": RIGHT} | options
    ratio = None if ms is None else ms / floor
    return Row(backend=backend, what=what, shape=shape, ms=ms, floor_ms=floor, times_floor=ratio, **figures)


def replace_backend(monkeypatch, name: str, **changes) -> None:
    """Another WKV-7 backend under a name that exists."""
    changed = [replace(b, **changes) if b.name == name else b for b in wkv7_package.BACKENDS]
    monkeypatch.setattr(wkv7_package, "BACKENDS", tuple(changed))
    monkeypatch.setattr(wkv7_package, "TABLE", {b.name: b for b in changed})
