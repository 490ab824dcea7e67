"""What every data module does alike: its rows, of whatever kind, become batches that can be resumed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from data.loader import Segment, StatefulLoader, collate
from data.packing import FirstRows, Row, Rows
from data.teacher_cache import KEY, TaughtRows, TeacherCache

VALIDATION_SEED = 0  # validation rows never depend on the run's seed


class BatchShape(NamedTuple):
    """So many consecutive batches of `rows_per_device` rows of `row_length` tokens."""

    batches: int
    row_length: int
    rows_per_device: int


def in_batches(rows: Sequence[Row], size: int) -> list[dict[str, Tensor]]:
    """Rows of one length, so many at a time, as batches {input_ids, labels, document_ids} [B,T]."""
    return [collate(list(rows[start : start + size])) for start in range(0, len(rows), size)]


class RowDataModule(pl.LightningDataModule):
    """Batches {input_ids [B,T] int64, labels [B,T] int64 (-100 ignored), document_ids [B,T] int32} of endless
    rows.

    A kind of data says in `endless_rows` what its rows are, and in `validation_batches` what is held out.

    Args:
        row_length: T, tokens.
        rows_per_device: B.
        validation_rows: that are evaluated.
        repeat_first_rows: train on the first so many rows only, again and again; 0 means all.
        workers: loader processes.
        seed: of the order of rows.

    Raises:
        ValueError: for a count out of range.
    """

    sources: Mapping[str, Any] = MappingProxyType({})  # name -> document source, where rows come from some
    rows_together = 1  # neighbouring rows that are of use only together
    labels_answers = False  # whether only answers have labels, so that the share of right ones is a figure

    def __init__(
        self,
        *,
        row_length: int,
        rows_per_device: int,
        validation_rows: int,
        repeat_first_rows: int,
        workers: int,
        seed: int,
    ):
        super().__init__()
        self.row_length, self.rows_per_device = row_length, rows_per_device
        self.validation_rows, self.repeat_first_rows = validation_rows, repeat_first_rows
        self.workers, self.seed = workers, seed
        self._shapes: tuple[BatchShape, ...] = ()
        self._caches: tuple[TeacherCache, ...] = ()
        self.check_counts({"row_length": 1, "rows_per_device": 1, "validation_rows": 1})
        self.check_counts({"workers": 0, "repeat_first_rows": 0})

    def check_counts(self, least: dict[str, int]) -> None:
        """Refuses attributes below the given numbers.

        Raises:
            ValueError: naming the key.
        """
        for key, number in least.items():
            if getattr(self, key) < number:
                words = "0 or more" if number == 0 else f"at least {number}"
                raise ValueError(f"data.{key}={getattr(self, key)} must be {words}.")

    def endless_rows(self, row_length: int) -> Rows:
        """The training rows of T = `row_length` tokens."""
        raise NotImplementedError

    def validation_batches(self, rows: int | None = None) -> list[dict[str, Tensor]]:
        """The held-out rows, the same for every run.

        Args:
            rows: how many; None means `validation_rows`.
        """
        raise NotImplementedError

    def row_inputs(self) -> dict[str, Any]:
        """What decides the training rows, as plain data: equal descriptions mean equal rows."""
        raise NotImplementedError

    def train_on(self, shapes: Sequence[BatchShape]) -> None:
        """Says what the training batches are, in order; unless it is called, all have `row_length` and
        `rows_per_device`."""
        self._shapes = tuple(shapes)

    def teach_from(self, *folders: str | Path, key: str = KEY) -> None:
        """Makes training batches bring what caches hold on their rows (`TaughtRow`, `ShortLossRow`).

        Args:
            folders: one cache for each shape of batches.
            key: the config key that names them, for messages.
        """
        self._caches = tuple(TeacherCache(folder, key) for folder in folders)

    def train_rows(self, row_length: int | None = None) -> Rows:
        """The endless training rows.

        Args:
            row_length: T; None means the config's.
        """
        rows = self.endless_rows(row_length or self.row_length)
        if self._caches:
            rows = TaughtRows(rows, self._caches)
        return FirstRows(rows, self.repeat_first_rows) if self.repeat_first_rows else rows

    def train_dataloader(self) -> StatefulLoader:
        """This rank's loader for the whole stage: `trainer.max_steps` optimiser steps."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return StatefulLoader(
            self._segments(world_size), rank=rank, world_size=world_size, workers=self.workers
        )

    def val_dataloader(self) -> DataLoader:
        """A quarter of the held-out rows, for a look during training."""
        # Lightning would take a bare list of batches for a collection of loaders.
        return DataLoader(self.validation_batches(max(1, self.validation_rows // 4)), batch_size=None)

    def batches(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        """Rows, `rows_per_device` at a time."""
        return in_batches(rows, self.rows_per_device)

    def rows_by_shape(self, world_size: int) -> list[Rows]:
        """The rows of each shape of batches, in order; `train_on` has said which.

        Args:
            world_size: processes of the run.
        """
        return [segment.rows for segment in self._segments(world_size)]

    def _segments(self, world_size: int) -> list[Segment]:
        """The rows of each shape of batches; each goes on in the text where the one before it ends."""
        shapes = self._shapes
        if not shapes:
            batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
            shapes = (BatchShape(batches, self.row_length, self.rows_per_device),)
        rows, segments = self.train_rows(shapes[0].row_length), []
        for shape, following in zip(shapes, shapes[1:], strict=False):
            count = shape.batches * shape.rows_per_device * world_size
            first, rows = rows.split(count, following.row_length)
            segments.append(Segment(first, shape.rows_per_device, shape.batches))
        return [*segments, Segment(rows, shapes[-1].rows_per_device, shapes[-1].batches)]
