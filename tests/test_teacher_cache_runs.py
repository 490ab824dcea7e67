"""Runs that write a teacher cache and train from it: exact after kills, the same on two processes, and
refused before a weight is loaded where the cache is another's."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import runs
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from conf import launch
from data.teacher_cache import MANIFEST, PART
from models.teacher_targets import weights_digest

FAST = (
    "callbacks.text_samples=null",
    "evaluation.decoding_contexts=[]",
    "trainer.accelerator=cpu",
    "data.max_tokens=60000",
)
BOTH = "stages=[cache_teacher,distill]"
TEACHER = runs.REPOSITORY / "assets" / "tiny_qwen2"


def caching(folder: Path) -> tuple[str, ...]:
    """The overrides of a run that writes a small cache and trains from it."""
    own = (f"stage.cache_teacher.folder={folder}", "stage.cache_teacher.top_k=16")
    return (*FAST, *own, "stage.cache_teacher.rows_per_part=10", reading(folder))


def reading(folder: Path) -> str:
    return f"stage.distill.objective.teacher_cache={folder}"


def files(folder: Path) -> dict[str, bytes]:
    """The cache's files; what the run's place says is not part of it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("part-*/*"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The cache of tokens, the teacher cache and the run folder of an uninterrupted run."""
    place = tmp_path_factory.mktemp("whole")
    done = runs.train(place / "outputs", place / "tokens", BOTH, *caching(place / "teacher"))
    assert done.returncode == 0, done.stderr[-2000:]
    return place / "tokens", place / "teacher", runs.run_folder(place / "outputs")


def test_a_run_trains_from_the_cache_that_it_has_written(whole):
    _, cache, folder = whole
    manifest = json.loads((cache / MANIFEST).read_text())
    assert manifest["complete"] and manifest["rows"] == 6144 // 128
    assert [json.loads(path.read_text())["rows"] for path in sorted(cache.glob(f"*/{PART}"))] == [10] * 4 + [
        8
    ]
    stages = {stage["name"]: stage for stage in runs.summary(folder)["stages"]}
    assert stages["cache_teacher"]["cached_rows"] == 48 and stages["cache_teacher"]["tokens"] == 0
    assert stages["distill"]["kl"] < 0.8 * stages["cache_teacher"]["kl"]


@pytest.fixture
def composing():
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(runs.REPOSITORY / "conf")):
        yield


def check(cache: Path, tokens: Path, *overrides: str) -> str:
    """What a user reads of a run that trains from a cache; nothing where it may begin."""
    small = (*runs.SMALL, *FAST, f"paths.cache={tokens}", "paths.run_folder=/nowhere")
    given = ("stages=[distill]", "stage.distill.tokens=6144", reading(cache), *overrides)
    try:
        launch.check(compose("train", overrides=[*small, *given]))
    except ValueError as error:
        return launch.plain_message(error)
    return ""


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([], []),
        (["data.rows_per_device=2", "stage.distill.accumulate=2"], []),  # the rows are the same
        (["stage.distill.tokens=6000"], []),
        (["seed=2"], ["data.seed (1 there, 2 here)"]),
        (["+stage.distill.data.row_length=64"], ["data.row_length (128 there, 64 here)"]),
        (["stage.distill.objective.temperature=2"], ["temperature (1.0 there, 2.0 here)"]),
        (["stage.distill.tokens=7000"], ["holds 48 rows, the stage needs 52", "stages=[cache_teacher]"]),
        (["stage.distill.objective.teacher_cache=/nowhere"], ["/nowhere holds no such cache"]),
        (["+stage.distill.curriculum=[{from_tokens:0,row_length:64,rows_per_device:4},"
          "{from_tokens:2048,row_length:128,rows_per_device:4}]"],
         ["phase-0 holds no such cache", "stages=[cache_teacher]"]),
        (["stages=[cache_teacher]", "stage.cache_teacher.top_k=5000"],
         ["stage.cache_teacher.top_k=5000 is more than the teacher's 2048 ids"]),
        (["stages=[distill,cache_teacher]"], ["put cache_teacher before distill"]),
        (["stages=[cache_teacher,distill]"], ["distill would not train from the cache"]),
        (["stages=[cache_teacher]", "stage.cache_teacher.of=align"], ["stage.cache_teacher.of=align"]),
    ],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused_before_a_weight_is_loaded(
    whole, composing, monkeypatch, overrides, words
):
    tokens, cache, _ = whole
    monkeypatch.setattr("models.teacher.load_teacher", lambda *_: pytest.fail("weights were loaded"))
    message = check(cache, tokens, *overrides)
    assert bool(message) == bool(words), message
    for word in words:
        assert word in message, message


def test_another_teacher_and_another_tokenizer_are_refused(whole, composing, tmp_path):
    tokens, cache, _ = whole
    moved = tmp_path / "moved"
    shutil.copytree(TEACHER, moved)
    assert check(cache, tokens, f"teacher.path={moved}") == ""  # the same weights at another place
    weights = load_file(moved / "model.safetensors")
    halves = [dict(list(weights.items())[part::2]) for part in (0, 1)]
    for part, half in enumerate(halves):
        save_file(half, moved / f"part-{part}.safetensors")
    (moved / "model.safetensors").unlink()
    assert weights_digest(moved) == weights_digest(TEACHER)  # and divided into other files
    name = next(iter(halves[1]))
    save_file({**halves[1], name: halves[1][name] + 1e-3}, moved / "part-1.safetensors")
    assert "teacher.weights" in check(cache, tokens, f"teacher.path={moved}")

    other = tmp_path / "other"
    shutil.copytree(TEACHER, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer" in check(cache, tokens, f"teacher.path={other}")


def test_an_unfinished_cache_is_refused(whole, composing, tmp_path):
    tokens, cache, _ = whole
    unfinished = tmp_path / "cache"
    shutil.copytree(cache, unfinished)
    manifest = json.loads((unfinished / MANIFEST).read_text())
    (unfinished / MANIFEST).write_text(json.dumps({**manifest, "complete": False}))
    assert "is not complete; run stages=[cache_teacher] again" in check(unfinished, tokens)


def test_the_layers_of_align_are_counted_before_a_weight_is_loaded(composing):
    small = (*runs.SMALL, "paths.run_folder=/nowhere", "stages=[align]")
    with pytest.raises(
        ValueError, match=r"stage\.align\.objective\.layer_weights has 3 entries, the teacher has 4"
    ):
        launch.check(compose("train", overrides=[*small, "stage.align.objective.layer_weights=[1,2,3]"]))
    launch.check(compose("train", overrides=[*small, "stage.align.objective.layer_weights=[1,2,3,0]"]))


@pytest.mark.slow
def test_a_killed_writer_and_a_killed_training_change_nothing(whole, tmp_path):
    tokens, cache, folder = whole
    outputs, again = tmp_path / "outputs", tmp_path / "teacher"
    command = runs.command(outputs, tokens, BOTH, *caching(again))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=runs.REPOSITORY, env=runs.environment(), **quiet)
    deadline = time.monotonic() + 200
    while not (again / "part-00001").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((again / MANIFEST).read_text())["complete"]
    resume = ("ckpt_path=auto",)
    runs.train_and_kill(outputs, tokens, "distill/step-6.ckpt", BOTH, *caching(again), *resume)
    done = runs.train(outputs, tokens, BOTH, *caching(again), *resume)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files(again) == files(cache)
    assert runs.losses(runs.run_folder(outputs)) == runs.losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_write_the_same_cache_and_train_alike(whole, tmp_path, strategy):
    tokens, cache, folder = whole
    pair = (f"strategy={strategy}", "trainer.devices=2", "data.rows_per_device=2")
    done = runs.train(tmp_path / "outputs", tokens, BOTH, *caching(tmp_path / "teacher"), *pair)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = files(tmp_path / "teacher"), files(cache)
    assert ours.keys() == theirs.keys()
    close_arrays(tmp_path / "teacher", cache)
    one, two = (runs.losses(f) for f in (folder, runs.run_folder(tmp_path / "outputs")))
    assert one.keys() == two.keys()
    for key in one:
        assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-4), key


def close_arrays(first: Path, second: Path) -> None:
    """Other batches round differently: the same tokens are likely, and as likely, but for the last digit."""
    import numpy as np

    for path in first.glob("part-*/teacher_logs.npy"):
        found, wanted = np.load(path), np.load(second / path.relative_to(first))
        torch.testing.assert_close(
            torch.from_numpy(found).float(), torch.from_numpy(wanted).float(), rtol=2**-9, atol=1e-3
        )
