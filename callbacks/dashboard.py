"""Weights & Biases panels: grouped by what they show, over the tokens seen, one axis for all stages."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.metrics_csv import MetricsCsv, read_metrics

log = logging.getLogger(__name__)

TOKENS = "trainer/tokens"
READY_GROUPS = ("throughput/", "samples/", "alignment/", "trainer/")
LAYER_ALIGNMENT = re.compile(r"(?P<stage>.+)/(?P<layer>layer_\d+)/alignment")


class PanelLogger(WandbLogger):
    """Lightning's wandb logger with grouped panel names and tokens as the horizontal axis.

    Takes the arguments of `WandbLogger`. Metrics are renamed by `panel_name`; every entry also carries
    `trainer/tokens`, because the step counter starts anew with each stage and tokens do not. Precondition:
    `begin_stage` before metrics are logged, which the `Dashboard` callback calls.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tokens_before = 0
        self._tokens_per_step = 0
        self._defined: set[str] = set()

    def begin_stage(self, stage: str, tokens_before: int, tokens_per_step: int) -> None:
        """Sets where the tokens axis stands.

        Args:
            stage: name of the stage; not used here, the module's metric names start with it.
            tokens_before: tokens consumed by earlier stages.
            tokens_per_step: tokens of one optimiser step over all ranks.
        """
        self._tokens_before, self._tokens_per_step = tokens_before, tokens_per_step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs metrics, tables or images under their panel names.

        Args:
            metrics: names and values.
            step: Lightning's zero-based index of the optimiser step; None stands for "before the first step".
        """
        panels = {panel_name(name): value for name, value in metrics.items()}
        for name in panels.keys() - self._defined:
            # Lightning has already claimed the pattern `*` for its own step axis; only exact names win.
            self.experiment.define_metric(name, step_metric=TOKENS, step_sync=True)
        self._defined.update(panels)
        completed = 0 if step is None else step + 1
        panels[TOKENS] = self._tokens_before + completed * self._tokens_per_step
        super().log_metrics(panels, step)


class Dashboard(pl.Callback):
    """Connects a stage to its wandb panels and adds the alignment heat map when the stage ends.

    Emits `alignment/<stage>/heat_map` (an image). Does nothing without a `PanelLogger` among the loggers.
    Preconditions: the module has `stage_name`, `tokens_before` and `tokens_per_step`; the heat map is read
    from `metrics.csv`, so it also needs a `MetricsCsv` logger.

    Args:
        draw_heat_map: draws layer against step from metric rows, called with (path, rows=, stage=).
        run_folder: folder of the run; the image is kept in its `plots`.
    """

    def __init__(self, *, draw_heat_map: Callable[..., Path], run_folder: str | Path) -> None:
        self.draw_heat_map = draw_heat_map
        self.plots = Path(run_folder) / "plots"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tells the logger where this stage stands on the tokens axis."""
        for logger in _panel_loggers(trainer):
            logger.begin_stage(pl_module.stage_name, pl_module.tokens_before, pl_module.tokens_per_step)
        plain = [logger for logger in trainer.loggers if type(logger) is WandbLogger]
        if plain and trainer.is_global_zero:
            log.warning(
                "wandb panels are neither grouped nor over tokens: set logger.wandb._target_ to "
                "callbacks.dashboard.PanelLogger"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the heat map of a stage that aligned layers."""
        loggers = _panel_loggers(trainer)
        table = next((logger for logger in trainer.loggers if isinstance(logger, MetricsCsv)), None)
        if not loggers or table is None or not trainer.is_global_zero:
            return
        table.save()
        stage = pl_module.stage_name
        rows = (
            [row for row in read_metrics(table.path) if row["stage"] == stage] if table.path.exists() else []
        )
        if not any(LAYER_ALIGNMENT.fullmatch(row["metric"]) for row in rows):
            return
        image = self.draw_heat_map(self.plots / f"alignment_{stage}.png", rows=rows, stage=stage)
        for logger in loggers:
            logger.log_image(f"alignment/{stage}/heat_map", [str(image)], step=trainer.global_step - 1)


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


def _panel_loggers(trainer: pl.Trainer) -> list[PanelLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, PanelLogger)]
