"""Passages at both ends of a row, and the loss on their second place, read through the decoding cache."""

import numpy as np
import pytest
import torch
from data_inputs import store_of
from evaluations import hybrid
from mixer_checks import student_of
from tiny import VOCABULARY, tiny_teacher
from torch import Tensor
from transformers import PreTrainedModel

from data.distant_copies import DistantCopies
from data.loader import collate
from data.packing import IGNORED
from models.backbone import hidden_states, output_head
from models.losses import cross_entropy
from models.mixers import SparseAttentionOptions
from models.retrieval import cached_losses


@pytest.mark.parametrize(("row_length", "passage"), [(40, 12), (24, 12), (25, 12), (100, 2)])
def test_a_row_begins_and_ends_with_its_passage(row_length, passage):
    store = store_of([30, 5, 60, 17, 200])
    shown, other = (
        DistantCopies(passage_length=passage, shown=x).rows(store, None, row_length, 7) for x in (True, False)
    )
    for index in range(6):
        row, without = shown.row(index), other.row(index)
        tokens = np.append(row.input_ids, row.labels[-1])
        assert len(row.input_ids) == row_length and not row.document_ids.any() and shown.depth(index) == 0
        assert np.array_equal(tokens[:passage], tokens[-passage:])
        answered = np.flatnonzero(row.labels != IGNORED)
        assert answered.tolist() == list(range(row_length - passage + 1, row_length))
        assert np.array_equal(row.labels[answered], tokens[answered + 1])
        assert not np.array_equal(without.input_ids[:passage], row.input_ids[:passage])
        assert np.array_equal(without.input_ids[passage:], row.input_ids[passage:])
        assert np.array_equal(without.labels, row.labels)
    assert not np.array_equal(shown.row(0).input_ids, shown.row(1).input_ids)


def test_a_passage_stands_in_one_document():
    """Somewhere in it, without its end-of-text token."""
    store = store_of([30, 5, 60])
    documents = [store.document(index)[:-1].tolist() for index in range(3)]
    rows = DistantCopies(passage_length=20, shown=True).rows(store, None, 50, 1)
    for index in range(20):
        passage = rows.row(index).input_ids[:20].tolist()
        assert any(passage == d[i : i + 20] for d in documents for i in range(max(0, len(d) - 19)))


def test_too_little_text_or_room_is_refused():
    task = DistantCopies(passage_length=20, shown=True)
    with pytest.raises(ValueError, match="fewer than two documents have the 20 tokens"):
        task.rows(store_of([30, 20, 5]), None, 50, 1)
    with pytest.raises(ValueError, match="x: rows of 39 tokens have no room for a passage of 20 twice"):
        task.check_row_length(39, "x")
    task.check_row_length(40, "x")


def batch_of(rows: int, length: int, passage: int) -> dict[str, Tensor]:
    made = DistantCopies(passage_length=passage, shown=True).rows(store_of([90, 70, 120]), None, length, 3)
    batch = collate([made.row(index) for index in range(rows)])
    return batch | {
        "input_ids": batch["input_ids"] % VOCABULARY,
        "labels": torch.where(batch["labels"] < 0, batch["labels"], batch["labels"] % VOCABULARY),
    }


def whole_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[float]:
    with torch.no_grad():
        logits = output_head(model)(hidden_states(model, batch["input_ids"], batch["document_ids"]))
    chosen = batch["labels"] != IGNORED
    return [
        float(cross_entropy(logits[row][chosen[row]], batch["labels"][row][chosen[row]]).mean())
        for row in range(len(chosen))
    ]


@pytest.mark.parametrize("chunk", [1, 7, 30, 500])
@pytest.mark.parametrize("make", [tiny_teacher, hybrid], ids=["teacher", "hybrid"])
def test_losses_are_those_of_the_whole_row(make, chunk):
    model, batches = make(), [batch_of(3, 80, 12), batch_of(1, 33, 9)]
    found = cached_losses(model, batches, chunk)
    expected = [loss for batch in batches for loss in whole_losses(model, batch)]
    assert [read.loss for read in found] == pytest.approx(expected, rel=1e-4)


def test_the_memory_of_a_sparse_student_does_not_grow():
    options = SparseAttentionOptions(block_length=4, window=5, top_k=2, pool_blocks=12)
    model = student_of("sparse", options, (), "qwen2").eval()
    read = [cached_losses(model, [batch_of(2, length, 12)], 16) for length in (40, 80, 160)]
    assert len({row.cache_bytes for rows in read for row in rows}) == 1
