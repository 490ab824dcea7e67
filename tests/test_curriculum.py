"""A stage's curriculum: its phases as steps, their rates and groups, and what is refused."""

import dataclasses

import pytest
from test_stage import FINAL, PEAK, stage
from tiny import tiny_student, tiny_teacher
from torch import nn

from models.architectures import decoder_layers
from models.student import GROUPS, parameter_groups, student_mixers
from models.timeline import Timeline
from pipeline.training import batch_shapes


def table(*entries: tuple[int, int, int]) -> list[dict[str, int]]:
    names = ("from_tokens", "row_length", "rows_per_device")
    return [dict(zip(names, entry, strict=True)) for entry in entries]


def steps(*begins: int) -> list[dict[str, int]]:
    """Phases by steps of 32 tokens."""
    return [{"from_step": first, **SHAPE} for first in begins]


SHAPE = {"row_length": 16, "rows_per_device": 2}
ROW = {"from_tokens": 0, **SHAPE}
NOTHING = dict.fromkeys(("inserted", "mixers", "index", "rest"), 0.0)
THREE = table((0, 16, 2), (200, 32, 1), (500, 16, 8))


def timeline(entries=THREE, devices: int = 1, **changes) -> Timeline:
    config = stage(curriculum=entries, **{"warmup_steps": 0, **changes})
    return config.timeline(row_length=1, rows_per_device=1, devices=devices)


# --- steps and rates ----------------------------------------------------------------------------------------


def test_rows_change_at_the_first_step_that_begins_with_so_many_tokens():
    found = timeline(accumulate=2)  # steps of 64, 64 and 256 tokens; 1000 in all
    assert [(phase.first_step, phase.steps, phase.first_token) for phase in found.phases] == [
        (0, 4, 0),  # the 4th step begins with 192 tokens, the 5th with 256
        (4, 4, 256),  # 512 is the first multiple of 64 from 500 on
        (8, 1, 512),  # one step of 256 fits into what is left
    ]
    assert [found.phase_at(step).row_length for step in (0, 3, 4, 7, 8, 9)] == [16, 16, 32, 32, 16, 16]
    assert found.steps == 9 and found.tokens == 768
    used = [found.tokens_at(step) for step in range(found.steps + 1)]
    assert used == [0, 64, 128, 192, 256, 320, 384, 448, 512, 768]
    assert [(s.batches, s.row_length, s.rows_per_device) for s in batch_shapes(found, 2)] == [
        (8, 16, 2),
        (8, 32, 1),
        (2, 16, 8),
    ]


def test_more_devices_with_fewer_rows_each_make_the_same_steps():
    halved = table((0, 16, 1), (200, 32, 2), (500, 16, 4))
    doubled = table((0, 16, 2), (200, 32, 4), (500, 16, 8))
    one, two = timeline(doubled), timeline(halved, devices=2)
    assert [one.tokens_at(step) for step in range(one.steps)] == [two.tokens_at(s) for s in range(two.steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_goes_by_tokens(schedule: str):
    entries, warmup = table((0, 10, 1), (300, 40, 1)), 5
    config = stage(schedule=schedule, warmup_steps=warmup, curriculum=entries)
    uneven = config.timeline(row_length=1, rows_per_device=1, devices=1)
    flat = dataclasses.replace(config, curriculum=table((0, 10, 1)))
    even = flat.timeline(row_length=1, rows_per_device=1, devices=1)
    assert uneven.steps == 30 + 17 and even.steps == 100
    for step in range(warmup, uneven.steps - 1):
        # Both end with their last step, which begins 40 tokens before 980, or 10 before 1000.
        share = (uneven.tokens_at(step) - 50) / (940 - 50)
        rate = config.rate_at("mixers", step, uneven)
        before, after = (flat.rate_at("mixers", warmup + int(share * 94) + more, even) for more in (0, 1))
        assert after * (1 - 1e-12) <= rate <= before * (1 + 1e-12)
    assert config.rate_at("rest", uneven.steps - 1, uneven) == FINAL["rest"]
    assert config.rate_at("rest", warmup, uneven) == PEAK["rest"]
    drops = [config.rate_at("mixers", s, uneven) - config.rate_at("mixers", s + 1, uneven) for s in (28, 31)]
    assert drops[1] > 3 * drops[0]  # a step of four times the tokens goes about four times as far


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"curriculum": table((5, 16, 2))}, ["curriculum[0].from_tokens=5 must be 0"]),
        (
            {"curriculum": table((0, 16, 2), (9, 8, 1), (9, 4, 1))},
            ["[2].from_tokens=9", "the 9 of", "order"],
        ),
        ({"curriculum": table((0, 16, 2), (1000, 8, 1))}, ["[1].from_tokens=1000", "1000 tokens", "remove"]),
        ({"curriculum": table((0, 1, 2))}, ["curriculum[0].row_length=1 must be at least 2"]),
        ({"curriculum": table((0, 4, 0))}, ["curriculum[0].rows_per_device=0 must be at least 1"]),
        (
            {"curriculum": [{"from_tokens": 0}]},
            ["curriculum[0]", "from_tokens, from_step, the keys row_length, rows_per_device"],
        ),
        ({"curriculum": [{**ROW, "length": 9}]}, ["curriculum[0]=", "row_length"]),
        ({"curriculum": [ROW | {"row_length": None}]}, ["curriculum[0]=", "row_length"]),
        ({"curriculum": [ROW | {"row_length": 16.5}]}, ["[0].row_length=16.5 must be a whole number"]),
        ({"curriculum": [ROW | {"row_length": "16"}]}, ["[0].row_length='16' must be a whole number"]),
        ({"curriculum": [ROW | {"from_step": 0}]}, ["[0] has from_tokens and from_step", "one of"]),
        ({"curriculum": [SHAPE]}, ["[0] has no beginning", "one of from_tokens, from_step"]),
        (
            {"curriculum": [ROW, SHAPE | {"from_step": 9}]},
            ["[1].from_step follows from_tokens", "all by from_step"],
        ),
        ({"curriculum": steps(3)}, ["[0].from_step=3 must be 0"]),
        ({"curriculum": steps(0, 9, 8)}, ["[2].from_step=8", "the 9 of", "order"]),
        ({"curriculum": steps(0, 40)}, ["[1] gets no optimiser step", "tokens=1000", "move from_step"]),
        ({"curriculum": [ROW | {"attention": "full"}]}, ["[0].attention='full'", "dense, sparse"]),
        ({"curriculum": [ROW | {"learning_rate": 1e-3}]}, ["[0].learning_rate=0.001 must name groups"]),
        (
            {"curriculum": [ROW | {"learning_rate": {"heads": 1}}]},
            ["learning_rate.heads is no group", "rest"],
        ),
        ({"curriculum": [ROW | {"learning_rate": {"rest": -1.0}}]}, ["rest=-1.0", "not negative"]),
        (
            {"curriculum": [ROW | {"learning_rate": NOTHING}]},
            ["curriculum[0].learning_rate is 0 for every group"],
        ),
        (
            {"curriculum": [ROW | {"learning_rate": {"rest": 0.0}}]},
            ["freezes rest in every entry", "set stage.distill.learning_rate.rest=0"],
        ),
        (
            {
                "curriculum": [ROW | {"learning_rate": {"rest": 1e-3}}],
                "learning_rate": {"mixers": 1e-3, "rest": 0.0},
            },
            ["[0].learning_rate.rest=0.001 contradicts stage.distill.learning_rate.rest=0"],
        ),
        (
            {
                "curriculum": [ROW, ROW | {"from_tokens": 99, "learning_rate": {"rest": 2e-3}}],
                "final_learning_rate": PEAK,
                "schedule": "constant",
            },
            ["schedule=constant never reaches stage.distill.final_learning_rate of rest", "last phase"],
        ),
        ({"curriculum": [ROW | {"warmup_steps": -1}]}, ["[0].warmup_steps=-1 must be at least 0"]),
        ({"curriculum": table((0, 16, 2), (96, 16, 2))}, ["[0] has 3 steps, and a warm-up of 5"]),
        (
            {"curriculum": [ROW, ROW | {"from_tokens": 960, "warmup_steps": 1}]},
            ["[1] has 1 steps, and a warm-up of 1"],
        ),
        ({"curriculum": [16]}, ["curriculum[0]=16 needs one of from_tokens, from_step"]),
        ({"curriculum": None}, ["stage.distill.curriculum=None must be a list"]),
        ({"curriculum": THREE, "data": {"row_length": 9}}, ["data.row_length=9 contradicts", "=[]"]),
        ({"curriculum": THREE, "data": {"rows_per_device": 9}}, ["data.rows_per_device=9 contradicts"]),
        ({"curriculum": table((0, 16, 2), (900, 101, 1))}, ["[1] gets no", "101 tokens", "tokens=1000"]),
        ({"curriculum": table((0, 300, 1), (10, 4, 1), (20, 4, 1))}, ["[1] gets no", "[2].from_tokens=20"]),
        ({"curriculum": table((0, 1001, 1))}, ["tokens=1000 is less than one optimiser step of 1001"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_contradictory_tables_are_refused(changes: dict, words: list[str]):
    with pytest.raises(ValueError) as error:
        stage(**changes).timeline(row_length=1, rows_per_device=1, devices=1)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_phases_may_begin_by_steps():
    found = timeline(steps(0, 4, 10))
    assert [(phase.first_step, phase.steps) for phase in found.phases] == [(0, 4), (4, 6), (10, 21)]
    assert found.tokens == 31 * 32  # the last ends where the budget does
    uneven = timeline([{**steps(0)[0], "row_length": 100}, steps(0, 3)[1]])
    assert uneven.phases[1].first_token == 600 and uneven.phases[1].steps == 12


# --- rates of phases ----------------------------------------------------------------------------------------

PHASED = [
    {"from_step": 0, **SHAPE, "learning_rate": {"mixers": 0.0, "rest": 0.0}, "warmup_steps": 3},
    {"from_step": 8, **SHAPE, "learning_rate": {"rest": 4e-3}},
    {"from_step": 16, **SHAPE, "attention": "dense", "warmup_steps": 4},
]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_each_phase_climbs_to_its_peak_and_the_last_one_falls(schedule: str):
    config = stage(schedule=schedule, curriculum=PHASED, learning_rate={**PEAK, "inserted": 8e-3})
    found = config.timeline(row_length=1, rows_per_device=1, devices=1)
    assert found.steps == 31
    rates = {
        group: [config.rate_at(group, step, found) for step in range(31)] for group in config.learning_rate
    }
    assert rates["mixers"][:8] == rates["rest"][:8] == [0.0] * 8
    assert rates["inserted"][:8] == pytest.approx([2e-3, 4e-3, 6e-3] + [8e-3] * 5)
    assert rates["rest"][8:16] == [4e-3] * 8 and rates["mixers"][8:16] == [PEAK["mixers"]] * 8
    assert rates["rest"][16:21] == pytest.approx([PEAK["rest"] * part for part in (0.2, 0.4, 0.6, 0.8, 1.0)])
    falling = rates["rest"][20:]
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False)) and falling[-1] == FINAL["rest"]
    assert rates["index"][-1] == FINAL["mixers"]
    middle = (PEAK["rest"] + FINAL["rest"]) / 2
    assert rates["rest"][25] == pytest.approx(middle)  # half of the tokens from step 20 to 30


def test_a_later_warm_up_bends_the_schedule_of_the_stage():
    plain = stage(curriculum=steps(0, 10), warmup_steps=2)
    bent = stage(curriculum=[steps(0)[0], {**steps(0, 10)[1], "warmup_steps": 3}], warmup_steps=2)
    rates = []
    for config in (plain, bent):
        found = config.timeline(row_length=1, rows_per_device=1, devices=1)
        rates.append([config.rate_at("mixers", step, found) for step in range(found.steps)])
    shares = [after / before for before, after in zip(*rates, strict=True)]
    assert shares == pytest.approx([1.0] * 10 + [0.25, 0.5, 0.75] + [1.0] * 18)


def test_groups_that_train_follow_the_phase():
    config = stage(curriculum=PHASED)
    found = config.timeline(row_length=1, rows_per_device=1, devices=1)
    assert [config.trained_groups(phase) for phase in found.phases] == [("inserted", "index"), GROUPS, GROUPS]
    assert [phase.attention for phase in found.phases] == ["sparse", "sparse", "dense"]
    assert config.freezing_phases(found) == [0]
    assert (
        stage(learning_rate={"mixers": 1e-3, "rest": 0.0}, curriculum=THREE, warmup_steps=0).freezing_phases(
            timeline()
        )
        == []
    )  # a group that the whole stage freezes needs nobody


def test_groups_without_a_rate_have_that_of_the_mixers():
    config = stage()
    assert config.learning_rate == {"inserted": 3e-3, "mixers": 3e-3, "index": 3e-3, "rest": 1e-3}
    assert stage(learning_rate={**PEAK, "index": 0.5}).learning_rate["index"] == 0.5
    assert config.final_learning_rate["index"] == FINAL["mixers"]


# --- groups of a student ------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_group():
    student = tiny_student(tiny_teacher(), (1,))
    mixers = student_mixers(student)
    for mixer in mixers.values():
        mixer.index = nn.Linear(4, 3)
    decoder_layers(student)[2].inserted = True
    found = parameter_groups(student)
    assert tuple(found) == GROUPS
    ids = [id(p) for parameters in found.values() for p in parameters]
    assert len(set(ids)) == len(ids) == len(list(student.parameters()))
    assert [p.shape for p in found["index"]] == [(3, 4), (3,)] * 2  # also in the inserted layer
    own = {id(p) for p in decoder_layers(student)[2].parameters()} - {
        id(p) for p in mixers[2].index.parameters()
    }
    assert {id(p) for p in found["inserted"]} == own
    assert {id(p) for p in found["mixers"]} == {
        id(p) for name, p in mixers[0].named_parameters() if not name.startswith("index")
    }
