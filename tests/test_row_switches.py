"""Rows that change their length: text goes on without repetition, and the loader resumes at every place."""

import numpy as np
import pytest
from data_inputs import store_of
from test_loader import Numbered, indices, taken

from data.loader import Segment, StatefulLoader
from data.packing import FirstRows, MixedRows, PackedRows, RepeatedPassages, passage_range

# --- text ---------------------------------------------------------------------------------------------------


def numbers(rows, count: int) -> np.ndarray:
    """Every token of the first rows; `store_of` numbers its tokens."""
    return np.concatenate([rows.row(index).input_ids for index in range(count)])


@pytest.mark.parametrize("lengths", [(4, 8, 16), (16, 3, 5), (7, 7, 2)])
@pytest.mark.parametrize("seed", [None, 1])
def test_no_text_comes_twice_within_an_epoch_of_several_lengths(lengths, seed):
    store, counts, seen = store_of([9, 30, 1, 25, 60, 3, 100]), (5, 4, 3), []  # 228 tokens
    rest = PackedRows(store, lengths[0], seed)
    for index, count in enumerate(counts):
        rows, rest = rest.split(count, lengths[(index + 1) % 3])
        seen.append(numbers(rows, count))
        assert len(seen[-1]) == count * lengths[index]
    flat = np.concatenate(seen)
    assert len(set(flat.tolist())) == len(flat) < 227
    if seed is None:
        np.testing.assert_array_equal(flat, np.arange(len(flat)))
    left = rest.rows_per_epoch and (227 - len(flat)) // lengths[0]
    more = numbers(rest, left)  # to the end of the epoch
    assert not set(more.tolist()) & set(flat.tolist())
    assert len(more) > 227 - len(flat) - lengths[0]


def test_rows_go_on_into_further_epochs():
    store = store_of([10, 11])  # an epoch has 5 rows of 4 tokens, or 2 of 10
    rows, rest = PackedRows(store, 4, 1).split(13, 10)
    for epoch in range(2):
        part = np.concatenate([rows.row(5 * epoch + index).input_ids for index in range(5)])
        assert len(set(part.tolist())) == 20
    assert len(set(numbers(rows, 13)[40:].tolist())) == 12
    whole = PackedRows(store, 10, 1)  # 8 tokens of the third epoch are left, too few for a row of 10
    for index in range(5):
        np.testing.assert_array_equal(rest.row(index).input_ids, whole.row(6 + index).input_ids)
    _, same = rest.split(0, 10)
    np.testing.assert_array_equal(same.row(3).input_ids, rest.row(3).input_ids)


def test_mixtures_split_each_part_where_it_stands():
    store = store_of([400, 300])
    parts = [PackedRows(store, 8, 1), RepeatedPassages(store, 8, passage_range(8), 1)]
    rows, rest = MixedRows(parts, [3.0, 1.0]).split(10, 16)
    packed = [row for row in (rows.row(i) for i in range(10)) if len(set(row.input_ids.tolist())) == 8]
    after = [row for row in (rest.row(i) for i in range(10)) if len(set(row.input_ids.tolist())) == 16]
    assert len(packed) == rows._drawn(0, 10) and len(after) == rest._drawn(0, 10)
    before = {int(token) for row in packed for token in row.input_ids}
    assert before and not before & {int(token) for row in after for token in row.input_ids}
    draws = [rest.parts[1].row(index).input_ids for index in range(2)]
    again = RepeatedPassages(store, 16, passage_range(16), 1)
    for index, draw in enumerate(draws):
        np.testing.assert_array_equal(draw, again.row(rows._drawn(1, 10) + index).input_ids)


def test_the_first_rows_of_each_length_are_repeated():
    rows, rest = FirstRows(PackedRows(store_of([200]), 4, 1), 2).split(50, 8)
    for part in (rows, rest):
        np.testing.assert_array_equal(part.row(0).input_ids, part.row(2).input_ids)
    assert rest.row(1).input_ids.shape == (8,)


# --- the loader ---------------------------------------------------------------------------------------------


def loader(rank: int = 0, world_size: int = 1, workers: int = 0) -> StatefulLoader:
    """3, 2 and 2 batches of 4, 2 and 6 rows in all."""
    shapes = ((4, 3), (2, 2), (6, 2))
    segments = [Segment(Numbered(), rows // world_size, batches) for rows, batches in shapes]
    return StatefulLoader(segments, rank=rank, world_size=world_size, workers=workers)


WHOLE = [
    *([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]),
    *([0, 1], [2, 3]),
    *([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]),
]
CONSUMED = [0, 4, 8, 12, 14, 16, 22, 28]


@pytest.mark.parametrize("stop", range(8))
def test_every_position_resumes_on_one_and_on_two_processes(stop: int):
    assert indices(loader()) == WHOLE and len(loader()) == 7
    interrupted = loader()
    assert indices(taken(interrupted, stop) if stop else []) == WHOLE[:stop]
    state = interrupted.state_dict()
    assert state == {"rows_consumed": CONSUMED[stop]}
    resumed = [loader(), loader(0, 2), loader(1, 2)]
    for one in resumed:
        one.load_state_dict(state)
    found, *pair = [indices(one) for one in resumed]
    assert found == WHOLE[stop:] == [sum(parts, []) for parts in zip(*pair, strict=True)]
    assert all(one.state_dict() == {"rows_consumed": 28} for one in resumed)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_what_workers_have_prefetched_across_a_switch_is_not_consumed(stop: int):
    interrupted = loader(workers=2)
    before = indices(taken(interrupted, stop))
    resumed = loader(workers=2)
    resumed.load_state_dict(interrupted.state_dict())
    assert before + indices(resumed) == WHOLE


def test_a_position_inside_a_later_batch_is_refused():
    with pytest.raises(ValueError, match="after 13 rows.* 2 rows per batch"):
        loader().load_state_dict({"rows_consumed": 13})
