"""The stateful loader: its position survives a resume, with workers and on another number of ranks."""

import numpy as np
import pytest
import torch
from data_inputs import store_of

from data.loader import Segment, StatefulLoader
from data.packing import PackedRows, Row

BATCHES = 8


class Numbered:
    """Rows that hold their index."""

    def row(self, index):
        return Row(np.full(3, index), np.full(3, -100), np.zeros(3, np.int32))


def loader(rank=0, world_size=1, rows_per_device=2, workers=0, batches=BATCHES, rows=None):
    segment = Segment(rows or Numbered(), rows_per_device, batches)
    return StatefulLoader([segment], rank=rank, world_size=world_size, workers=workers)


def indices(batches):
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def taken(source, count):
    """The first batches of a loader that is then left in mid-epoch."""
    batches = []
    for batch in source:
        batches.append(batch)
        if len(batches) == count:
            break
    return batches


def test_batches_follow_the_contract():
    source = loader(rows=PackedRows(store_of([9, 30, 1, 25]), 4, 1), batches=5)
    batches = list(source)
    assert len(batches) == len(source) == 5
    for batch in batches:
        assert {name: (part.shape, part.dtype) for name, part in batch.items()} == {
            "input_ids": ((2, 4), torch.int64),
            "labels": ((2, 4), torch.int64),
            "document_ids": ((2, 4), torch.int32),
        }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3])
def test_resume_in_mid_epoch_gives_exactly_the_rest(workers, stop):
    whole = indices(loader(workers=workers))
    assert whole == [[2 * batch, 2 * batch + 1] for batch in range(BATCHES)]
    interrupted = loader(workers=workers)
    before = taken(interrupted, stop)
    assert interrupted.state_dict() == {"rows_consumed": 2 * stop}  # not what workers have prefetched
    resumed = loader(workers=workers)
    resumed.load_state_dict(interrupted.state_dict())
    assert indices(before) + indices(resumed) == whole
    assert resumed.state_dict() == {"rows_consumed": 2 * BATCHES}
    assert list(resumed) == []  # a finished loader has no second epoch


def test_a_loader_goes_on_when_it_is_iterated_again():
    source = loader()
    assert indices(taken(source, 3)) + indices(source) == indices(loader())


def test_two_ranks_together_read_what_one_reads():
    one = indices(loader(rows_per_device=4))
    two = [indices(loader(rank=rank, world_size=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*two, strict=True)] == one


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_resume_on_another_number_of_ranks(before, after):
    def run(ranks, state, count):
        loaders = [loader(rank=rank, world_size=ranks, rows_per_device=8 // ranks) for rank in range(ranks)]
        for one in loaders:
            one.load_state_dict(state)
        parts = [indices(taken(one, count)) for one in loaders]
        states = [one.state_dict() for one in loaders]
        assert all(state == states[0] for state in states)  # any rank's state stands for all
        return [sum(batch, []) for batch in zip(*parts, strict=True)], states[0]

    first, state = run(before, {"rows_consumed": 0}, 3)
    rest, _ = run(after, state, BATCHES)
    assert first + rest == indices(loader(rows_per_device=8))


def test_a_position_inside_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"after 6 rows.* 4 rows per batch; set data\.rows_per_device"):
        loader(rows_per_device=4).load_state_dict({"rows_consumed": 6})
    half = loader(rows_per_device=3)
    half.load_state_dict({"rows_consumed": 6})
    assert indices(half)[0] == [6, 7, 8]
