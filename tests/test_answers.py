"""What a model answers: read off one pass, or written through its cache; both must say the same."""

import pytest
import torch
from tiny import LiveBytes, packed_batch, tiny_student, tiny_teacher

from models import ranks
from models.losses import IGNORED
from models.retrieval import Answered, exact_answers, generated_answers, teacher_forced_answers


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_exact_answers_are_those_of_greedy_decoding(kind):
    """Rows whose answer is what the model writes are right; one wrong token anywhere makes a row wrong."""
    model = tiny_teacher()
    model = tiny_student(model, (1,)) if kind == "student" else model
    batch = packed_batch([[20], [20], [20], [20]])
    prompt = batch["input_ids"][:, :15]
    written = model.generate(prompt, max_new_tokens=6, do_sample=False)
    batch["input_ids"], batch["labels"] = written[:, :20].clone(), torch.full((4, 20), IGNORED)
    batch["labels"][:, 14:] = written[:, 15:]
    batch["labels"][1, 19] = (batch["labels"][1, 19] + 1) % 97  # the last token, which no other reads
    for row, place in ((2, 14), (3, 16)):
        wrong = (batch["labels"][row, place] + 1) % 97
        batch["labels"][row, place] = batch["input_ids"][row, place + 1] = wrong
    assert exact_answers(model, [batch]) == [True, False, False, False]
    assert exact_answers(model, [batch, batch]) == [True, False, False, False] * 2


def answered_batch(model, lengths: list[int], wrong: dict[int, int], total: int = 26) -> dict:
    """Rows that end with what a model writes greedily, `lengths` tokens of it.

    `wrong` is row -> the token of its answer that is changed, in the row as in the labels.
    """
    batch = packed_batch([[total]] * len(lengths), seed=11)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    for row, count in enumerate(lengths):
        prompt = batch["input_ids"][row : row + 1, : total - count + 1]
        answer = model.generate(prompt, max_new_tokens=count, do_sample=False)[0, -count:]
        answer = answer.clone()
        if row in wrong:
            answer[wrong[row]] = (answer[wrong[row]] + 1) % 97
        batch["labels"][row, total - count :] = answer
        batch["input_ids"][row, total - count + 1 :] = answer[:-1]
    return batch


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_generated_answers_agree_with_teacher_forced_ones(kind, chunk):
    """Answers of several lengths in one batch, right and wrong ones; the cache sees no padding."""
    model = tiny_teacher()
    model = tiny_student(model, (1,)) if kind == "student" else model
    batch = answered_batch(model, [3, 6, 1, 5, 4], {1: 5, 3: 0})
    found = generated_answers(model, [batch, batch], chunk)
    assert [row.exact for row in found] == [True, False, True, False, True] * 2
    assert [row.exact for row in found] == exact_answers(model, [batch, batch])
    assert [row.asked for row in found] == [3, 6, 1, 5, 4] * 2


def test_a_wrong_token_is_read_on_by_generation_alone():
    """After a wrong token generation goes on with its own word, and teacher forcing with the right one."""
    model = tiny_teacher()
    batch = answered_batch(model, [6], {0: 0})
    read = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generated, forced = generated_answers(model, [batch], 8)[0], teacher_forced_answers(model, [batch])[0]
    handle.remove()
    assert read == [8, 8, 4, 1, 1, 1, 1, 1, 1, 26]  # chunks up to the question's end, tokens, one whole pass
    assert generated.right == 5  # what the model writes is what the labels were made of
    assert forced.right < 5


def test_answers_that_do_not_stand_in_the_row_are_read_off_in_both_ways():
    """Labels here and there, as in associative recall: the row is read as it is."""
    model = tiny_student(tiny_teacher(), (1,))
    batch = packed_batch([[30]] * 3, seed=5)
    chosen = torch.rand(3, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    most_likely = model(batch["input_ids"]).logits.argmax(-1)
    right = torch.rand(3, 30, generator=torch.Generator().manual_seed(2)) < 0.5
    labels = torch.where(right, most_likely, (most_likely + 1) % 97)
    batch["labels"] = torch.where(chosen, labels, IGNORED)
    counts = [(int(c.sum()), int((c & r).sum())) for c, r in zip(chosen, right, strict=True)]
    assert [tuple(row) for row in generated_answers(model, [batch], 4)] == counts
    assert [tuple(row) for row in teacher_forced_answers(model, [batch])] == counts


def test_memory_is_bounded_by_the_chunk_not_by_the_row():
    """A recurrent student's cache does not grow, so eight times the row costs little more than its ids."""
    model, peaks = tiny_student(tiny_teacher()), {}
    for length, chunk in ((128, 32), (1024, 32), (1024, 1024)):
        batch = packed_batch([[length]] * 2)
        batch["labels"][:, :-2] = IGNORED
        with LiveBytes() as watched:
            generated_answers(model, [batch], chunk)
        peaks[length, chunk] = watched.peak
    ids = 8 * 1024 * 2
    assert peaks[1024, 32] < peaks[128, 32] + 10 * ids < peaks[1024, 1024] / 4


def test_rows_of_several_documents_are_not_generated():
    with pytest.raises(ValueError, match="several documents"):
        generated_answers(tiny_teacher(), [packed_batch([[5, 7]])], 4)


def test_processes_divide_the_batches(monkeypatch):
    model, batches = tiny_teacher(), []
    for seed in range(3):
        batch = packed_batch([[12], [12]], seed=seed)
        batch["labels"][:, :-1] = IGNORED
        batch["labels"][0, -1] = model(batch["input_ids"]).logits[0, -1].argmax()
        batch["labels"][1, -1] = model(batch["input_ids"]).logits[1, -1].argmin()
        batches.append(batch)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        others = {index: [] for index in range(3)}
        monkeypatch.setattr(ranks, "gather", lambda own, others=others: shares.append(own) or [others | own])
        exact_answers(model, batches)
    pair = [Answered(asked=1, right=1), Answered(asked=1, right=0)]
    assert shares == [{0: pair, 2: pair}, {1: pair}]
