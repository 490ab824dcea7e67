"""Stops a run that the scheduler wants to end, after the step it is in, so that it can be resumed exactly."""

import logging
import signal
from typing import Any

import lightning.pytorch as pl
import torch

log = logging.getLogger(__name__)


class StopOnSignal(pl.Callback):
    """Asks training to stop after the optimiser step in which any process of the run has received a signal.

    The processes agree at each step: one that stopped alone would leave the others waiting for ever, and
        Lightning's own handler talks to them from inside the signal. Emits no metric. Must stand before the
        checkpoint callback, which saves when training is asked to stop.

    Args:
        signals: names of signals, for example SIGTERM, which schedulers send some time before they kill.
    """

    def __init__(self, *, signals: list[str]) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise ValueError(f"callbacks.stop_on_signal.signals: {unknown} are no names of signals.")
        if deaf := {"SIGKILL", "SIGSTOP"} & {*signals}:
            raise ValueError(f"callbacks.stop_on_signal.signals: no process can act on {', '.join(deaf)}.")
        self.signals = [signal.Signals[name] for name in signals]
        self._before: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to listen."""
        self._received = None
        self._before = {number: signal.signal(number, self._note) for number in self.signals}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Asks training to stop where a process has been told so; only at the end of an optimiser step."""
        if trainer.fit_loop._should_accumulate():
            return
        # On the CPU, over gloo: a GPU is not waited for at every step.
        told = torch.tensor(float(self._received is not None))
        if trainer.strategy.reduce(told, reduce_op="max"):
            log.warning("Asked to stop; saving after step %d.", trainer.global_step)
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the signals back."""
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Gives the signals back."""
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self._received = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
