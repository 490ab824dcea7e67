"""Where a run's numbers come from: the machine, the packages, the code and the command."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

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
# Names of secrets: `api_key`, `hub.token`, `--key`; but not `written_key` or `eos_token`.
SECRET_NAME = re.compile(
    r"(^|[._-])(secret|password|passwd|credentials?"
    r"|(api|access|secret|private|auth)[_-]?key|(api|access|auth|hub|hf|github|wandb)[_-]?token)$"
    r"|(^|\.|^-+)(key|token)$",
    re.IGNORECASE,
)
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
CHANGES = 50  # files named at most
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
    """Returns the state of the git checkout around a folder, or None where there is none.

    Returns:
        {"commit", "dirty", "remote", "changes", "lines"}: `remote` without user and password, or None;
        `changes` as `git status` names the first files, and `lines` as `git diff` counts them.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if commit is None or changes is None:
        return None
    remote = _git(folder, "config", "--get", "remote.origin.url")
    return {
        "commit": commit.strip(),
        "dirty": bool(changes),
        "remote": remote and USER_IN_URL.sub("", remote.strip()).partition("?")[0],
        "changes": changes.splitlines()[:CHANGES],
        "lines": (_git(folder, "diff", "HEAD", "--shortstat") or "").strip(),
    }


def hide_secrets(command: list[str]) -> list[str]:
    """Returns a command line with the secrets in it replaced by `***`.

    Hidden are the values of overrides and flags named like one (`logger.wandb.api_key=...`, `--token ...`),
    users and passwords in addresses, and any value that a secret-looking environment variable also has.
    """
    known, hidden, hide_next = _known_secrets(), [], False
    for argument in command:
        name, equals, value = argument.partition("=")
        if hide_next:
            argument = HIDDEN
        elif equals and value and SECRET_NAME.search(name.strip("'\"")):
            argument = f"{name}={HIDDEN}"
        hide_next = not equals and name.startswith("-") and SECRET_NAME.search(name) is not None
        hidden.append(_hide_known(argument, known))
    return hidden


def hide_secrets_in(config: Any) -> Any:
    """Returns a plain config (dictionaries, lists, values) with the secrets in it replaced by `***`.

    Hidden is what `hide_secrets` hides, whatever the depth.
    """
    return _hide_in(config, "", _known_secrets())


def _hide_in(value: Any, name: str, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _hide_in(inner, str(key), known) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hide_in(inner, name, known) for inner in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and SECRET_NAME.search(name) else _hide_known(value, known)


def _hide_known(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    return USER_IN_URL.sub(f"{HIDDEN}@", text)


def _known_secrets() -> list[str]:
    """Values of secret-looking environment variables; longest first, because one may contain another."""
    found = [value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 8]
    return sorted(found, key=len, reverse=True)


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
    return finished.stdout if finished.returncode == 0 else None
