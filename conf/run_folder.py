"""The folder of a run: where it is, who may write to it, and with which config it may be resumed."""

import datetime
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from conf.quiet import quieten
from conf.ranks import outer_rank, process_count, processes
from reports.summary import write_text

log = logging.getLogger(__name__)
UNCHECKED_ON_RESUME = frozenset(
    ("ckpt_path", "paths", "hydra", "logger", "callbacks", "trainer", "strategy", "evaluation")
)
NAMED = 8  # differing keys at most that an error lists


def run_folder(outputs: str, name: str, ckpt_path: str | None) -> str:
    """The folder of a run: a new one, or with `ckpt_path` the one that goes on.

    Args:
        outputs: folder of all runs.
        name: of the run.
        ckpt_path: None, `auto` (the newest run of this name without a summary) or a run folder.
    """
    if outer_rank() > 0:  # the first process has the run folder, and tells the others
        return str(Path(tempfile.gettempdir()) / f"transmute-rank-{outer_rank()}")
    if ckpt_path not in (None, "auto"):
        return str(ckpt_path)
    parent = Path(outputs) / name
    if ckpt_path == "auto":
        unfinished = [path.parent for path in parent.glob("*/config.yaml") if _is_unfinished(path)]
        if unfinished:
            return str(max(unfinished))
    started = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
    return str(parent / started)


def _is_unfinished(path: Path) -> bool:
    """Whether the run of a saved config has begun and not ended; a dry run has not begun."""
    return not (path.parent / "summary.json").exists() and "\ndry_run: true\n" not in path.read_text()


@contextmanager
def running(config: DictConfig) -> Iterator[Path]:
    """Makes the run folder, keeps the config in it, starts the run's other processes, and seeds every
    generator.

    Yields:
        The run folder; no other run can use it inside the block.

    Raises:
        ValueError: where a finished run is asked to go on, or an unfinished one with another config, where
            the folder is in use, or where the GPU that is asked for is missing.
    """
    import lightning.pytorch as pl
    import torch

    from models import ranks

    if config.trainer.accelerator == "gpu" and not config.dry_run and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=gpu: torch finds no GPU here; take auto, or cpu.")
    folder = Path(config.paths.run_folder)
    with occupied(folder) if outer_rank() == 0 else nullcontext():
        if outer_rank() == 0:
            save_config(config, folder)
        quieten()
        with processes(config, folder):
            folder = ranks.share(lambda: folder)
            config.paths.run_folder = str(folder)
            threads = config.trainer.threads or (os.cpu_count() or 1) // ranks.world_size()
            if config.trainer.threads or ranks.world_size() > 1:
                torch.set_num_threads(max(threads, 1))
            pl.seed_everything(config.seed, workers=True, verbose=False)
            log.info("Run folder: %s", folder)
            yield folder


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keeps every other run out of a folder for the length of the block.

    Raises:
        ValueError: where another run is in it, or has finished in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"ckpt_path: another run is writing to {folder}; wait for its end, or start a new run."
            ) from None
        if (folder / "summary.json").exists():
            raise ValueError(
                f"ckpt_path: {folder} is finished; start a new run, or continue it with init_from={folder}."
            )
        yield


def save_config(config: DictConfig, folder: Path) -> None:
    """Writes the resolved config to `<folder>/config.yaml`; a resumed run must agree with what is there.

    Raises:
        ValueError: where a resumed run's config differs in a key that changes its result.
    """
    path = folder / "config.yaml"
    resolved = OmegaConf.to_container(config, resolve=True)
    if path.exists():
        before, now = (_comparable(c) for c in (_saved_config(path), OmegaConf.create(resolved)))
        if different := sorted(_differences(before, now)):
            more = f" and {len(different) - NAMED} more" if len(different) > NAMED else ""
            raise ValueError(
                f"ckpt_path: {folder} was started with another config; these keys differ: "
                f"{', '.join(different[:NAMED])}{more}. "
                "Give the same overrides to resume it, or leave ckpt_path out to start a new run. (On "
                "another number of devices, rows_per_device x devices must stay the same.)"
            )
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(resolved)))


def _saved_config(path: Path) -> DictConfig:
    """The config that a run was started with.

    Raises:
        ValueError: where the file is damaged.
    """
    try:
        config = OmegaConf.load(path)
        if "stages" not in config:
            raise ValueError("it names no stages")
    except (OSError, ValueError, YAMLError) as error:
        raise ValueError(
            f"ckpt_path: {path} is damaged ({str(error).splitlines()[0]}); start a new run, from the last "
            f"finished stage with init_from={path.parent}/checkpoints/<stage>/student."
        ) from error
    return config


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """The dotted keys at which two plain configs differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = before.keys() | now.keys()
        return [k for n in names for k in _differences(before.get(n), now.get(n), f"{key}.{n}".strip("."))]
    return [] if before == now else [key]


def _comparable(config: DictConfig) -> dict[str, Any]:
    """What decides a run's result, as plain data: the stages it has, and rows counted over all processes."""
    plain = OmegaConf.to_container(config)
    plain = {key: value for key, value in plain.items() if key not in UNCHECKED_ON_RESUME}
    plain["stage"] = {name: plain["stage"][name] for name in config.stages if name in plain["stage"]}
    return _rows_per_batch(plain, process_count(config))


def _rows_per_batch(value: Any, count: int) -> Any:
    if isinstance(value, list):
        return [_rows_per_batch(inner, count) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: inner * count if key == "rows_per_device" else _rows_per_batch(inner, count)
        for key, inner in value.items()
    }
