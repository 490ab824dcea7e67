"""A stage's budget, learning rates over its steps, groups, and what it refuses."""

from functools import partial

import pytest
import torch
from tiny import tiny_student, tiny_teacher
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.distill_module import ConversionModule
from models.objectives import Align, Distill
from models.stage import SCHEDULES, StageConfig, assert_float32, freeze_all_but
from models.student import parameter_groups, student_mixers
from models.timeline import Phase, Timeline

PEAK, FINAL = {"mixers": 3e-3, "rest": 1e-3}, {"mixers": 7e-5, "rest": 1.3e-4}


def stage(**changes) -> StageConfig:
    """A stage of 1000 tokens."""
    settings = {
        "name": "distill",
        "objective": None,
        "tokens": 1000,
        "learning_rate": dict(PEAK),
        "final_learning_rate": dict(FINAL),
        "warmup_steps": 5,
        "schedule": "cosine",
        "optimizer": partial(torch.optim.AdamW, weight_decay=0.1),
        "gradient_clip": 1.0,
        "accumulate": 1,
        "log_every_steps": 1,
        "validate_every_steps": 0,
    }
    return StageConfig(**{**settings, **changes})


def even(steps: int) -> Timeline:
    """So many steps of 100 tokens."""
    shape = {"tokens_per_step": 100, "row_length": 100, "rows_per_device": 1}
    return Timeline((Phase(first_step=0, steps=steps, first_token=0, **shape),))


def groups() -> dict[str, list[nn.Parameter]]:
    return {
        "mixers": [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))],
        "rest": [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))],
    }


def rates_used(config: StageConfig, steps: int, beyond: int = 0) -> dict[str, list[float]]:
    """The optimiser's learning rate at each step; `mixers` and `rest` are its 1st and 3rd entry."""
    parameters = groups()
    optimizer, schedule = config.build_optimizer(parameters, even(steps))
    seen: dict[str, list[float]] = {"mixers": [], "rest": []}
    for _ in range(steps + beyond):
        for name, index in (("mixers", 0), ("rest", 2)):
            seen[name].append(optimizer.param_groups[index]["lr"])
        for parameter in sum(parameters.values(), []):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    return seen


# --- learning rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup, steps", [(5, 40), (0, 2), (0, 40), (39, 40), (5, 6), (5, 7)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_step_has_the_final_rate_and_none_exceeds_the_peak(schedule, warmup, steps):
    config = stage(schedule=schedule, warmup_steps=warmup)
    for name, rates in rates_used(config, steps, beyond=3).items():
        assert config.rate_at(name, steps - 1, even(steps)) == FINAL[name]  # exactly
        assert rates[steps - 1 :] == pytest.approx([FINAL[name]] * 4, rel=1e-12)
        rising, falling = rates[:warmup], rates[warmup:steps]
        assert rising[: steps - 1] == pytest.approx(
            [PEAK[name] * (step + 1) / (warmup + 1) for step in range(warmup)][: steps - 1]
        )
        if warmup < steps - 1:
            assert falling[0] == pytest.approx(PEAK[name])
        assert all(a > b for a, b in zip(falling, falling[1:], strict=False))
        assert max(rates) <= PEAK[name] * (1 + 1e-12) and min(rates) > 0


def test_the_middle_of_each_schedule():
    for schedule in ("linear", "cosine"):
        found = stage(schedule=schedule, warmup_steps=0).rate_at("mixers", 5, even(11))
        assert found == pytest.approx((3e-3 + 7e-5) / 2)
    quarter = 7e-5 + (3e-3 - 7e-5) * (0.5 + 0.5 * 0.5**0.5)
    assert stage(schedule="cosine", warmup_steps=0).rate_at("mixers", 2, even(9)) == pytest.approx(quarter)


def test_a_constant_schedule_is_flat_after_the_warm_up():
    config = stage(schedule="constant", final_learning_rate=dict(PEAK), warmup_steps=3)
    assert rates_used(config, 9)["rest"] == pytest.approx([2.5e-4, 5e-4, 7.5e-4] + [1e-3] * 6)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_stage_shorter_than_its_warm_up_still_ends_at_the_final_rate(steps, warmup):
    for name, rates in rates_used(stage(warmup_steps=warmup), steps).items():
        assert rates[-1] == pytest.approx(FINAL[name]) and max(rates) <= PEAK[name]


# --- groups -------------------------------------------------------------------------------------------------


def test_matrices_decay_and_vectors_do_not():
    parameters = groups()
    optimizer, _ = stage().build_optimizer(parameters, even(10))
    by_id = {id(p): entry for entry in optimizer.param_groups for p in entry["params"]}
    assert len(by_id) == 4
    for name, (matrix, vector) in parameters.items():
        assert by_id[id(matrix)]["weight_decay"] == 0.1 and by_id[id(vector)]["weight_decay"] == 0.0
        assert by_id[id(matrix)]["initial_lr"] == by_id[id(vector)]["initial_lr"] == PEAK[name]


def test_a_group_with_rate_zero_is_left_out():
    parameters = groups()
    optimizer, schedule = stage(learning_rate={"mixers": 1e-3, "rest": 0.0}).build_optimizer(
        parameters, even(10)
    )
    held = {id(p) for entry in optimizer.param_groups for p in entry["params"]}
    assert held == {id(p) for p in parameters["mixers"]}
    assert len(schedule.lr_lambdas) == len(optimizer.param_groups) == 2


@pytest.mark.parametrize("trained", ["mixers", "rest", "both"])
def test_the_module_trains_exactly_its_groups(trained):
    teacher = tiny_teacher()
    student = tiny_student(teacher, (1,))
    rates = {name: PEAK[name] if trained in (name, "both") else 0.0 for name in PEAK}
    module = lightning_module(student, teacher, stage(learning_rate=rates, objective=Distill()))
    in_mixers = {id(p) for mixer in student_mixers(student).values() for p in mixer.parameters()}
    for parameter in student.parameters():
        assert parameter.requires_grad == bool(rates["mixers" if id(parameter) in in_mixers else "rest"])
    optimizer = module.configure_optimizers()["optimizer"]
    held = [id(p) for entry in optimizer.param_groups for p in entry["params"]]
    assert sorted(held) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    assert not [name for name in module.state_dict() if not name.startswith("student.")], (
        "the teacher is in it"
    )
    assert len(module.state_dict()) == len(student.state_dict())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in module.parameters()}


def lightning_module(
    student: PreTrainedModel, teacher: PreTrainedModel | None, config: StageConfig
) -> ConversionModule:
    return ConversionModule(student, teacher, config, tokenizer=None, timeline=even(10), tokens_before=0)


def test_two_groups_hold_every_parameter_once():
    student = tiny_student(tiny_teacher("qwen2_tied"), (0,))
    found = parameter_groups(student)
    ids = [id(p) for parameters in found.values() for p in parameters]
    assert len(set(ids)) == len(ids) == len(list(student.parameters()))
    assert len(found["mixers"]) == sum(len(list(m.parameters())) for m in student_mixers(student).values())
    assert parameter_groups(tiny_teacher())["mixers"] == []


def test_a_later_stage_thaws_what_an_earlier_one_froze():
    teacher = tiny_teacher()
    student = tiny_student(teacher, (1,))
    lightning_module(student, teacher, stage(learning_rate={"mixers": 1e-3, "rest": 0.0}, objective=Align()))
    lightning_module(student, teacher, stage(objective=Distill()))
    assert all(p.requires_grad for p in student.parameters())


def test_freezing_by_hand():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.requires_grad_(False)
    freeze_all_but(nn.Sequential(first, second), list(second.parameters()))
    assert [p.requires_grad for p in (*first.parameters(), *second.parameters())] == [
        False,
        False,
        True,
        True,
    ]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, per_step, wanted", [(1000, 100, 10), (1099, 100, 10), (4e5, 2048, 195), (100, 100, 1)]
)
def test_steps_are_what_fits_into_the_budget(tokens, per_step, wanted):
    timeline = stage(tokens=tokens).timeline(row_length=per_step, rows_per_device=1, devices=1)
    assert (timeline.steps, timeline.tokens) == (wanted, wanted * per_step)


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(ValueError, match="stage.distill.tokens=1000 is less than one optimiser step of 1001"):
        stage().timeline(row_length=1001, rows_per_device=1, devices=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"schedule": "square"},
            f"stage.distill.schedule='square' is unknown; choose one of {', '.join(SCHEDULES)}",
        ),
        (
            {"learning_rate": {"mixers": 1e-3}},
            "stage.distill.learning_rate needs the groups mixers, rest, and may have inserted, index",
        ),
        ({"final_learning_rate": {**FINAL, "head": 0.0}}, "distill.final_learning_rate needs the groups"),
        ({"learning_rate": {"mixers": -1e-3, "rest": 0.1}}, "stage.distill.learning_rate={'mixers': -0.001"),
        ({"final_learning_rate": {"mixers": 0.0, "rest": -1.0}}, "must not be negative"),
        ({"learning_rate": {"mixers": 0.0, "rest": 0.0}}, "stage.distill.learning_rate is 0 for every group"),
        ({"schedule": "constant"}, "stage.distill.schedule=constant never reaches"),
        ({"tokens": 0}, "stage.distill.tokens=0 must be at least 1"),
        ({"warmup_steps": -1}, "stage.distill.warmup_steps=-1 must be at least 0"),
        ({"gradient_clip": -1.0}, "stage.distill.gradient_clip=-1.0 must be at least 0"),
        ({"accumulate": 0}, "stage.distill.accumulate=0 must be at least 1"),
        ({"log_every_steps": 0}, "stage.distill.log_every_steps=0 must be at least 1"),
        ({"validate_every_steps": -1}, "stage.distill.validate_every_steps=-1 must be at least 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
def test_wrong_values_are_refused_with_their_key(changes, message):
    with pytest.raises(ValueError) as error:
        stage(**changes)
    assert message in str(error.value)


def test_a_stage_that_would_train_nothing_is_refused():
    student = tiny_student(tiny_teacher(), (0, 1, 2))
    with pytest.raises(ValueError, match="stage.distill: the student has no parameter in the groups"):
        lightning_module(student, None, stage(learning_rate={"mixers": 1e-3, "rest": 0.0}))


def test_half_precision_master_weights_are_refused():
    half: Tensor = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16.*use float32 weights"):
        assert_float32([half])
    assert_float32([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="bfloat16"):
        lightning_module(tiny_student(tiny_teacher()).bfloat16(), None, stage())
