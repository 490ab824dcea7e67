"""What gpu_check finds out, and the files that it writes."""

import csv
import json
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kernels import measured
from kernels.bench.calls import FLA
from kernels.bench.checks import UNBUILT, WRONG
from kernels.bench.plot import draw
from kernels.bench.table import Row, write_csv


@dataclass
class Findings:
    """What came out.

    Attributes:
        facts: about the machine.
        parity: rows of parity.parity.
        peaks: of the device, None where they were not measured.
        speed: rows of table.Bench.
        decode: rows of decode.decode.
        sparse: rows of sparse.parity, which have a check, and of sparse.prefill and sparse.decoding.
        notes: what was skipped, stopped or crashed, and why.
        broken: parts and backends that crashed.
        tests: the end of what pytest printed; None where it did not run.
        tests_failed: whether it found a failure.
    """

    facts: dict[str, str]
    parity: list[dict] = field(default_factory=list)
    peaks: dict | None = None
    speed: list[Row] = field(default_factory=list)
    decode: list[dict] = field(default_factory=list)
    sparse: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    tests: str | None = None
    tests_failed: bool = False

    def failed(self) -> bool:
        """Whether anything of ours is wrong, or could not be built where it ought to run."""
        rows = [(r["backend"], r["check"]) for r in (*self.parity, *self.decode)]
        rows += [(row.backend, row.check) for row in self.speed]
        rows += [(row["backend"], row["check"]) for row in self.sparse if "check" in row]
        wrong = any(name != FLA and check in (WRONG, UNBUILT) for name, check in rows)
        return wrong or self.tests_failed or any(FLA not in name for name in self.broken)


def facts(device: str) -> dict[str, str]:
    """What the figures depend on."""
    known = {"date": date.today().isoformat(), "device": measured.device_name(torch.device(device).type)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        known["multiprocessors"] = str(properties.multi_processor_count)
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        known["architecture"] = properties.gcnArchName if torch.version.hip else capability
        known["driver"] = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    known |= {"torch": torch.__version__, "CUDA": str(torch.version.cuda), "HIP": str(torch.version.hip)}
    known |= {
        "triton": _version("triton"),
        "fla-core": _version("fla-core"),
        "python": platform.python_version(),
    }
    known["nvcc"] = _said(["nvcc", "--version"])
    return {name: value for name, value in known.items() if value not in ("None", "")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _said(command: list[str]) -> str:
    """The release, or else the first line, that a program prints; "not found" where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "not found"
    release = re.search(r"release ([\d.]+)", done.stdout)
    return release[1] if release else (done.stdout.strip().splitlines() or ["not found"])[0]


def write(folder: Path, found: Findings, page: Callable[[Findings, str | None], str]) -> list[Path]:
    """The results as files, six at most, device and date in their names.

    Args:
        folder: made if need be.
        found: the results.
        page: (found, the plot's file name or None) -> Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", found.facts["device"].lower()).strip("-")
    stem = folder / f"{device}-{found.facts['date']}"
    paths = {
        kind: Path(f"{stem}{kind}") for kind in (".md", ".json", ".csv", "-parity.csv", ".png", "-tests.txt")
    }
    everything = asdict(found) | {"speed": [row.flat() for row in found.speed]}
    paths[".json"].write_text(json.dumps(everything, indent=1) + "\n")
    written = [paths[".json"]]
    if found.parity:
        _write_rows(paths["-parity.csv"], found.parity)
        written.append(paths["-parity.csv"])
    if found.speed:
        write_csv(paths[".csv"], found.speed)
        written.append(paths[".csv"])
        title = f"{found.facts['device']}, {found.speed[0].dtype}, torch {found.facts['torch']}"
        if draw(paths[".png"], found.speed, title):
            written.append(paths[".png"])
    if found.tests is not None:
        paths["-tests.txt"].write_text(found.tests)
        written.append(paths["-tests.txt"])
    paths[".md"].write_text(page(found, paths[".png"].name if paths[".png"] in written else None))
    return [paths[".md"], *written]


def _write_rows(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
