"""Freezes groups of parameters for some phases of a stage, so that new parts can catch up with the others."""

import logging
from typing import Any

import lightning.pytorch as pl

log = logging.getLogger(__name__)


class Preheat(pl.Callback):
    """Freezes exactly the groups whose rate is 0 in the running phase, and thaws them where a phase begins
    that trains them.

    Which groups those are is a function of the step, so a resumed run has nothing to restore. Emits no
    metric. Precondition: the module has `stage_name`, `timeline`, `groups_at` (the groups that train at a
    step), `count_parameters` and `train_only`.
    """

    serves = "freezing"  # what a stage's table may need a callback for

    def __init__(self) -> None:
        self._groups: tuple[str, ...] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the stage before, and looks through the phases of this one.

        Raises:
            ValueError: where nothing of the student would train in one of them.
        """
        self._groups = None
        for index, phase in enumerate(pl_module.timeline.phases):
            groups = pl_module.groups_at(phase.first_step)
            if not pl_module.count_parameters(groups):
                raise ValueError(
                    f"stage.{pl_module.stage_name}.curriculum[{index}] trains {', '.join(groups)} alone, of "
                    "which the student has no parameter; give a group that it has (mixers, rest) a rate "
                    "above 0, or leave the entry out."
                )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """Freezes and thaws where other groups train than in the step before, also right after a resume."""
        step = trainer.global_step
        groups = pl_module.groups_at(step)
        if groups == self._groups:
            return
        begins = step == pl_module.timeline.phase_at(step).first_step
        before = pl_module.count_parameters(pl_module.groups_at(step - 1) if begins and step else groups)
        self._groups = groups
        after = pl_module.train_only(groups)
        if begins and after > before:
            words = (pl_module.stage_name, step, f"{before:,}", f"{after:,}")
            log.info(
                "Stage %s: preheat ends at step %d: %s parameters trained before, %s from here on", *words
            )
