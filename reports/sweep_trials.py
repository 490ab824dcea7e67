"""Reads the trials of a sweep from their folders, whether they finished, failed or never came to an end."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reports.metric_key import find, higher_is_better
from reports.summary import read_summary

OVERRIDES = ".hydra/overrides.yaml"
FAILURE_FILE = "failure.txt"
# Overrides that tell where a trial runs or writes, not what it is.
NOT_A_SETTING = re.compile(r"(paths|logger|callbacks|hydra|hparams_search|ckpt_path|optimized_metric)\b")
DEFAULT_METRICS = ("stages.-1.kl", "stages.-1.loss")
FINISHED, DIVERGED, FAILED, UNFINISHED, DRY_RUN = "finished", "diverged", "failed", "unfinished", "dry run"


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Args:
        name: its folder below the sweep's.
        overrides: its settings on the command line, key to value as written.
        status: finished, diverged (its figures are no finite numbers), failed, unfinished or dry run.
        reason: why it failed or diverged, how to go on where it is unfinished, or nothing.
        summary: the contents of its `summary.json`, or None.
        metric: the optimised number, or None.
    """

    name: str
    overrides: Mapping[str, str]
    status: str
    reason: str = ""
    summary: Mapping[str, Any] | None = None
    metric: float | None = None

    @property
    def stage(self) -> Mapping[str, Any]:
        """The figures of its last stage, or nothing."""
        return self.summary["stages"][-1] if self.summary and self.summary["stages"] else {}

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of all its stages."""
        return sum(stage["seconds"] or 0 for stage in self.summary["stages"]) if self.summary else None


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep, in order.

    Args:
        metric_key: the number they are compared by, as `reports.metric_key` writes it.
        maximize: whether that number should be large.
        trials: all of them.
        swept: the keys whose values differ between the trials.
    """

    metric_key: str
    maximize: bool
    trials: Sequence[Trial]
    swept: Sequence[str] = field(default_factory=tuple)

    @property
    def measured(self) -> list[Trial]:
        """The trials whose number is there and finite."""
        return [trial for trial in self.trials if trial.metric is not None and math.isfinite(trial.metric)]

    @property
    def best(self) -> Trial | None:
        """The trial with the best number, the first of equal ones."""
        sign = -1 if self.maximize else 1
        return min(self.measured, key=lambda trial: sign * trial.metric, default=None)

    def count(self, status: str) -> int:
        """How many trials have a status."""
        return sum(trial.status == status for trial in self.trials)


def read_sweep(folder: str | Path) -> Sweep:
    """Reads every trial below a folder: of one sweep, or of all sweeps in it where it holds no trial itself.

    Raises:
        ValueError: there is no trial.
    """
    folder = Path(folder)
    found = list(folder.glob(f"*/{OVERRIDES}")) or list(folder.glob(f"*/*/{OVERRIDES}"))
    folders = sorted((path.parent.parent for path in found), key=_natural)
    if not folders:
        raise ValueError(
            f"{folder} holds no trial; name the folder of a sweep, such as outputs/sweeps/<name>/<time>."
        )
    summaries = [_summary(trial) for trial in folders]
    asked = [_yaml(trial / ".hydra/config.yaml").get("optimized_metric") for trial in folders]
    key = next((key for key in asked if key), None) or _default_metric(summaries)
    trials = [
        _trial(path, path.relative_to(folder).as_posix(), summary, key)
        for path, summary in zip(folders, summaries, strict=True)
    ]
    direction = _yaml(folders[0] / ".hydra/hydra.yaml").get("hydra", {}).get("sweeper", {}).get("direction")
    maximize = direction == "maximize" if direction else higher_is_better(key)
    return Sweep(key, maximize, trials, swept_keys([trial.overrides for trial in trials]))


def swept_keys(overrides: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose values are not the same in all trials, in the order of the command line."""
    keys = list(dict.fromkeys(key for trial in overrides for key in trial))
    return [key for key in keys if len({trial.get(key) for trial in overrides}) > 1]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted keys that tell them apart: `stage.distill.tokens` becomes `tokens`."""
    parts = {key: key.split(".") for key in keys}
    names = {}
    for key, words in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next(
            n
            for n in range(1, len(words) + 1)
            if n == len(words) or words[-n:] not in [o[-n:] for o in others]
        )
        names[key] = ".".join(words[-length:])
    return names


def _trial(folder: Path, name: str, summary: Mapping | str | None, key: str) -> Trial:
    overrides = _overrides(folder)
    failure = folder / FAILURE_FILE
    reason = failure.read_text(encoding="utf-8").strip() if failure.exists() else ""
    if isinstance(summary, str):
        return Trial(name, overrides, FAILED, summary)
    if summary is None:
        if reason:
            return Trial(name, overrides, FAILED, reason)
        if _yaml(folder / ".hydra/config.yaml").get("dry_run"):
            return Trial(name, overrides, DRY_RUN)
        resumable = (folder / "config.yaml").exists()
        how = f"to go on with it, give its overrides and ckpt_path={folder}, without -m" if resumable else ""
        return Trial(name, overrides, UNFINISHED, how)
    try:
        metric = find(summary, key)
    except ValueError as error:
        return Trial(name, overrides, FAILED, reason or str(error), summary)
    loss = summary["stages"][-1]["loss"] if summary["stages"] else 0.0
    if not math.isfinite(metric) or (loss is not None and not math.isfinite(loss)):
        return Trial(name, overrides, DIVERGED, f"{key} is {metric}, loss is {loss}", summary, metric)
    return Trial(name, overrides, FINISHED, "", summary, metric)


def _summary(folder: Path) -> Mapping | str | None:
    """The trial's summary, None where there is none, or what is wrong with it."""
    path = folder / "summary.json"
    try:
        return read_summary(path) if path.exists() else None
    except ValueError as error:
        return str(error)


def _default_metric(summaries: Sequence[Any]) -> str:
    """The number to compare trials by where none was asked for: KL, or the loss of runs without a teacher."""
    stages = [s["stages"][-1] for s in summaries if isinstance(s, Mapping) and s["stages"]]
    has_kl = any(stage["kl"] is not None for stage in stages) or not stages
    return DEFAULT_METRICS[0 if has_kl else 1]


def _overrides(folder: Path) -> dict[str, str]:
    lines = [str(line) for line in _yaml(folder / OVERRIDES) or []]
    pairs = (line.lstrip("+~").partition("=") for line in lines)
    return {key: value for key, _, value in pairs if not NOT_A_SETTING.match(key)}


def _yaml(path: Path) -> Any:
    """A YAML file's content; nothing where the file is missing."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 10 behind 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]
