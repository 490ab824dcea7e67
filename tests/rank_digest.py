"""A callback for tests: what each process of a run has trained, and how."""

import hashlib
import json
from pathlib import Path

import lightning.pytorch as pl


class RankDigest(pl.Callback):
    """Writes `<run folder>/digest_<rank>.json`: a hash of the student's weights and the peak learning rate.

    Args:
        run_folder: folder of the run.
    """

    def __init__(self, *, run_folder: str) -> None:
        self.folder = Path(run_folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file of this process."""
        digest = hashlib.sha256()
        for parameter in pl_module.student.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        facts = {"weights": digest.hexdigest(), "rate": pl_module.stage.learning_rate["mixers"]}
        facts["processes"] = trainer.world_size
        (self.folder / f"digest_{trainer.global_rank}.json").write_text(json.dumps(facts))
