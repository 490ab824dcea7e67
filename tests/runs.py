"""Runs train.py in a process of its own, small: what the tests of whole runs share."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = (
    "experiment=quickstart",
    "debug=fast",
    "callbacks.checkpoint.every_steps=2",
    "callbacks.text_samples.every_steps=0",
)


TOKENS = {"align": 5120, "distill": 6144}


def command(outputs: Path, cache: Path, *overrides: str) -> list[str]:
    """The command line of a small run, with a token budget for each training stage that it has."""
    stages = next(
        (o.partition("=")[2] for o in overrides if o.startswith("stages=")), "[align,select,distill]"
    )
    budgets = [f"stage.{stage}.tokens={tokens}" for stage, tokens in TOKENS.items() if stage in stages]
    folders = [f"paths.outputs={outputs}", f"paths.cache={cache}"]
    flags = [override for override in overrides if override.startswith("-")]  # they come before all overrides
    others = [override for override in overrides if not override.startswith("-")]
    return [sys.executable, "train.py", *flags, *SMALL, *budgets, *folders, *others]


def environment(python_path: str = "") -> dict[str, str]:
    """The environment of a run: as here, and one thread; `python_path` says where else modules are found."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": python_path}


def train(outputs: Path, cache: Path, *overrides: str, python_path: str = "") -> subprocess.CompletedProcess:
    """Runs to the end; the caller looks at the return code."""
    return subprocess.run(
        command(outputs, cache, *overrides),
        cwd=REPOSITORY,
        env=environment(python_path),
        capture_output=True,
        text=True,
        timeout=240,
    )


def train_and_kill(outputs: Path, cache: Path, checkpoint: str, *overrides: str) -> None:
    """Starts a run and kills it (SIGKILL) as soon as a checkpoint stands in its folder."""
    train_and_signal(outputs, cache, checkpoint, *overrides, number=signal.SIGKILL)


def train_and_signal(
    outputs: Path, cache: Path, checkpoint: str, *overrides: str, number: int = signal.SIGTERM, rank: int = 0
) -> int:
    """Starts a run, sends a signal to one of its processes as soon as a checkpoint stands in its folder.

    Returns:
        The exit code of the first process.
    """
    process = subprocess.Popen(
        command(outputs, cache, *overrides),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list(outputs.glob(f"*/*/checkpoints/{checkpoint}")):
        assert process.poll() is None, f"the run ended before {checkpoint} was there"
        assert time.monotonic() < deadline, f"no {checkpoint} in time"
        time.sleep(0.01)
    others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill([process.pid, *map(int, others)][rank], number)
    return process.wait(timeout=200)


def run_folder(outputs: Path) -> Path:
    """The one run folder below `outputs`."""
    (folder,) = outputs.glob("*/*/config.yaml")
    return folder.parent


def summary(folder: Path) -> dict:
    """The run's summary.json."""
    return json.loads((folder / "summary.json").read_text())


def losses(folder: Path) -> dict[tuple[str, str, str], str]:
    """(stage, step, metric) -> value as written, of everything that does not measure time."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if not row["metric"].startswith("throughput/")]
    return {(row["stage"], row["step"], row["metric"]): row["value"] for row in rows}
