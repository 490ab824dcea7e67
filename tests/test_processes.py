"""Runs of several processes on one CPU machine: the same losses, exact resumes, an orderly stop."""

import json
import os
import shutil
from pathlib import Path

import pytest
import runs
import torch
from omegaconf import OmegaConf
from tiny import SavedBytes, packed_batch, tiny_student, tiny_teacher
from torch.distributed.checkpoint import FileSystemReader

from conf.ranks import VARIABLES, check_processes, processes, rank_command
from models.objectives import Distill
from models.parallelize import recompute_blocks

FAST = ("trainer.accelerator=cpu", "evaluation.decoding_contexts=[]")
QUIET = "callbacks.text_samples=null"
ONE = (*FAST, QUIET, "data.rows_per_device=4")
PAIR = (*FAST, "trainer.devices=2", "data.rows_per_device=2")
TWO = (*PAIR, QUIET)
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of an uninterrupted run of one process."""
    return finished(tmp_path_factory.mktemp("one"), cache, *ONE)


@pytest.fixture(scope="module", params=STRATEGIES)
def two_processes(request, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[str, Path, Path]:
    """A strategy, the folder of an uninterrupted run of two processes, and the outputs of one that the second
    process was told to stop in the middle of align."""
    strategy = request.param
    # Looks at held-out rows and samples of text between the steps must not change them.
    looks = ("stage.distill.validate_every_steps=4", "callbacks.text_samples.every_steps=5")
    whole = finished(tmp_path_factory.mktemp(strategy), cache, *PAIR, *looks, f"strategy={strategy}")
    stopped = tmp_path_factory.mktemp(f"{strategy}_stopped")
    code = runs.train_and_signal(
        stopped, cache, "align/step-2.ckpt", *TWO, f"strategy={strategy}", rank=1 if strategy == "ddp" else 0
    )
    assert code == 1
    return strategy, whole, stopped


def finished(outputs: Path, cache: Path, *overrides: str) -> Path:
    """Runs to the end and returns the run folder."""
    done = runs.train(outputs, cache, *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    return runs.run_folder(outputs)


def worst(first: Path, second: Path) -> float:
    """The largest relative difference of all logged numbers; either may have looked at held-out rows
    besides."""
    before, after = training(first), training(second)
    assert before.keys() == after.keys()
    pairs = [(float(before[key]), float(after[key])) for key in before]
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)


def training(folder: Path) -> dict[tuple[str, str, str], str]:
    """The logged numbers of training steps."""
    return {key: value for key, value in runs.losses(folder).items() if "validation" not in key[2]}


def test_losses_equal_those_of_one_process(one_process, two_processes):
    _, whole, _ = two_processes
    assert worst(one_process, whole) < 1e-5
    first, second = runs.summary(one_process), runs.summary(whole)
    assert first["student"]["layer_plan"] == second["student"]["layer_plan"]
    for before, after in zip(first["stages"], second["stages"], strict=True):
        assert after["kl"] == pytest.approx(before["kl"], rel=1e-5)


def test_a_signal_to_either_process_saves_the_running_step(two_processes):
    _, _, stopped = two_processes
    folder = runs.run_folder(stopped)
    steps = sorted(int(path.stem.split("-")[1]) for path in folder.glob("checkpoints/align/step-*.ckpt"))
    assert steps[-1] >= 2
    assert not (folder / "summary.json").exists()
    logged = {int(step) for stage, step, _ in runs.losses(folder) if stage == "align"}
    assert max(logged) == steps[-1]  # nothing was trained after what was saved


def test_checkpoints_hold_the_student_alone(two_processes):
    strategy, _, stopped = two_processes
    path = max(runs.run_folder(stopped).glob("checkpoints/align/step-*.ckpt"))
    if strategy == "fsdp":
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        names = [name.removeprefix("state_dict.") for name in stored if name.startswith("state_dict.")]
    else:
        names = list(torch.load(path, weights_only=True)["state_dict"])
    assert names
    assert all(name.startswith("student.") for name in names)


def test_resume_on_as_many_and_on_fewer_processes(two_processes, cache, tmp_path):
    strategy, whole, stopped = two_processes
    fewer = tmp_path / "fewer"
    shutil.copytree(stopped, fewer)
    again = finished(stopped, cache, *TWO, f"strategy={strategy}", "ckpt_path=auto")
    assert training(again) == training(whole)
    on_one = finished(fewer, cache, *ONE, f"strategy={strategy}", "ckpt_path=auto")
    assert worst(whole, on_one) < 2e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_on_more_processes(strategy, one_process, cache, tmp_path):
    short = "stages=[align]"
    runs.train_and_signal(tmp_path, cache, "align/step-2.ckpt", *ONE, f"strategy={strategy}", short)
    resumed = finished(tmp_path, cache, *TWO, f"strategy={strategy}", short, "ckpt_path=auto")
    whole = {key: value for key, value in training(one_process).items() if key[0] == "align"}
    found = training(resumed)
    assert found.keys() == whole.keys()
    assert all(float(found[key]) == pytest.approx(float(whole[key]), rel=2e-6) for key in whole)


def test_all_processes_of_a_trial_train_the_same_trial(cache, tmp_path):
    digest = (
        "+callbacks.digest._target_=rank_digest.RankDigest",
        "+callbacks.digest.run_folder=${paths.run_folder}",
    )
    tiny = ("stages=[align]", "stage.align.learning_rate.mixers=1e-3,2e-3", "strategy=ddp", *digest)
    done = runs.train(tmp_path, cache, "-m", *TWO, *tiny, python_path="tests")
    assert done.returncode == 0, done.stderr[-2000:]
    trials = sorted(path.parent for path in tmp_path.glob("sweeps/quickstart/*/*/summary.json"))
    assert [trial.name for trial in trials] == ["0", "1"]  # one folder per trial, whatever its processes
    assert not list(tmp_path.glob("quickstart/*"))
    found = [[json.loads((trial / f"digest_{rank}.json").read_text()) for rank in (0, 1)] for trial in trials]
    assert all(first == second and first["processes"] == 2 for first, second in found)
    assert [first["rate"] for first, _ in found] == [1e-3, 2e-3]
    assert found[0][0]["weights"] != found[1][0]["weights"]


def settings(strategy: str = "ddp", devices: int = 2, num_nodes: int = 1, dry_run: bool = False):
    trainer = {"devices": devices, "num_nodes": num_nodes, "accelerator": "cpu"}
    return OmegaConf.create({"strategy": {"name": strategy}, "trainer": trainer, "dry_run": dry_run})


@pytest.mark.parametrize(
    ("config", "environment", "words"),
    [
        (settings("single"), {}, "strategy=ddp or strategy=fsdp"),
        (settings(devices=0), {}, "trainer.devices=0"),
        (settings(devices="auto"), {}, "trainer.devices=auto"),
        (settings(num_nodes=2), {}, "torchrun or srun"),
        (settings(), {"LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "4 processes were started"),
        (settings(), {"SLURM_NTASKS": "3", "SLURM_STEP_ID": "0"}, "3 processes were started"),
    ],
)
def test_what_does_not_fit_is_refused(config, environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        check_processes(config)


def test_what_fits_is_accepted(monkeypatch):
    for config in (
        settings(),
        settings("fsdp", 1),
        settings("single", 1),
        settings(num_nodes=2, dry_run=True),
    ):
        check_processes(config)
    monkeypatch.setenv("SLURM_NTASKS", "3")  # a batch script that does not use srun
    check_processes(settings())
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_processes(settings(num_nodes=2))


def test_a_process_gets_the_saved_config_and_no_sweep(tmp_path):
    command = rank_command(Path("train.py"), tmp_path)
    assert command[command.index("--config-path") + 1] == str(tmp_path)
    assert "hydra.mode=RUN" in command and f"hydra.run.dir={tmp_path}" in command
    assert not {"-m", "--multirun"} & set(command)


def test_group_and_variables_are_gone_after_the_run(tmp_path):
    before = dict(os.environ)
    for _ in range(2):  # as in a sweep
        with pytest.raises(KeyError), processes(settings("fsdp", 1), tmp_path):
            assert torch.distributed.get_world_size() == 1
            assert os.environ["LOCAL_RANK"] == "0"
            raise KeyError
        assert not torch.distributed.is_initialized()
        assert {name: os.environ.get(name) for name in VARIABLES} == {
            name: before.get(name) for name in VARIABLES
        }


def test_recomputed_blocks_save_memory_and_change_nothing():
    teacher = tiny_teacher(layers=4)
    batch = packed_batch([[40, 24], [64]])
    found = []
    for recompute in (False, True):
        student = tiny_student(teacher, keep=(1,)).train()
        if recompute:
            recompute_blocks(student)
        with SavedBytes() as saved:
            Distill()(student, teacher, batch).total.backward()
        found.append((saved.peak, [parameter.grad for parameter in student.parameters()]))
    (plain, gradients), (less, recomputed) = found
    assert less < plain / 2
    for first, second in zip(gradients, recomputed, strict=True):
        assert torch.equal(first, second)
