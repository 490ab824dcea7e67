"""The training loader: its position is one number, the global count of rows consumed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.packing import Row, Rows


class RowDataset(Dataset):
    """Map-style view of endless rows, for the workers of a DataLoader."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __getitem__(self, index: int) -> Row:
        return self.rows.row(index)


class _ConsecutiveBatches:
    """Batch sampler: this rank's part of each global batch, from a given batch on."""

    def __init__(self, rows_per_device: int, rank: int, world_size: int, batches: int):
        self.rows_per_device, self.rank, self.world_size, self.batches = (
            rows_per_device,
            rank,
            world_size,
            batches,
        )
        self.first = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first, self.batches):
            start = (batch * self.world_size + self.rank) * self.rows_per_device
            yield list(range(start, start + self.rows_per_device))


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Stacks rows into the batch contract: input_ids, labels [B,T] int64, document_ids [B,T] int32."""
    return {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in Row._fields}


class StatefulLoader(DataLoader):
    """A sized loader over endless rows that resumes exactly, also with workers and on another number of
    ranks.

    Batches are counted when they are handed out, so that what workers have prefetched is not taken for
    consumed.

    Args:
        rows: the rows; global batch i holds rows i*G .. (i+1)*G - 1 with G = rows_per_device * world_size.
        rows_per_device: B.
        batches: length of the loader, counted from the first row.
        rank, world_size: which part of each global batch is this process's.
        workers: DataLoader worker processes.
    """

    def __init__(
        self, rows: Rows, *, rows_per_device: int, batches: int, rank: int, world_size: int, workers: int
    ):
        sampler = _ConsecutiveBatches(rows_per_device, rank, world_size, batches)
        super().__init__(RowDataset(rows), batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        self._rows_per_batch = rows_per_device * world_size
        self._consumed = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.batch_sampler.first = self._consumed
        for batch in super().__iter__():
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of rows consumed by all ranks together."""
        return {"rows_consumed": self._consumed * self._rows_per_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the given number of rows.

        Raises:
            ValueError: where that number is no whole number of this run's global batches.
        """
        self._consumed, rest = divmod(state["rows_consumed"], self._rows_per_batch)
        if rest:
            raise ValueError(
                f"the checkpoint stopped after {state['rows_consumed']} rows, which is no multiple of this "
                "run's "
                f"{self._rows_per_batch} rows per batch; set data.rows_per_device so that devices x rows "
                "divide it."
            )
