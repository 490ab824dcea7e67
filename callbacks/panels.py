"""Weights & Biases panels: grouped by what they show, over the tokens seen, one axis for all stages."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.wandb_run import RunIdentity, check_login, run_mode, wandb_run

TOKENS = "trainer/tokens"
READY_GROUPS = ("throughput/", "samples/", "alignment/", "trainer/", "held_out/", "charts/")
LAYER_ALIGNMENT = re.compile(r"(?P<stage>.+)/(?P<layer>layer_\d+)/alignment")


class PanelLogger(WandbLogger):
    """A Lightning logger that writes all stages of a run into one wandb run, in panels over tokens.

    Metrics are renamed by `panel_name`, and tokens are the horizontal axis of everything: Lightning's steps
    start anew with each stage, and a resumed run repeats some of them, at the same tokens. Nobody is ever
    asked anything: `check` refuses a run without a key. Only the first rank talks to wandb.

    Preconditions: everything happens inside `with logger.running():`, and `begin_stage` comes before a
    stage's metrics; the `Dashboard` callback calls it.

    Args:
        run_folder: folder of the run; wandb writes to `wandb` in it and the run's id to `wandb_run.json`.
        project: of wandb; made on first use.
        entity: user or team of wandb; null takes the account's default.
        name: of the run; null is described by `describe`.
        group: of runs; null is described.
        tags: a list of words; null is described.
        notes: a longer text beside the run.
        job_type: kind of run within a group.
        offline: whether everything stays in the run folder until `wandb sync` sends it.
        log_student: whether the finished student becomes an artifact, which uploads all its weights.
        init_timeout_s: seconds to wait for the server at the beginning; then the run is kept offline.
        finish_timeout_s: seconds to wait for uploads at the end.
        experiment: an existing wandb run, which is then neither begun nor ended here.
    """

    def __init__(
        self,
        *,
        run_folder: str | Path,
        project: str = "transmute",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        job_type: str | None = None,
        offline: bool = False,
        log_student: bool = False,
        init_timeout_s: float = 60.0,
        finish_timeout_s: float = 120.0,
        experiment: Any = None,
    ) -> None:
        for key, seconds in (("init_timeout_s", init_timeout_s), ("finish_timeout_s", finish_timeout_s)):
            if seconds <= 0:
                raise ValueError(f"logger.wandb.{key}={seconds} must be above 0 seconds.")
        if isinstance(tags, str):
            raise ValueError(f"logger.wandb.tags={tags} must be a list, such as [{tags}].")
        super().__init__(project=project, save_dir=str(run_folder), name=name, experiment=experiment)
        self.log_student = log_student
        self.stages: Sequence[Mapping] = ()
        self.teacher_loss: float | None = None
        self._mode = run_mode(offline)
        self._identity = RunIdentity(run_folder)
        self._timeouts = {"init_timeout_s": init_timeout_s, "finish_timeout_s": finish_timeout_s}
        self._options = {
            **{"project": project, "entity": entity, "name": name, "group": group, "notes": notes},
            **{"job_type": job_type, "tags": None if tags is None else list(tags)},
        }
        self._tokens_at: Callable[[int], int] = lambda step: 0

    @rank_zero_only
    def check(self) -> None:
        """Raises a ValueError that says what to do where an online run has no key."""
        if self._experiment is None:
            check_login(self._mode)

    def describe(self, **options: Any) -> None:
        """Gives options of `wandb.init` (name, tags, config, ...) for those that the config leaves out."""
        self._options = options | {key: value for key, value in self._options.items() if value is not None}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Begins or continues the wandb run, and ends it with the block; an error marks it as failed."""
        if rank_zero_only.rank != 0:
            yield
            return
        own = wandb_run(self._identity, mode=self._mode, **self._timeouts, **self._options)
        with own if self._experiment is None else nullcontext(self._experiment) as run:
            run.define_metric(TOKENS)
            run.define_metric("*", step_metric=TOKENS, step_sync=True)
            self._experiment = run
            try:
                yield
            finally:
                self._experiment = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run; a stand-in that does nothing on other ranks than the first."""
        assert self._experiment is not None, "PanelLogger is used outside `with logger.running()`"
        return self._experiment

    @property
    def version(self) -> str:
        """The id of the wandb run."""
        return self._identity.id

    def begin_stage(self, stage: str, tokens_at: Callable[[int], int]) -> None:
        """Sets where the tokens axis stands.

        Args:
            stage: name of the stage; not used here, the module's metric names start with it.
            tokens_at: completed optimiser steps of the stage -> tokens of the run, over all ranks.
        """
        self._tokens_at = tokens_at

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs metrics, tables or images under their panel names.

        Args:
            metrics: names and values.
            step: Lightning's zero-based index of the optimiser step; None stands for "before the first step".
        """
        self.log_panels(metrics, tokens=self._tokens_at(0 if step is None else step + 1))

    @rank_zero_only
    def log_panels(self, metrics: Mapping[str, Any], *, tokens: int) -> None:
        """Logs metrics, tables, images or charts under their panel names at so many tokens of the run."""
        panels = {panel_name(name): value for name, value in metrics.items()} | {TOKENS: tokens}
        # Committed at once: what waits for the next step is lost when the process is killed.
        self.experiment.log(panels, step=self._identity.take_step(), commit=True)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run has the composed configuration."""

    def finalize(self, status: str) -> None:
        """Does nothing: the wandb run goes on with the next stage."""


def panel_name(metric: str) -> str:
    """Returns the name under which wandb shows a metric; its part before the first `/` is the group.

    `align/layer_3/alignment` becomes `alignment/align/layer_3`, `distill/kl` becomes `losses/distill/kl`,
    names without a stage go to `trainer/`, and those that already start with a group stay.
    """
    if metric.startswith(READY_GROUPS):
        return metric
    aligned = LAYER_ALIGNMENT.fullmatch(metric)
    if aligned:
        return f"alignment/{aligned['stage']}/{aligned['layer']}"
    return f"losses/{metric}" if "/" in metric else f"trainer/{metric}"


def panel_loggers(loggers: Sequence[Any]) -> list[PanelLogger]:
    """Those among the loggers that write to wandb panels."""
    return [logger for logger in loggers if isinstance(logger, PanelLogger)]
