"""Charts that grow while a stage trains: the loss beside the teacher's, the alignment of each layer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger

from callbacks.metrics_csv import MetricsCsv, read_metrics
from callbacks.panel_charts import loss_chart
from callbacks.panels import LAYER_ALIGNMENT, panel_loggers

log = logging.getLogger(__name__)


class Dashboard(pl.Callback):
    """Connects a stage to its wandb panels and draws the charts that grow while it trains.

    Emits `alignment/<stage>/heat_map` (an image) for stages that align layers, and `charts/loss`. Does
    nothing without a `PanelLogger` among the loggers. Preconditions: the module has `stage_name`,
    `tokens_at`; the charts are drawn from `metrics.csv`, so they also need a
    `MetricsCsv` logger.

    Args:
        draw_heat_map: draws layer against step from metric rows, called with (path, rows=, stage=).
        run_folder: folder of the run; the image is kept in its `plots`.
        every_steps: optimiser steps between two drawings; 0 draws when a stage ends only.
    """

    def __init__(
        self, *, draw_heat_map: Callable[..., Path], run_folder: str | Path, every_steps: int = 0
    ) -> None:
        if every_steps < 0:
            raise ValueError(f"callbacks.dashboard.every_steps={every_steps} must be 0 or more.")
        self.draw_heat_map, self.every_steps = draw_heat_map, every_steps
        self.plots = Path(run_folder) / "plots"
        self._drawn_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tells the logger where this stage stands on the tokens axis."""
        for logger in panel_loggers(trainer.loggers):
            logger.begin_stage(pl_module.stage_name, pl_module.tokens_at)
        if any(type(logger) is WandbLogger for logger in trainer.loggers) and trainer.is_global_zero:
            log.warning(
                "wandb panels are neither grouped nor over tokens: set logger.wandb._target_ to "
                "callbacks.panels.PanelLogger"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the step of the checkpoint as drawn already."""
        self._drawn_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Draws when a multiple of `every_steps` has been reached."""
        step = trainer.global_step
        if self.every_steps and step != self._drawn_step and step % self.every_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the whole stage."""
        if trainer.global_step != self._drawn_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drawn_step = trainer.global_step
        loggers = panel_loggers(trainer.loggers)
        table = next((logger for logger in trainer.loggers if isinstance(logger, MetricsCsv)), None)
        if not loggers or table is None or not trainer.is_global_zero:
            return
        table.save()
        rows, stage = read_metrics(table.path) if table.path.exists() else [], pl_module.stage_name
        of_stage = [row for row in rows if row["stage"] == stage]
        image = None
        if any(LAYER_ALIGNMENT.fullmatch(row["metric"]) for row in of_stage):
            image = self.draw_heat_map(self.plots / f"alignment_{stage}.png", rows=of_stage, stage=stage)
        for logger in loggers:
            if image is not None:
                logger.log_image(f"alignment/{stage}/heat_map", [str(image)], step=trainer.global_step - 1)
            chart = loss_chart(rows, logger.stages, logger.teacher_loss)
            if chart is not None:
                logger.log_metrics({"charts/loss": chart}, step=trainer.global_step - 1)
