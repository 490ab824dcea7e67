"""Progress of a stage: a live bar in a terminal, a few log lines where nobody watches."""

import logging
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

log = logging.getLogger(__name__)


class StageProgress(ProgressBar):
    """One bar per stage, titled with the stage's name, showing steps, loss, tokens/s and time left.

    Where the output is not a terminal it writes a log line every tenth of the stage instead. Emits no metric.
    Shows the module's `<stage>/loss` and `throughput/tokens_per_second` (from `Throughput`) where they are
    logged. Precondition: the module has `stage_name` and `tokens_at`; time left needs `trainer.max_steps`,
    which every stage sets from its token budget.

    Args:
        refresh_seconds: shortest time between two updates of the bar. Reading the loss waits for the
            accelerator, so this is not done at every step.
        console: where to draw; by default the standard error stream.
    """

    def __init__(self, *, refresh_seconds: float = 0.5, console: Console | None = None) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._console = console
        self._enabled = True
        self._bar: Progress | None = None
        self._task: Any = None
        self._first_step = 0
        self._started = 0.0
        self._last_refresh = 0.0
        self._last_tenth = 0

    def disable(self) -> None:
        """Shows nothing from now on (Lightning calls it on all ranks but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Shows progress again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Sends what goes through `LightningModule.print` to the log, which does not break the bar."""
        if self._enabled:
            log.info(" ".join(str(argument) for argument in args))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar of this stage at the step from which it starts or resumes."""
        self._started = time.perf_counter()
        self._last_refresh = 0.0
        self._first_step = trainer.global_step
        self._last_tenth = _tenths(trainer.global_step, trainer.max_steps)
        console = self._console or Console(stderr=True)
        if not self._enabled or not console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            expand=True,
        )
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._task = self._bar.add_task(
            pl_module.stage_name, total=total, completed=self._first_step, numbers=""
        )
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar, or writes a log line when another tenth of the stage is done."""
        if not self._enabled:
            return
        now, step = time.perf_counter(), trainer.global_step
        if self._bar is not None:
            if now - self._last_refresh >= self.refresh_seconds:
                self._last_refresh = now
                self._refresh(trainer, pl_module)
            return
        tenth = _tenths(step, trainer.max_steps)
        if tenth > self._last_tenth:
            self._last_tenth = tenth
            progress = f"{step}/{trainer.max_steps} ({step / trainer.max_steps:.0%})"
            log.info("%s %s: %s", pl_module.stage_name, progress, self._numbers(trainer, pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the finished bar on the screen."""
        if self._bar is not None:
            self._refresh(trainer, pl_module)
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Gives the terminal back when training fails or is interrupted."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the terminal back in any case."""
        self._close()

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        numbers = self._numbers(trainer, pl_module)
        self._bar.update(self._task, completed=trainer.global_step, numbers=numbers)

    def _numbers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Returns loss, speed and time left, as far as they are known."""
        parts = []
        metrics = trainer.callback_metrics
        loss = metrics.get(f"{pl_module.stage_name}/loss")
        if loss is not None:
            parts.append(f"loss {float(loss):.4g}")
        speed = metrics.get("throughput/tokens_per_second")
        if speed is not None:
            parts.append(f"{float(speed):,.0f} tokens/s")
        done = trainer.global_step - self._first_step
        if done > 0 and trainer.max_steps > 0:
            steps = (self._first_step, trainer.global_step, trainer.max_steps)
            first, now, end = (pl_module.tokens_at(step) for step in steps)
            parts.append(f"{clock((time.perf_counter() - self._started) / (now - first) * (end - now))} left")
        return ", ".join(parts)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """Returns a duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _tenths(step: int, max_steps: int) -> int:
    return 10 * step // max_steps if max_steps > 0 else 0
