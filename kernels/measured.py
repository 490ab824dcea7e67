"""Remembers how fast the backends were on this device, so that "auto" can take the fastest.

`python benchmark.py suite=kernels suite.remember=true` writes the file; a measurement of other sources than
those that are here, or of another device, counts for nothing.
"""

import hashlib
import json
import logging
import os
from functools import cache
from pathlib import Path

import torch

from kernels.case import Case
from kernels.jit_build import BuildError, cache_folder

log = logging.getLogger(__name__)


def device_name(device_type: str) -> str:
    """The processor's or the GPU's name, as its vendor writes it."""
    if device_type == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), os.uname().machine)


@cache
def _sources(op: str) -> str:
    """A digest of the files that an operator's speed hangs on: times of other code are worth nothing."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(p for part in (folder, folder / op, folder / "gpu") for p in part.glob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _key(op: str, case: Case) -> str:
    size = "many" if case.many else "few"
    return "|".join(
        [op, _sources(op), device_name(case.device_type), str(case.dtype), f"N={case.head_size}", size]
    )


def _file() -> Path:
    return cache_folder() / "measured.json"


def _read() -> dict[str, dict[str, float]]:
    try:
        return json.loads(_file().read_text())
    except (FileNotFoundError, BuildError):
        return {}
    except (OSError, ValueError) as error:
        log.warning("the measured times of kernels cannot be read and are ignored: %s", error)
        return {}


def times(op: str, case: Case) -> dict[str, float]:
    """Milliseconds of forward + backward by backend, as measured here; empty where nothing was."""
    return _read().get(_key(op, case), {})


def remember(op: str, case: Case, found: dict[str, float]) -> Path:
    """Keep the times of the backends that were right, in milliseconds of forward + backward; the file's path.

    Raises:
        BuildError: there is no folder to write to.
    """
    path = _file()
    table = _read() | {_key(op, case): found}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(partial, path)
    return path
