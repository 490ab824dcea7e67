"""Students in which every kind of layer stands beside every other: converted, trained, saved, decoded,
exported."""

from itertools import permutations

import mixer_checks
import pytest
import torch
from exported import exported_class, greedy, written
from tiny import convert, disturb, packed_batch, random_ids, tiny_teacher
from transformers import PreTrainedModel

from models.config import StudentConfig
from models.layer_plan import LayerPlan
from models.mixers import (
    MIXERS,
    KeptAttentionOptions,
    RWKV6Options,
    RWKV7Options,
    SlidingWindowOptions,
    SparseAttentionOptions,
)
from models.objectives import Align, Distill
from models.student import student_mixers
from models.student_folder import Student, load_student, save_student

OPTIONS = {
    "rwkv7": RWKV7Options(value_residual=True),
    "rwkv6": RWKV6Options(bonus=True),
    "sparse": SparseAttentionOptions(block_length=4, window=5, top_k=1, pool_blocks=40),
    "sliding_window": SlidingWindowOptions(window=5, sinks=2, gate="low"),
    "attention": KeptAttentionOptions(rope=False, gate="full", log_position_scale=True, training_length=8),
}
# Each kind is the first, and rwkv7 comes twice, so that its value residual is in use.
PLANS = {
    "window_first": ["sliding_window", "rwkv7", "rwkv6", "attention", "sparse", "rwkv7"],
    "attention_first": ["attention", "sparse", "rwkv7", "sliding_window", "rwkv7", "rwkv6"],
    "rwkv6_first": ["rwkv6", "attention", "rwkv7", "sparse", "rwkv7", "sliding_window"],
}


def mixed(plan: list[str], optioned: bool, noise: float = 0.05) -> Student:
    """A student of a plan, away from its start; with `optioned` its attention has options."""
    assert set(plan) == set(MIXERS), "every mixer there is takes part"
    options = {name: o for name, o in OPTIONS.items() if optioned or name != "attention"}
    config = StudentConfig(layer_plan=LayerPlan(layers=plan), mixers=options)
    model, _ = convert(tiny_teacher("qwen3", layers=len(plan)), config)
    disturb(model, noise)
    return Student(model.eval(), plan, config)


@pytest.fixture(params=[*PLANS, "without_options"], scope="module")
def student(request) -> Student:
    optioned = request.param in PLANS
    return mixed(PLANS[request.param if optioned else "window_first"], optioned)


def test_it_decodes_as_it_trains(student):
    mixer_checks.assert_calls_equal_the_parallel_forward(student.model)
    mixer_checks.assert_documents_are_texts_of_their_own(student.model)
    mixer_checks.assert_padding_is_passed_over(student.model)


def test_it_generates(student):
    mixer_checks.assert_search_with_a_cache_equals_search_without(student.model)


def test_it_comes_back_from_disk(student, tmp_path):
    save_student(tmp_path / "student", student, mixer_checks.NoTokenizer())
    loaded = load_student(tmp_path / "student")
    assert loaded.plan == student.plan
    assert all(loaded.config.options(name) == student.config.options(name) for name in set(student.plan))
    with torch.no_grad():
        ids = random_ids(2, 30)
        assert torch.equal(loaded.model.eval()(ids).logits, student.model(ids).logits)


def test_its_export_is_the_student(student, tmp_path):
    folder = written(tmp_path / "export", student)
    other: PreTrainedModel = exported_class(folder).from_pretrained(folder, dtype=torch.float32).eval()
    ids = random_ids(2, 20)
    with torch.no_grad():
        found, wanted = other(ids).logits, student.model(ids).logits
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    continued = other.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert continued.tolist() == greedy(student.model, ids, 6).tolist()


@pytest.mark.parametrize("plan, optioned", [*((plan, True) for plan in PLANS), ("rwkv6_first", False)])
def test_it_learns(plan, optioned):
    """A step of each objective lowers its loss, and reaches every mixer."""
    teacher, batch = tiny_teacher("qwen3", layers=6), packed_batch([[-3, 21, 14], [38]])
    model = mixed(PLANS[plan], optioned).model.train()
    count = 6 if optioned else 5
    for objective in (Align(), Distill()):
        optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = objective(model, teacher, batch).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
    mixers = student_mixers(model)
    assert len(mixers) == count
    still = [
        (index, name)
        for index, mixer in mixers.items()
        for name, parameter in mixer.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert not still


@pytest.mark.parametrize("pair", list(permutations(MIXERS, 2)), ids="-".join)
def test_any_two_kinds_share_one_cache(pair):
    """Both orders of every pair: what one layer keeps while decoding leaves the other's alone."""
    options = {name: OPTIONS[name] for name in pair}
    config = StudentConfig(layer_plan=LayerPlan(layers=[*pair, pair[0]]), mixers=options)
    model, _ = convert(tiny_teacher("qwen2"), config)
    disturb(model, 0.1)
    mixer_checks.assert_calls_equal_the_parallel_forward(model.eval())
