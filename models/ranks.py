"""What the processes of one training run say to each other; with a single process everything is a no-op."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _together() else 0


def is_first() -> bool:
    """Whether this process writes files and talks to loggers."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if _together():
        dist.barrier()


@contextmanager
def in_turn(processes: int) -> Iterator[None]:
    """Runs the block in one process of each machine after the other.

    Args:
        processes: of the run on each machine.
    """
    turn = rank() % processes
    for _ in range(turn):
        barrier()
    yield
    for _ in range(turn, processes):
        barrier()


def share(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, in every process; the others do not call it."""
    if not _together():
        return make()
    box = [make() if is_first() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their numbers, in every process; plain picklable data."""
    if not _together():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, elementwise; the argument stays as it is."""
    if not _together():
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, elementwise."""
    return total(value) / world_size() if _together() else value


def largest(number: int) -> int:
    """The largest of the processes' numbers; it is told over gloo, and no GPU is waited for."""
    if not _together():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
