"""What every mixer must do in a model, whatever it computes: shared by the tests of mixers."""

from pathlib import Path
from typing import Any

import torch
from tiny import convert, disturb, packed_batch, random_ids, tiny_teacher
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.backbone import hidden_states
from models.config import StudentConfig
from models.layer_plan import LayerPlan
from models.objectives import Align, Distill
from models.student import student_mixers
from models.student_folder import Student, load_student, save_student

DOCUMENTS = [[-3, 11, 9, 1, 8], [13, 13, -6], [4, -5, 20, 3], [32]]
CALLS = {"tokens": [1] * 40, "prefill": [35, 1, 1, 1, 1, 1], "pieces": [3, 9, 1, 7, 2, 8, 4, 6]}


class NoTokenizer:
    """Stands where a tokenizer is saved."""

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to write."""


def config_of(mixer: str, options: Any, keep=()) -> StudentConfig:
    """Every layer but `keep` becomes the mixer."""
    return StudentConfig(layer_plan=LayerPlan(mixer=mixer, keep=keep), mixers={mixer: options})


def student_of(mixer: str, options: Any, keep=(), family="qwen2", noise=0.1) -> PreTrainedModel:
    """A student away from its start, so that no part is switched off by a zero."""
    student, _ = convert(tiny_teacher(family), config_of(mixer, options, keep))
    disturb(student, noise)
    return student.eval()


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """To a part of the values' scale."""
    assert torch.isfinite(found).all()
    difference = (found - wanted).abs().max() / wanted.abs().max()
    assert difference < tolerance, difference


def in_calls(model: PreTrainedModel, ids: Tensor, sizes: list[int], documents: Tensor | None) -> Tensor:
    """Final hidden states [B,T,D], through the cache."""
    cache, outputs, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        stop = start + size
        given = None if documents is None else documents[:, :stop]
        outputs.append(hidden_states(model, ids[:, start:stop], given, cache))
        start = stop
    assert cache.get_seq_length() == start == ids.shape[1]
    return torch.cat(outputs, 1)


@torch.no_grad()
def assert_calls_equal_the_parallel_forward(student: PreTrainedModel) -> None:
    """Prefill in calls of any size and token by token are the function that training runs."""
    ids = random_ids(2, 40)
    wanted = hidden_states(student, ids)
    for sizes in CALLS.values():
        assert_close(in_calls(student, ids, sizes, None), wanted)


@torch.no_grad()
def assert_documents_are_texts_of_their_own(student: PreTrainedModel) -> None:
    """In a packed, padded row, at once or in calls, a document gives what it gives alone."""
    batch = packed_batch(DOCUMENTS)
    ids, documents = batch["input_ids"], batch["document_ids"]
    results = [hidden_states(student, ids, documents)]
    results += [in_calls(student, ids, sizes, documents) for sizes in ([1] * 32, [5, 12, 1, 3, 11])]
    for row in range(len(ids)):
        for document in range(int(documents[row].max()) + 1):
            place = documents[row] == document
            alone = hidden_states(student, ids[row, place][None])[0]
            for found in results:
                assert_close(found[row, place], alone)


@torch.no_grad()
def assert_padding_is_passed_over(student: PreTrainedModel) -> None:
    """Rows padded left, right and in between give what they give alone, and go on afterwards."""
    total = 24
    ids, mask = random_ids(3, total), torch.zeros(3, total, dtype=torch.int64)
    mask[0, 9:], mask[1, :17], mask[2, 4:21] = 1, 1, 1
    more = random_ids(3, 6, seed=8)
    cache = DynamicCache(config=student.config)
    found = student(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    longer = torch.cat([mask, torch.ones(3, 6, dtype=torch.int64)], 1)
    going_on = student(more, attention_mask=longer, past_key_values=cache, use_cache=True).logits
    for row in range(3):
        real = mask[row].bool()
        alone = student(torch.cat([ids[row, real], more[row]])[None]).logits[0]
        assert_close(found[row, real], alone[: int(real.sum())])
        assert_close(going_on[row], alone[int(real.sum()) :])


@torch.no_grad()
def assert_rows_do_not_know_each_other(student: PreTrainedModel) -> None:
    """A row gives the same in any place of the batch, and no token sees what comes after it."""
    ids = random_ids(4, 30)
    wanted, order = hidden_states(student, ids), torch.tensor([2, 0, 3, 1])
    assert_close(hidden_states(student, ids[order]), wanted[order])
    later = ids.clone()
    later[:, 21:] = (later[:, 21:] + 1) % 90
    found = hidden_states(student, later)
    assert_close(found[:, :21], wanted[:, :21])
    assert (found[:, 21:] - wanted[:, 21:]).abs().max() > 1e-2


@torch.no_grad()
def assert_search_with_a_cache_equals_search_without(student: PreTrainedModel) -> None:
    """Beam search repeats, reorders and drops rows of the cache; greedy search is the argmax."""
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 4):
        found, wanted = (
            student.generate(
                ids, attention_mask=torch.ones_like(ids), num_beams=beams, use_cache=use_cache, **options
            )
            for use_cache in (True, False)
        )
        assert found.tolist() == wanted.tolist()


def assert_it_learns(mixer: str, options: Any) -> None:
    """Alignment and distillation lower their losses, and give every parameter of a mixer a gradient."""
    teacher, batch = tiny_teacher(), packed_batch([[-3, 21, 14], [38]])
    student, _ = convert(teacher, config_of(mixer, options))
    for objective, rate in ((Align(), 3e-3), (Distill(), 3e-3)):
        optimizer, losses = torch.optim.Adam(student.parameters(), rate), []
        for _ in range(10):
            optimizer.zero_grad()
            loss = objective(student, teacher, batch).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], losses
    without = [
        (index, name)
        for index, module in student_mixers(student).items()
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert not without


@torch.no_grad()
def assert_it_comes_back_from_disk(mixer: str, options: Any, folder: Path) -> None:
    """A saved student has the same options and gives bit for bit the same logits."""
    student, ids = student_of(mixer, options, keep=(1,)), random_ids(2, 16)
    config = config_of(mixer, options)
    save_student(folder, Student(student, [mixer, "attention", mixer], config), NoTokenizer())
    loaded = load_student(folder)
    assert loaded.plan == [mixer, "attention", mixer] and loaded.config.options(mixer) == options
    assert torch.equal(loaded.model.eval()(ids).logits, student(ids).logits)


class InAModel:
    """The tests of every mixer in a model; a module of tests inherits them and has a fixture `student`."""

    def test_training_prefill_and_decoding_are_one_function(self, student):
        assert_calls_equal_the_parallel_forward(student)

    def test_documents_are_texts_of_their_own(self, student):
        assert_documents_are_texts_of_their_own(student)

    def test_padding_is_passed_over(self, student):
        assert_padding_is_passed_over(student)

    def test_rows_do_not_know_each_other(self, student):
        assert_rows_do_not_know_each_other(student)

    def test_search_with_a_cache_equals_search_without(self, student):
        assert_search_with_a_cache_equals_search_without(student)
