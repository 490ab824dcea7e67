"""Whole runs of hybrids: what a selection gives back draws the same numbers however the run goes."""

from pathlib import Path

import pytest
import runs
import yaml
from test_processes import ONE, TWO, finished, training, worst

# The low-rank gate of kept attention has a random matrix; it is made when the selection is over.
HYBRID = (
    "student=hybrid",
    "student.layer_plan.every=null",
    "student.mixers.attention.gate=low",
    "student.mixers.attention.training_length=32",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of an uninterrupted run of one process."""
    return finished(tmp_path_factory.mktemp("whole"), cache, *ONE, *HYBRID)


def test_a_hybrid_goes_through_selection_and_its_plan_to_the_next_run(whole, cache, tmp_path):
    plan = runs.summary(whole)["student"]["layer_plan"]
    assert sorted(plan) == ["attention", "rwkv7", "rwkv7", "rwkv7"]
    assert yaml.safe_load((whole / "layer_plan.yaml").read_text())["layers"] == plan
    again = finished(tmp_path, cache, *ONE, *HYBRID, f"student.layer_plan.file={whole}", "stages=[distill]")
    assert runs.summary(again)["student"]["layer_plan"] == plan


@pytest.mark.slow
def test_killed_before_the_selection_it_becomes_the_same_hybrid(whole, cache, tmp_path):
    runs.train_and_kill(tmp_path, cache, "align/step-2.ckpt", *ONE, *HYBRID)
    assert training(finished(tmp_path, cache, *ONE, *HYBRID, "ckpt_path=auto")) == training(whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_become_the_same_hybrid(strategy, whole, cache, tmp_path):
    pair = finished(tmp_path, cache, *TWO, *HYBRID, f"strategy={strategy}")
    assert worst(whole, pair) < 1e-5
    assert runs.summary(pair)["student"]["layer_plan"] == runs.summary(whole)["student"]["layer_plan"]
