"""Sweeps: what a trial hands to the sweeper, and the table and the picture when the sweep ends.

`python -m pipeline.sweep <folder>` writes both again, for a sweep that was interrupted or is still running.
"""

import atexit
import logging
import math
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from conf.launch import check_overrides
from pipeline.study import is_search, prepare_study
from reports.metric_key import expected, find
from reports.summary import read_summary
from reports.sweep_report import failure_lines, sweep_table, totals_line, write_sweep
from reports.sweep_trials import FAILED, Sweep, read_sweep

log = logging.getLogger(__name__)


def check_metric(config: DictConfig) -> None:
    """Holds `optimized_metric` against what the run will measure.

    Raises:
        ValueError: naming the key and what there is instead.
    """
    if config.optimized_metric is not None:
        with_teacher = config.teacher.path is not None
        with_transfer = with_teacher and config.init_from is None
        shape = expected(config.stages, with_teacher=with_teacher, with_transfer=with_transfer)
        find(shape, config.optimized_metric)


def optimized_value(config: DictConfig) -> float | None:
    """The number at `optimized_metric` in the summary of a finished run, for the sweeper.

    Returns:
        None where nothing is asked for, in a dry run, and where the run has diverged: the sweeper then counts
        the trial as failed and goes on.

    Raises:
        ValueError: where the run has not measured it.
    """
    if config.optimized_metric is None or config.dry_run:
        return None
    value = find(read_summary(Path(config.paths.run_folder) / "summary.json"), config.optimized_metric)
    if math.isfinite(value):
        return value
    log.warning("%s is %s: the run has diverged.", config.optimized_metric, value)
    return None


class SweepSummary(Callback):
    """Refuses a sweep that cannot work before its first trial, and sums it up after the last.

    Runs in the process that was started with -m and nowhere else; reads the trials' folders only. If a trial
    has failed, the command's exit code is 1.

    Args:
        folder: of the sweep; gets `sweep.csv`, `sweep.md` and `sweep.png`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a search without -m, which would be a single run; a trial of one may be resumed."""
        if is_search(config) and config.ckpt_path is None:
            _refuse(
                "hparams_search has no effect without -m; write `python train.py -m ...`, or leave it out."
            )

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the sweep, and sees to it that an interrupted one is summed up as well."""
        try:
            check_sweep(config)
            prepare_study(config)
        except ValueError as error:
            _refuse(str(error))
        atexit.register(self._after_interruption)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sums up; SystemExit is the one way in which a callback of Hydra can set the exit code."""
        atexit.unregister(self._after_interruption)
        summarise(self.folder)
        if read_sweep(config.hydra.sweep.dir).count(FAILED):  # a study's folder holds earlier trials as well
            raise SystemExit(1)

    def _after_interruption(self) -> None:
        if self.folder.exists():
            summarise(self.folder)


def check_sweep(config: DictConfig) -> None:
    """What can be known to be wrong before the first trial; each trial checks its own config besides.

    Raises:
        ValueError: naming the key and the fix.
    """
    task = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # one may hold ${...}
    given = OverridesParser.create().parse_overrides(task)
    swept = {override.key_or_group for override in given if override.is_sweep_override()}
    if config.ckpt_path is not None or "ckpt_path" in swept:
        raise ValueError(
            "ckpt_path: every trial of a sweep is a new run. To go on with one of them, give its overrides "
            "and ckpt_path=<sweep folder>/<number>, without -m."
        )
    if is_search(config):
        if config.optimized_metric is None:
            raise ValueError(
                "optimized_metric: a search needs a number of summary.json, such as stages.-1.kl."
            )
        if config.dry_run:
            raise ValueError(
                "dry_run=true: a search needs results; leave -m and hparams_search out to dry-run one trial."
            )
    if "stages" not in swept:
        params = config.hydra.sweeper.get("params") or {}
        check_overrides(config, [*task, *(f"{key}={value}" for key, value in params.items())])
        if not swept & {"teacher", "teacher.path", "init_from"}:
            check_metric(config)


def summarise(folder: Path) -> Sweep:
    """Writes the table and the picture of a sweep into its folder, and prints the table.

    Raises:
        ValueError: there is no trial.
    """
    sweep = read_sweep(folder)
    console = Console()
    console.print(sweep_table(sweep, title=f"Sweep {folder.name}"))
    write_sweep(folder, sweep)
    for line in (*failure_lines(sweep), totals_line(sweep), f"Table and picture: {folder / 'sweep.md'}"):
        console.print(line, markup=False, highlight=False)
    return sweep


def _refuse(message: str) -> None:
    sys.stderr.write(f"Error: {message}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        _refuse("name the folder of one sweep: python -m pipeline.sweep outputs/sweeps/<name>/<time>")
    try:
        summarise(Path(sys.argv[1]))
    except ValueError as problem:
        _refuse(str(problem))
