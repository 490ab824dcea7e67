"""Folders of trials as sweeps leave them, made up: what the tests of sweeps share."""

import json
from pathlib import Path

import yaml

from reports.summary import stage_entry
from reports.sweep_trials import FAILURE_FILE

MIXERS, REST = "stage.distill.learning_rate.mixers", "stage.distill.learning_rate.rest"


def summary(loss: float = 3.0, kl: float | None = 0.2, gain: float = 1.0) -> dict:
    """The summary of a run with the stages align and distill; the figures are those of distill."""
    entries = [
        stage_entry(name="align", loss=4.0, tokens=5, seconds=2.0, kl=0.9, top1_agreement=0.5, copy_gain=0.1),
        stage_entry(
            name="distill", loss=loss, tokens=9, seconds=3.0, kl=kl, top1_agreement=0.8, copy_gain=gain
        ),
    ]
    return {
        "teacher": {"loss": 2.8, "perplexity": 16.4, "copy_gain": 1.8},
        "stages": entries,
        "kernels": {"wkv7": {"backend": "cpu", "reason": "fast"}},
        "student": {"parameters": 7, "state_bytes_per_row": 4096, "layer_plan": ["rwkv7", "attention"]},
        "seed": 1,
    }


def write_trial(folder: Path, *overrides: str, result: dict | str | None = None, **config) -> Path:
    """A trial's folder as Hydra and a run leave it."""
    files = {"config": {"optimized_metric": None, "dry_run": False, **config}, "overrides": list(overrides)}
    for name, content in files.items():
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    if result is not None:
        (folder / "summary.json").write_text(result if isinstance(result, str) else json.dumps(result))
    return folder


def write_grid(folder: Path, kl, keys=(MIXERS, "seed"), values=((1e-3, 2e-3, 4e-3), (1, 2))) -> Path:
    """A finished grid over two keys; `kl` gives each trial's figure, or None where it has failed."""
    pairs = [(a, b) for a in values[0] for b in values[1]]
    for number, pair in enumerate(pairs):
        overrides = [f"{key}={value}" for key, value in zip(keys, pair, strict=True)]
        figure = kl(*pair)
        result = None if figure is None else summary(kl=figure)
        trial = write_trial(folder / str(number), "experiment=quickstart", *overrides, result=result)
        if figure is None:
            (trial / FAILURE_FILE).write_text("RuntimeError: out of memory\n")
    return folder
