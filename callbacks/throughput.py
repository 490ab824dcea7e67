"""Training speed and the true duration of a stage, across interruptions."""

import statistics
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl


class Throughput(pl.Callback):
    """Measures tokens per second at optimiser-step boundaries and the wall-clock seconds of the stage.

    Emits `throughput/tokens_per_second` (global tokens; the median over the last steps, so that a validation
    or a checkpoint between two steps does not show), `throughput/seconds` (of the stage so far, earlier
    attempts included). Precondition: the module has `tokens_at`, the run's tokens over all ranks after so
    many optimiser steps; a callback that saves checkpoints comes later in the list, so that the step
    just done is in the state.

    Args:
        window: number of steps in the median.
    """

    def __init__(self, *, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"callbacks.throughput.window must be at least 1, got {window}")
        self.tokens = 0
        self._durations: deque[float] = deque(maxlen=window)  # seconds per token
        self._seconds_before = 0.0
        self._started: float | None = None
        self._last_time = 0.0
        self._last_step = 0

    @property
    def seconds(self) -> float:
        """Seconds spent inside `fit` on this stage, those before an interruption included."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds_before + running

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the previous stage; a checkpoint's state is loaded after this hook.

        Raises:
            ValueError: the module does not say how many tokens a step has.
        """
        if not hasattr(pl_module, "tokens_at"):
            raise ValueError("callbacks.throughput needs a module with `tokens_at`; remove it from callbacks")
        self.tokens, self._seconds_before, self._started = 0, 0.0, None
        self._durations.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._started = self._last_time = time.perf_counter()
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the speed whenever an optimiser step has been completed."""
        if trainer.global_step == self._last_step:
            return
        now = time.perf_counter()
        tokens = pl_module.tokens_at(trainer.global_step) - pl_module.tokens_at(self._last_step)
        self.tokens += tokens
        self._durations.append((now - self._last_time) / tokens)
        self._last_time, self._last_step = now, trainer.global_step
        speed = 1 / max(statistics.median(self._durations), 1e-12)
        pl_module.log(
            "throughput/tokens_per_second", speed, on_step=True, on_epoch=False, rank_zero_only=True
        )
        pl_module.log("throughput/seconds", self.seconds, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stops the clock of a stage that failed or was interrupted."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds and tokens of the stage so far, for the checkpoint."""
        return {"seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the seconds and tokens of the interrupted stage."""
        self._seconds_before, self.tokens = float(state_dict["seconds"]), int(state_dict["tokens"])

    def _stop(self) -> None:
        self._seconds_before, self._started = self.seconds, None
