"""The phases of a stage's curriculum, as far as the student's attention and the log are concerned."""

import logging
from typing import Any

import lightning.pytorch as pl

log = logging.getLogger(__name__)


class ContextCurriculum(pl.Callback):
    """Tells the student's sparse mixers with each phase whether they attend densely, and says what begins.

    What holds is a function of the step, so a resumed run has nothing to restore. After the stage the mixers
    attend sparsely again, as a student that is loaded does. Emits, with the first step of each phase of a
    table, `<stage>/row_length`, `<stage>/rows_per_device` and `<stage>/dense_attention` (1 or 0), once per
    phase however often the run is resumed. Precondition: the module has `stage_name`, `timeline`, whose
    phases have these values, and `set_attention`.
    """

    serves = "attention"  # what a stage's table may need a callback for

    def __init__(self) -> None:
        self._phase: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the stage before."""
        self._phase = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """Begins a phase, or goes on within one after a resume."""
        step, timeline = trainer.global_step, pl_module.timeline
        phase = timeline.phase_at(step)
        if phase is self._phase:
            return
        self._phase = phase
        pl_module.set_attention(phase.attention)
        if not timeline.has_table:
            return
        log.info(
            "Stage %s: rows of %d tokens, %d per device, %s attention, from step %d to %d (%d tokens each)",
            pl_module.stage_name,
            phase.row_length,
            phase.rows_per_device,
            phase.attention,
            phase.first_step,
            phase.first_step + phase.steps,
            phase.tokens_per_step,
        )
        if step == phase.first_step:  # a run that goes on within the phase has logged it
            said = {
                "row_length": phase.row_length,
                "rows_per_device": phase.rows_per_device,
                "dense_attention": int(phase.attention == "dense"),
            }
            metrics = {f"{pl_module.stage_name}/{name}": value for name, value in said.items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step - 1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the student as it will be used."""
        pl_module.set_attention("sparse")
