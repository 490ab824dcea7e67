"""The training loader: its position is one number, the global count of rows consumed."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.packing import Row, Rows


class Segment(NamedTuple):
    """Consecutive batches of one shape.

    Global batch i of it holds rows i*G .. (i+1)*G - 1 with G = rows_per_device * world_size.
    """

    rows: Rows
    rows_per_device: int
    batches: int


class RowDataset(Dataset):
    """Map-style view of the rows of all segments, for the workers of a DataLoader."""

    def __init__(self, rows: Sequence[Rows]):
        self.rows = rows

    def __getitem__(self, place: tuple[int, int]) -> Row:
        """The row at (segment, index within it)."""
        segment, index = place
        return self.rows[segment].row(index)


class _ConsecutiveBatches:
    """Batch sampler: this rank's part of each global batch, from a given batch on, segment after segment."""

    def __init__(self, segments: Sequence[Segment], rank: int, world_size: int):
        self.segments, self.rank, self.world_size = segments, rank, world_size
        self.first = 0

    def __len__(self) -> int:
        return sum(segment.batches for segment in self.segments)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        skipped = self.first
        for number, segment in enumerate(self.segments):
            size = segment.rows_per_device
            for batch in range(min(skipped, segment.batches), segment.batches):
                start = (batch * self.world_size + self.rank) * size
                yield [(number, index) for index in range(start, start + size)]
            skipped = max(0, skipped - segment.batches)


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Stacks rows into the batch contract: input_ids, labels [B,T] int64, document_ids [B,T] int32; and what
    else rows of their kind hold."""
    names = rows[0]._fields
    return {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in names}


class StatefulLoader(DataLoader):
    """A sized loader over endless rows that resumes exactly, also with workers and on another number of
    ranks.

    Batches are counted when they are handed out, so that what workers have prefetched is not taken for
    consumed. Where rows change their length is a function of that count: nothing is rebuilt.

    Args:
        segments: what is served, one after the other.
        rank, world_size: which part of each global batch is this process's.
        workers: DataLoader worker processes.
    """

    def __init__(self, segments: Sequence[Segment], *, rank: int, world_size: int, workers: int):
        sampler = _ConsecutiveBatches(segments, rank, world_size)
        dataset = RowDataset([segment.rows for segment in segments])
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        self._shapes = [(segment.batches, segment.rows_per_device * world_size) for segment in segments]
        self._consumed = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.batch_sampler.first = self._consumed
        for batch in super().__iter__():
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of rows consumed by all ranks together."""
        rows, left = 0, self._consumed
        for batches, rows_per_batch in self._shapes:
            rows += min(left, batches) * rows_per_batch
            left -= min(left, batches)
        return {"rows_consumed": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the given number of rows.

        Raises:
            ValueError: where that number is no whole number of this run's global batches.
        """
        self._consumed, left = 0, state["rows_consumed"]
        for batches, rows_per_batch in self._shapes:
            taken = min(left // rows_per_batch, batches)
            self._consumed, left = self._consumed + taken, left - taken * rows_per_batch
            if left and taken < batches:
                raise ValueError(
                    f"the checkpoint stopped after {state['rows_consumed']} rows, which is no multiple of "
                    f"this run's {rows_per_batch} rows per batch; set data.rows_per_device so that devices x "
                    "rows divide it."
                )
