"""Where a run's numbers come from: the machine, the packages, the code and the command."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import lightning.pytorch as pl

PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "hydra-core",
    "omegaconf",
    "numpy",
    "wandb",
    "triton",
    "flash-linear-attention",
    "flash-attn",
)
SECRET_NAME = re.compile(
    r"(^|[._-])(api[_-]?key|key|secret|password|passwd|token|credentials?)$", re.IGNORECASE
)
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
HIDDEN = "***"


class Provenance(pl.Callback):
    """Writes `<run folder>/environment.json` when a stage starts; emits no metric and has no precondition.

    The file holds Python, platform, package versions, processor and accelerator names, torch threads, the git
    commit with a flag for uncommitted changes, and the command line. It never holds environment variables,
    and a value on the command line that is, or is named like, a secret is hidden. A resumed run that differs
    from the attempt before keeps that attempt's entry under `earlier`.

    Args:
        run_folder: folder of the run.
    """

    def __init__(self, *, run_folder: str | Path) -> None:
        self.path = Path(run_folder) / "environment.json"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the file on the first rank."""
        if trainer.is_global_zero:
            write_environment(self.path, describe_environment())


def describe_environment(command: list[str] | None = None) -> dict:
    """Returns what is to be known about this process, free of secrets.

    Args:
        command: the command line, by default that of this process.
    """
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    accelerators = []
    if torch.cuda.is_available():
        accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git": describe_checkout(Path(__file__).resolve().parent),
        "command": hide_secrets(sys.argv if command is None else command),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": accelerators,
    }


def write_environment(path: Path, environment: dict) -> None:
    """Replaces the file in one step, keeping a differing earlier description under `earlier`."""
    earlier = []
    if path.exists():
        previous = json.loads(path.read_text(encoding="utf-8"))
        earlier = previous.pop("earlier", [])
        if previous != environment:
            earlier.append(previous)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    content = {**environment, "earlier": earlier} if earlier else environment
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def describe_checkout(folder: Path) -> dict | None:
    """Returns `{"commit", "dirty"}` of the git checkout around a folder, or None where there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def hide_secrets(command: list[str]) -> list[str]:
    """Returns a command line with the secrets in it replaced by `***`.

    Hidden are the values of overrides and flags named like one (`logger.wandb.api_key=...`, `--token ...`)
    and any value that a secret-looking environment variable also has.
    """
    known = [value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 8]
    hidden, hide_next = [], False
    for argument in command:
        name, equals, value = argument.partition("=")
        if hide_next:
            argument = HIDDEN
        elif equals and value and SECRET_NAME.search(name.strip("'\"")):
            argument = f"{name}={HIDDEN}"
        for secret in known:
            argument = argument.replace(secret, HIDDEN)
        hide_next = not equals and name.startswith("-") and SECRET_NAME.search(name) is not None
        hidden.append(argument)
    return hidden


def _git(folder: Path, *arguments: str) -> str | None:
    """Returns the output of a git command without locks, or None if it fails or git is missing."""
    try:
        finished = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None
