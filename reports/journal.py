"""What a run has finished so far: one small file that a resumed run continues."""

import json
from pathlib import Path
from typing import Any

from reports.summary import write_text

JOURNAL = "journal.json"


class Journal:
    """Results of finished stages, in order, kept in `<run folder>/journal.json` and rewritten whole.

    Args:
        run_folder: of the run.
        writes: whether this process keeps the file; others of the run have the same facts in memory alone.
    """

    def __init__(self, run_folder: str | Path, *, writes: bool = True):
        self.path, self.writes = Path(run_folder) / JOURNAL, writes
        self.facts: dict[str, Any] = {"stages": []}
        if self.path.exists():
            try:
                self.facts |= json.loads(self.path.read_text())
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"ckpt_path: {self.path} is damaged ({error}); start a new run, from a finished stage's "
                    f"student with init_from={self.path.parent}/checkpoints/<stage>/student."
                ) from error

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What was recorded for each finished stage."""
        return self.facts["stages"]

    def stage(self, name: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None."""
        return next((stage for stage in self.stages if stage["name"] == name), None)

    def tokens(self) -> int:
        """Training tokens of all finished stages."""
        return sum(stage["tokens"] for stage in self.stages)

    def add(self, stage: dict[str, Any]) -> None:
        """Records a finished stage, on disk when this returns."""
        self.stages.append(stage)
        self._write()

    def note(self, **facts: Any) -> None:
        """Records facts about the run, on disk when this returns."""
        self.facts |= facts
        self._write()

    def _write(self) -> None:
        if self.writes:
            write_text(self.path, json.dumps(self.facts))
