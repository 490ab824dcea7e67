"""Refuses a run whose outputs have no place, before Hydra makes its folder and says so in a traceback."""

import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class CheckOutputs(Callback):
    """A callback of Hydra that ends a script with 2 where `paths.outputs` cannot be written."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks before a run."""
        _check(Path(config.paths.outputs))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks before a sweep."""
        _check(Path(config.paths.outputs))


def _check(folder: Path) -> None:
    """SystemExit is the one way in which a callback of Hydra can end a script."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        why = error.strerror or error
        sys.stderr.write(f"Error: paths.outputs={folder} cannot be used ({why}); name another folder.\n")
        raise SystemExit(2) from None
