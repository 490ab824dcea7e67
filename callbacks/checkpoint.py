"""Checkpoints that are either whole or not there, and a resume that continues where the run stopped."""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist

log = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")


class CheckpointError(ValueError):
    """A checkpoint is missing or damaged."""


class DurableCheckpoint(pl.Callback):
    """Saves `<folder>/<stage>/step-<n>.ckpt` every so many optimiser steps and when training is asked to
    stop, and keeps the newest ones.

    A checkpoint is a file, or with sharded models a folder in which each process writes its part. It is
    written beside its final name, flushed to disk and renamed, with its hash in a `.json` file beside it,
    so a killed run or a flipped bit is noticed instead of loaded. Must stand last among the callbacks, so
    that it saves the state the others have after the step. Emits no metric. Precondition: the module has
    `stage_name`.

    Args:
        folder: of the run's checkpoints; each stage has a folder in it.
        every_steps: optimiser steps between two saves; 0 saves nothing.
        keep: how many to keep.
    """

    def __init__(self, *, folder: str | Path, every_steps: int, keep: int = 2):
        if keep < 1:
            raise ValueError(f"callbacks.checkpoint.keep={keep} must be at least 1.")
        if every_steps < 0:
            raise ValueError(f"callbacks.checkpoint.every_steps={every_steps} must be 0 or more.")
        self.root, self.every_steps, self.keep = Path(folder), every_steps, keep
        self.folder = self.root
        self._saved_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the stage's own folder."""
        self.folder = self.root / pl_module.stage_name
        self._saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that the stage goes on from has been saved already."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves at step boundaries."""
        step = trainer.global_step
        due = step and (trainer.should_stop or (self.every_steps and step % self.every_steps == 0))
        if due and not trainer.fit_loop._should_accumulate() and step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Writes one checkpoint and removes the oldest ones."""
        self._saved_step = trainer.global_step
        path = self.folder / f"step-{trainer.global_step}.ckpt"
        unfinished = path.with_suffix(".writing")
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(unfinished)  # of an attempt that was killed
        trainer.strategy.barrier()
        trainer.save_checkpoint(unfinished)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            publish(unfinished, path, _step_metrics(trainer))
            for _, old in _by_step(self.folder)[: -self.keep]:
                remove(old)
                remove(facts_path(old))
        trainer.strategy.barrier()
        return path


class RandomState(pl.Callback):
    """Saves every process's random number generators with each checkpoint and restores them before the next
    step.

    On more processes than there were before, the new ones keep the generators that they have. Emits no
    metric.
    """

    def __init__(self):
        self._pending: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """State of Python's, numpy's and torch's generators (CPU, and this process's GPU), for each
        process."""
        name, key, *rest = np.random.get_state()
        numpy_state = [name, key.tolist(), *rest]  # plain data, so that loading a checkpoint can run no code
        own = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
        own |= {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        states = [own]
        if dist.is_available() and dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, own)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the state of this process; it is applied when training is about to go on."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        states = state_dict["ranks"]
        self._pending = states[rank] if rank < len(states) else None

    def on_train_batch_start(self, *args: Any) -> None:
        """Applies a remembered state once."""
        if self._pending is None:
            return
        random.setstate(self._pending["python"])
        np.random.set_state(tuple(self._pending["numpy"]))
        torch.set_rng_state(self._pending["torch"])
        if "cuda" in self._pending:
            torch.cuda.set_rng_state(self._pending["cuda"])
        self._pending = None


def publish(unfinished: Path, path: Path, metrics: dict[str, float]) -> None:
    """Flushes a finished checkpoint to disk and gives it its final name, the facts about it first.

    Args:
        unfinished: the complete file or folder under another name in the same folder.
        path: its final name.
        metrics: of the step; loggers write them only after the checkpoint, so a killed run would lose them.
    """
    for part in _parts(unfinished):
        with part.open("rb") as file:
            os.fsync(file.fileno())
    size = sum(part.stat().st_size for part in _parts(unfinished))
    facts = {"sha256": digest(unfinished), "bytes": size, "metrics": metrics}
    with facts_path(path).open("w") as file:
        file.write(json.dumps(facts))
        file.flush()
        os.fsync(file.fileno())
    remove(path)
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name itself
    os.close(folder)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a stage's folder, or None where there is none.

    A damaged newer one is passed over with a warning: the run then repeats a few steps, which is exact.
    """
    for _, path in reversed(_by_step(Path(folder))):
        if is_whole(path):
            return path
        log.warning("Checkpoint %s is damaged (its hash differs); it is passed over.", path)
    if _by_step(Path(folder)):
        log.warning("No checkpoint in %s is whole; the stage begins anew.", folder)
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has the hash that was stored beside it."""
    try:
        expected = json.loads(facts_path(path).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return digest(path) == expected


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files."""
    if path.is_dir():
        listing = "".join(f"{digest(part)} {part.name}\n" for part in _parts(path))
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _parts(path: Path) -> Iterator[Path]:
    return iter(sorted(path.iterdir()) if path.is_dir() else [path])


def facts_path(path: Path) -> Path:
    """Where hash, size and metrics of a checkpoint stand."""
    return path.with_name(path.name + ".json")


def checkpoint_step(path: Path) -> int:
    """Optimiser steps completed when a checkpoint was saved."""
    return int(CHECKPOINT.fullmatch(path.name)[1])


def checkpoint_metrics(path: Path) -> dict[str, float]:
    """What was logged at the step of a checkpoint; empty where that step was not one to log."""
    return json.loads(facts_path(path).read_text())["metrics"]


def _step_metrics(trainer: pl.Trainer) -> dict[str, float]:
    if trainer.global_step % trainer.log_every_n_steps:
        return {}
    named = trainer.callback_metrics.items()
    return {name: float(value) for name, value in named if "/" in name and "/validation_" not in name}


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(m[1]), path) for path in folder.iterdir() if (m := CHECKPOINT.fullmatch(path.name)))
