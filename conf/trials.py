"""The trials of a sweep: how one of them fails without ending the others."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from reports.sweep_trials import FAILURE_FILE

CALLBACK = "sweep_summary"  # the key below hydra.callbacks; it reports failed trials when the sweep ends


def is_trial() -> bool:
    """Whether this process runs a trial of a sweep whose failures are reported when it ends."""
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and CALLBACK in hydra.callbacks


def record_failure(message: str) -> None:
    """Keeps the reason in the trial's folder, from where the sweep's table takes it."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE_FILE).write_text(f"{message}\n", encoding="utf-8")
