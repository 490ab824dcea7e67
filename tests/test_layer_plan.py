"""The layer plan: what it resolves to, and what it refuses."""

import pytest

from models.layer_plan import LayerPlan

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


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="give either `layers` .* or `keep`, not both"):
        LayerPlan(layers=["rwkv7"] * 4, keep=[1])
