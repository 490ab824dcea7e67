"""Metrics of a run as one long table, `<run folder>/metrics.csv`, that survives resuming.

Lightning's own CSV logger deletes the file when a run resumes and adds columns by rewriting it. This one only
appends, and can cut off what an interrupted run wrote after its last checkpoint.
"""

import csv
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

COLUMNS = ("stage", "step", "tokens", "metric", "value")


class MetricsCsv(Logger):
    """A Lightning logger that writes every metric as one row `stage,step,tokens,metric,value`.

    `step` counts completed optimiser steps of the stage, so the first step is 1 and a checkpoint with
    `global_step == k` stands for the rows up to `step == k`. `value` has all digits of the float. Only the
    first rank writes. Lightning's own `epoch` entry is left out.

    Emits no metric of its own. Precondition: `begin_stage` before each `Trainer.fit`, and `truncate_after`
    where a stage resumes.

    Args:
        run_folder: folder of the run; the file is `metrics.csv` in it.
        flush_every: rows after which the buffer is written even if nobody calls `save` (Lightning calls it
            each time it logs).
    """

    def __init__(self, *, run_folder: str | Path, flush_every: int = 1000) -> None:
        super().__init__()
        if flush_every < 1:
            raise ValueError(f"logger.csv.flush_every must be at least 1, got {flush_every}")
        self.path = Path(run_folder) / "metrics.csv"
        self.flush_every = flush_every
        self.stage: str | None = None
        self._tokens_at: Callable[[int], int] | None = None
        self._rows: list[tuple[str, int, int, str, str]] = []

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Empty: one run folder holds one table."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    def begin_stage(self, stage: str, tokens_at: Callable[[int], int]) -> None:
        """Says to which stage the next rows belong.

        Args:
            stage: name of the stage.
            tokens_at: completed optimiser steps of the stage -> tokens of the run, over all ranks.
        """
        self.save()
        self.stage, self._tokens_at = stage, tokens_at

    @rank_zero_only
    def truncate_after(self, stage: str, step: int) -> None:
        """Drops what an interrupted run wrote after the checkpoint it now resumes from.

        That is every row of `stage` with a larger step, every row of another stage written after the first
        row of `stage`, and a last line that was cut off while being written.

        Args:
            stage: the stage that resumes.
            step: completed optimiser steps of the checkpoint; -1 where the stage starts afresh.
        """
        self.save()
        if not self.path.exists():
            return
        kept, reached = [], False
        for row in _whole_rows(self.path):
            reached = reached or row[0] == stage
            if not reached or (row[0] == stage and int(row[1]) <= step):
                kept.append(row)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds one row per metric.

        Args:
            metrics: names and scalar values.
            step: Lightning's zero-based index of the optimiser step, which is one less than the steps
                completed when a training batch or a validation inside `fit` is logged; None stands for
                "before the first step".
        """
        self.record(metrics, step=0 if step is None else int(step) + 1)

    @rank_zero_only
    def record(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Adds one row per metric at a count of completed steps, for code outside Lightning's loop."""
        if self.stage is None or self._tokens_at is None:
            raise ValueError("logger.csv: call begin_stage(stage, tokens_at) before logging")
        tokens = self._tokens_at(step)
        for metric, value in metrics.items():
            if metric != "epoch":
                self._rows.append((self.stage, step, tokens, metric, repr(float(value))))
        if len(self._rows) >= self.flush_every:
            self.save()

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run folder already holds the composed configuration."""

    @rank_zero_only
    def save(self) -> None:
        """Appends the waiting rows to the file in one write."""
        if not self._rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerows(self._rows)
        self._rows.clear()

    def finalize(self, status: str) -> None:
        """Writes the waiting rows; the logger can be used for a further stage afterwards."""
        self.save()


def read_metrics(path: str | Path) -> list[dict]:
    """Reads a `metrics.csv`.

    A last line without its end, as a killed process leaves it, is skipped.

    Args:
        path: the file.

    Returns:
        One dictionary per row: `stage` str, `step` int, `tokens` int, `metric` str, `value` float.

    Raises:
        ValueError: the file does not have the columns of this format.
    """
    return [
        {
            "stage": row[0],
            "step": int(row[1]),
            "tokens": int(row[2]),
            "metric": row[3],
            "value": float(row[4]),
        }
        for row in _whole_rows(Path(path))
    ]


def _whole_rows(path: Path) -> list[list[str]]:
    """Returns the cells of every complete line after the header."""
    text = path.read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(text.splitlines()))
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path} is not a metrics table: its first line must be {','.join(COLUMNS)}")
    return rows[1:]
