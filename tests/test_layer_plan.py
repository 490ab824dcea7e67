"""The layer plan: what it resolves to, and what it refuses."""

import pytest
import yaml

from models.layer_plan import (
    PLAN_FILE,
    Expansion,
    LayerPlan,
    from_file,
    read_plan_file,
    teacher_numbers,
    teacher_part,
    with_names,
    write_plan_file,
)

KNOWN = ["rwkv7", "rwkv6", "sparse"]
FOURTH = ["rwkv7", "rwkv7", "rwkv7", "sparse"]


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, "RRRR"),
        ({"keep": [1]}, "RARR"),
        ({"keep": (0, -1)}, "ARRA"),
        ({"keep": [3, -1]}, "RRRA"),
        ({"keep": [-4, 1, 2, 3]}, "AAAA"),
        ({"mixer": "rwkv6", "keep": [2]}, "66A6"),
        ({"mixer": "attention"}, "AAAA"),
        ({"layers": ["rwkv7", "attention", "rwkv6", "rwkv7"]}, "RA6R"),
        ({"layers": ["attention"] * 4, "keep": []}, "AAAA"),
        ({"mixer": FOURTH}, "RRRS"),
        ({"mixer": FOURTH, "keep": [1, -1]}, "RARA"),
        ({"mixer": ["rwkv6", "attention"]}, "6A6A"),
        ({"mixer": ("sparse",)}, "SSSS"),
        ({"mixer": ["rwkv7"] * 5 + ["sparse"]}, "RRRR"),
        ({"mixer": ["3 rwkv7", "sparse"]}, "RRRS"),
        ({"layers": ["2  rwkv7", "rwkv6", "1 attention"]}, "RR6A"),
        ({"layers": ["attention", "0 rwkv6", "3 sparse"]}, "ASSS"),
        ({"every": 4}, "RRRA"),
        ({"every": 2, "kept": "sparse", "mixer": "rwkv6"}, "6S6S"),
        ({"every": 3, "mixer": ["rwkv7", "rwkv6"]}, "R6A6"),
        ({"every": 1}, "AAAA"),
        ({"every": 5}, "RRRR"),
        ({"pattern": "3:1"}, "RRRA"),
        ({"pattern": "1:2", "kept": "sparse"}, "RSSR"),
        ({"pattern": "4:0"}, "RRRR"),
        ({"pattern": "0:1"}, "AAAA"),
        ({"keep": [0, -1], "kept": "rwkv6"}, "6RR6"),
        ({"kept": "sparse"}, "RRRR"),
    ],
    ids=str,
)
def test_plans_resolve(options, wanted):
    names = {"R": "rwkv7", "6": "rwkv6", "A": "attention", "S": "sparse"}
    assert LayerPlan(**options).resolve(4, KNOWN) == [names[letter] for letter in wanted]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": [4]}, "student.layer_plan.keep=[4]: [4] is outside the teacher's 4 layers"),
        ({"keep": [0, -5, 7]}, "[-5, 7] is outside the teacher's 4 layers"),
        (
            {"mixer": "rwkv8"},
            "student.layer_plan: ['rwkv8'] is unknown; choose from rwkv7, rwkv6, sparse, att",
        ),
        ({"mixer": ["rwkv7", "sparsely"]}, "student.layer_plan: ['sparsely'] is unknown"),
        ({"layers": ["rwkv7"] * 3}, "student.layer_plan.layers has 3 entries; the teacher has 4 layers"),
        ({"layers": []}, "student.layer_plan.layers has 0 entries; the teacher has 4 layers"),
        ({"layers": ["rwkv7", "rwkv", "attention", "attn"]}, "['attn', 'rwkv'] is unknown"),
        ({"layers": ["3 rwkv7"]}, "student.layer_plan.layers has 3 entries; the teacher has 4 layers"),
        ({"layers": ["3 rwkv", "attention"]}, "['rwkv'] is unknown"),
        (
            {"kept": "window"},
            "student.layer_plan: ['window'] is unknown; choose from rwkv7, rwkv6, sparse, att",
        ),
    ],
    ids=str,
)
def test_plans_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        LayerPlan(**options).resolve(4, KNOWN)
    assert message in str(error.value)


@pytest.mark.parametrize("layers, wanted", [(1, "R"), (3, "RRR"), (10, "RRRSRRRSRR")])
def test_a_list_of_mixers_is_repeated_over_any_depth(layers, wanted):
    names = {"R": "rwkv7", "S": "sparse"}
    assert LayerPlan(mixer=FOURTH).resolve(layers, KNOWN) == [names[letter] for letter in wanted]


@pytest.mark.parametrize("mixer", ["", [], None], ids=str)
def test_no_mixer_at_all_is_refused(mixer):
    with pytest.raises(ValueError, match="student.layer_plan.mixer is empty"):
        LayerPlan(mixer=mixer)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"layers": ["rwkv7"] * 4, "keep": [1]}, "keep and layers"),
        ({"layers": [], "every": 4}, "every and layers"),
        ({"every": 4, "keep": (1,)}, "keep and every"),
        ({"pattern": "3:1", "every": 4}, "every and pattern"),
        ({"file": "run", "pattern": "3:1", "keep": [0]}, "keep and pattern and file"),
    ],
    ids=str,
)
def test_contradictions_are_refused(options, named):
    with pytest.raises(ValueError, match=f"student.layer_plan: {named} contradict each other; give one of"):
        LayerPlan(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, "student.layer_plan.every=0 must be at least 1"),
        ({"kept": ""}, "student.layer_plan.kept is empty"),
        ({"pattern": "3-1"}, "student.layer_plan.pattern='3-1' must be two counts such as '3:1'"),
        ({"pattern": "0:0"}, "student.layer_plan.pattern='0:0' must be two counts"),
        ({"pattern": "3:1:1"}, "must be two counts"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        LayerPlan(**options)
    assert message in str(error.value)


# --- inserted layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"expansion": Expansion(every=4)}, "R R R R +S"),
        ({"expansion": Expansion(every=2)}, "R R +S R R +S"),
        ({"expansion": Expansion(every=3)}, "R R R +S R"),
        ({"expansion": Expansion(every=1, mixer="rwkv6"), "keep": [1]}, "R +6 A +6 R +6 R +6"),
        ({"expansion": Expansion(every=3, mixer="attention"), "every": 4}, "R R R +A A"),
        ({"expansion": Expansion(mixer="rwkv6")}, "R R R R"),
        ({"layers": ["2 rwkv7", "+sparse", "rwkv6", "2 +rwkv6", "attention"]}, "R R +S 6 +6 +6 A"),
        ({"layers": ["4 rwkv7"], "expansion": Expansion(every=3)}, "R R R +S R"),
    ],
    ids=str,
)
def test_layers_are_inserted(options, wanted):
    names = {"R": "rwkv7", "6": "rwkv6", "A": "attention", "S": "sparse"}
    plan = LayerPlan(**options).resolve(4, KNOWN)
    assert plan == [("+" if "+" in word else "") + names[word[-1]] for word in wanted.split()]
    assert teacher_part(plan) == [names[word] for word in wanted.split() if "+" not in word]
    again = LayerPlan(layers=plan).resolve(4, KNOWN)
    assert again == plan, "a resolved plan says all of it"


def test_every_entry_knows_its_layer():
    plan = ["rwkv7", "+sparse", "+sparse", "rwkv7", "attention", "+rwkv6"]
    assert teacher_numbers(plan) == [0, 0, 0, 1, 2, 2]
    assert with_names(plan, {1: "attention", 2: "rwkv6"}) == [*plan[:3], "attention", "rwkv6", "+rwkv6"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Expansion(every=0), "student.layer_plan.expansion.every=0 must be at least 1"),
        (
            lambda: Expansion(mixer="+sparse"),
            "student.layer_plan.expansion.mixer: +sparse would be an insert",
        ),
        (
            lambda: LayerPlan(mixer=["rwkv7", "+sparse"]),
            "student.layer_plan.mixer: +sparse would be an insert",
        ),
        (
            lambda: LayerPlan(kept="+sparse"),
            "student.layer_plan.kept: +sparse would be an inserted layer; name",
        ),
        (
            lambda: LayerPlan(expansion=Expansion(every=5)),
            "expansion.every=5 inserts nothing into the teacher's 4",
        ),
        (lambda: LayerPlan(expansion=Expansion(every=2, mixer="x")), "student.layer_plan: ['x'] is unknown"),
        (
            lambda: LayerPlan(layers=["4 rwkv7", "+x"]),
            "student.layer_plan: ['x'] is unknown; choose from rwkv7",
        ),
        (
            lambda: LayerPlan(layers=["+sparse", "4 rwkv7"]),
            "begins with +sparse; an inserted layer is made from",
        ),
        (
            lambda: LayerPlan(layers=["3 rwkv7", "+sparse"]),
            "has 3 entries beside those with +; the teacher has 4 layers",
        ),
        (
            lambda: LayerPlan(layers=["4 rwkv7", "+sparse"], expansion=Expansion(every=2)),
            "expansion.every=2 and a plan that has inserted layers of its own (+) contradict each other",
        ),
    ],
    ids=range(10),
)
def test_insertions_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError) as error:
        make().resolve(4, KNOWN)
    assert message in str(error.value)


# --- the file -----------------------------------------------------------------------------------------------


def test_a_plan_goes_from_run_to_run(tmp_path):
    write_plan_file(tmp_path, ["rwkv7", "attention", "rwkv7"], by="kl", scores=[0.1, 0.25, None])
    assert yaml.safe_load((tmp_path / PLAN_FILE).read_text())["scores"] == [0.1, 0.25, None]
    for place in (tmp_path, tmp_path / PLAN_FILE, str(tmp_path)):
        assert read_plan_file(place) == ["rwkv7", "attention", "rwkv7"]
    plan = from_file(LayerPlan(file=str(tmp_path), mixer="rwkv6", kept="sparse"), 3)
    assert plan.resolve(3, KNOWN) == ["rwkv7", "attention", "rwkv7"] and plan.kept == "sparse"
    assert from_file(FIXED := LayerPlan(keep=[1]), 3) is FIXED


def test_a_plan_written_by_hand_is_read(tmp_path):
    for text in ("layers: [2 rwkv7, sparse]  # by hand", '{"layers": ["rwkv7", "rwkv7", "sparse"]}'):
        (tmp_path / "mine").write_text(text)
        assert read_plan_file(tmp_path / "mine") == ["rwkv7", "rwkv7", "sparse"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "there is no"),
        ("layers: [rwkv7", "is damaged"),
        ("\xff", "is damaged"),
        ("layers: []", "has no list `layers`"),
        ("layers: [1, 2]", "has no list `layers`"),
        ("[rwkv7, attention]", "has no list `layers`"),
        ("layers: [rwkv7, rwkv7]", "is a plan for 2 layers; the teacher has 3"),
    ],
    ids=str,
)
def test_a_file_without_a_fitting_plan_is_refused_with_its_key(text, message, tmp_path):
    if text is not None:
        (tmp_path / PLAN_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"student.layer_plan.file={tmp_path}.*{message}"):
        from_file(LayerPlan(file=str(tmp_path)), 3)


def test_a_file_keeps_inserted_layers_and_may_get_some(tmp_path):
    plan = ["rwkv7", "attention", "+sparse", "rwkv7"]
    write_plan_file(tmp_path, plan)
    assert from_file(LayerPlan(file=str(tmp_path)), 3).resolve(3, KNOWN) == plan
    with pytest.raises(ValueError, match="is a plan for 3 layers; the teacher has 4"):
        from_file(LayerPlan(file=str(tmp_path)), 4)
    twice = from_file(LayerPlan(file=str(tmp_path), expansion=Expansion(every=2)), 3)
    with pytest.raises(ValueError, match="contradict each other"):
        twice.resolve(3, KNOWN)
    write_plan_file(tmp_path, teacher_part(plan))
    assert from_file(LayerPlan(file=str(tmp_path), expansion=Expansion(every=2)), 3).resolve(3, KNOWN) == plan
