"""Rows made of documents: nothing lost or doubled, no label across documents, pure by its index."""

import numpy as np
import pytest
from data_inputs import store_of

from data.packing import FirstRows, MixedRows, PackedRows, RepeatedPassages, Row, shifted_row

SHAPES = {
    "mixed": [3, 1, 40, 1, 1, 7, 12],
    "ones": [1] * 29,
    "one_long": [100],
    "short": [5, 6, 7, 5],
    "long_and_ones": [1, 90, 1, 1, 80, 1],
}


def rows_of(rows, indices):
    return [rows.row(index) for index in indices]


def assert_same(first: Row, second: Row):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("row_length", [1, 2, 7, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_holds_every_token_once(shape, row_length, seed):
    lengths = SHAPES[shape]
    total, owner = sum(lengths), np.repeat(np.arange(len(lengths)), lengths)
    packed = PackedRows(store_of(lengths), row_length, seed)
    for epoch in range(3):
        rows = rows_of(packed, range(epoch * packed.rows_per_epoch, (epoch + 1) * packed.rows_per_epoch))
        seen = np.concatenate([row.input_ids for row in rows])
        assert len(seen) == len(set(seen)) == packed.rows_per_epoch * row_length
        assert 1 <= total - len(seen) <= row_length  # the tail: the last label, and what fills no row
        if seed is None:
            np.testing.assert_array_equal(seen, np.arange(len(seen)))
        # What is missing is the end of one stream of documents: whole documents and the end of one other.
        missing = np.setdiff1d(np.arange(total), seen)
        for document in set(owner[missing]):
            part = missing[owner[missing] == document]
            assert part[-1] == np.flatnonzero(owner == document)[-1]
            np.testing.assert_array_equal(np.diff(part), 1)
        cut = [document for document in set(owner[missing]) if document in owner[seen]]
        assert len(cut) <= 1


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("row_length", [1, 7, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_labels_and_document_ids_follow_the_documents(shape, row_length, seed):
    lengths = SHAPES[shape]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    packed = PackedRows(store_of(lengths), row_length, seed)
    for row in rows_of(packed, range(2 * packed.rows_per_epoch)):
        assert [part.dtype for part in row] == [np.int64, np.int64, np.int32]
        assert [part.shape for part in row] == [(row_length,)] * 3
        follows = np.append(owner[1:], -1)[row.input_ids] == owner[row.input_ids]
        np.testing.assert_array_equal(row.labels, np.where(follows, row.input_ids + 1, -100))
        changes = owner[row.input_ids][1:] != owner[row.input_ids][:-1]
        np.testing.assert_array_equal(row.document_ids, np.concatenate([[0], np.cumsum(changes)]))
        # Inside a document the row goes on token by token; a new document starts at its first token.
        starts = row.input_ids[1:][changes]
        np.testing.assert_array_equal(row.input_ids[1:][~changes], row.input_ids[:-1][~changes] + 1)
        assert all(start == 0 or owner[start - 1] != owner[start] for start in starts)


def test_a_row_depends_on_its_index_alone():
    lengths = np.random.default_rng(0).integers(1, 30, 50)
    count = 3 * PackedRows(store_of(lengths), 9, 4).rows_per_epoch
    in_order = rows_of(PackedRows(store_of(lengths), 9, 4), range(count))
    shuffled = PackedRows(store_of(lengths), 9, 4)
    for index in np.random.default_rng(1).permutation(count):
        assert_same(shuffled.row(int(index)), in_order[index])
    assert_same(PackedRows(store_of(lengths), 9, 4).row(count - 1), in_order[-1])


def test_epochs_and_seeds_differ_and_no_seed_keeps_the_order():
    lengths = np.random.default_rng(0).integers(1, 30, 50)

    def epochs(seed):
        packed = PackedRows(store_of(lengths), 9, seed)
        ids = np.stack([row.input_ids for row in rows_of(packed, range(2 * packed.rows_per_epoch))])
        return np.split(ids, 2)

    first, second = epochs(4)
    assert not np.array_equal(first, second)
    # Not only the rows' order is new, but also what meets in a row.
    assert {tuple(row) for row in first} != {tuple(row) for row in second}
    assert not np.array_equal(first, epochs(5)[0])
    kept = epochs(None)
    np.testing.assert_array_equal(kept[0], kept[1])


def test_a_source_too_short_for_a_row_is_refused():
    assert PackedRows(store_of([4, 4]), 7, 0).rows_per_epoch == 1
    with pytest.raises(ValueError, match=r"data\.row_length=8 needs 9 tokens.* has 8"):
        PackedRows(store_of([4, 4]), 8, 0)


@pytest.mark.parametrize("length", [1, 5, 16])
def test_a_passage_shown_twice(length):
    lengths = [length, 40, 3, 60, length + 1]
    store = store_of(lengths)
    passages = RepeatedPassages(store, 2 * length, (length, length), 3)
    owner, end_of_text = np.repeat(np.arange(5), lengths), store.ends - 1
    owners = set()
    for row in rows_of(passages, range(100)):
        first, second = row.input_ids[:length], row.input_ids[length:]
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(np.diff(first), 1)
        assert len(set(owner[first])) == 1 and not set(first) & set(end_of_text)
        np.testing.assert_array_equal(row.labels[:-1], row.input_ids[1:])
        assert row.labels[-1] == -100  # a third copy would follow
        assert not row.document_ids.any()
        assert [part.dtype for part in row] == [np.int64, np.int64, np.int32]
        owners.add(int(owner[first[0]]))
    usable = {document for document, size in enumerate(lengths) if size > length}
    assert owners == usable  # the shortest has exactly one passage


def test_a_repeated_passage_fills_the_row_and_goes_on_at_its_end():
    passages = RepeatedPassages(store_of([30, 40]), 20, (6, 10), 3)
    lengths = set()
    for index in range(200):
        row = passages.row(index)
        length = int(np.flatnonzero(row.input_ids == row.input_ids[0])[1])
        np.testing.assert_array_equal(row.input_ids, np.resize(row.input_ids[:length], 20))
        np.testing.assert_array_equal(row.labels[:-1], row.input_ids[1:])
        assert row.labels[-1] == (-100 if 20 % length == 0 else row.input_ids[20 % length])
        lengths.add(length)
        assert_same(row, RepeatedPassages(store_of([30, 40]), 20, (6, 10), 3).row(index))
    assert lengths == {6, 7, 8, 9, 10}


def test_passages_longer_than_every_document_are_refused():
    with pytest.raises(ValueError, match=r"8 tokens of a passage; lower data\.copy_passage_length"):
        RepeatedPassages(store_of([8, 3]), 16, (8, 8), 0)


class Counted:
    """Rows that tell which sequence and index they are."""

    def __init__(self, name):
        self.name = name

    def row(self, index):
        return self.name, index


@pytest.mark.parametrize("weights", [[1, 1], [0.35, 0.65], [3, 1, 0.1], [0.85, 0.15, 0.02, 7], [2]])
def test_a_mixture_has_exact_shares_and_leaves_nothing_out(weights):
    mixed = MixedRows([Counted(part) for part in range(len(weights))], weights)
    block, taken = MixedRows.pattern_length, [[] for _ in weights]
    for index in range(3 * block):
        part, own = mixed.row(index)
        taken[part].append(own)
        for seen, weight in zip(taken, weights, strict=True):  # also on the way, not only in the end
            assert abs(len(seen) - (index + 1) * weight / sum(weights)) < len(weights)
    for seen, weight in zip(taken, weights, strict=True):
        assert seen == list(range(len(seen)))
        assert abs(len(seen) - 3 * block * weight / sum(weights)) <= 3
    fresh = MixedRows([Counted(part) for part in range(len(weights))], weights)
    assert fresh.row(2345) == mixed.row(2345)


def test_a_share_too_small_to_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"data\.weights.*1/1000"):
        MixedRows([Counted("large"), Counted("small")], [1, 0.0004])


def test_first_rows_come_again():
    first = FirstRows(Counted("rows"), 3)
    assert [first.row(index)[1] for index in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_shifted_row_does_not_share_memory():
    tokens, ids = np.arange(5), np.zeros(5, np.int32)
    row = shifted_row(tokens, ids)
    tokens[:] = 9
    ids[:] = 9
    assert row.input_ids.tolist() == [0, 1, 2, 3] and row.document_ids.tolist() == [0, 0, 0, 0]


def test_documents_run_on_when_asked_to():
    lengths = SHAPES["mixed"]
    apart, joined = (PackedRows(store_of(lengths), 16, 5, cross_documents=flag) for flag in (False, True))
    ended = 0
    for index in range(apart.rows_per_epoch):
        one, other = apart.row(index), joined.row(index)
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        assert not other.document_ids.any()
        np.testing.assert_array_equal(other.labels[:-1], other.input_ids[1:])
        assert not (other.labels == -100).any()
        ended += (one.labels == -100).sum()
    assert ended > 0  # where documents stay apart, the last token of each has no label
