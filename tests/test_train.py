"""Whole runs: the quickstart in small, a resume after SIGKILL, a continuation, a sweep."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs

LOW_RATES = (
    "stage.distill.learning_rate={mixers: 2e-4, rest: 1e-4}",
)  # a finished student is soon unsettled


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of an uninterrupted run that also logs to wandb, offline."""
    outputs = tmp_path_factory.mktemp("finished")
    done = runs.train(outputs, cache, "logger=wandb", "logger.wandb.offline=true")
    assert done.returncode == 0, done.stderr
    for word in ("transfer", "align", "select", "distill", "teacher", "perplexity"):
        assert word in done.stdout, f"the printed table lacks {word!r}:\n{done.stdout}"
    return runs.run_folder(outputs)


def test_a_run_leaves_everything_behind(finished: Path):
    files = ["config.yaml", "metrics.csv", "summary.json", "report.md", "environment.json", "transfer.csv"]
    files += ["samples.md", "student/model.safetensors", "student/student.json", "student/tokenizer.json"]
    plots = ["loss", "alignment_align", "loss_by_position", "decoding_cost", "layer_scores"]
    for file in [*files, *(f"plots/{name}.png" for name in plots)]:
        assert (finished / file).stat().st_size > 0, file
    assert list((finished / "wandb").glob("offline-run-*/*.wandb"))
    assert not list(finished.glob("checkpoints/*/step-*")), "a finished stage needs no optimiser checkpoint"


def test_the_summary_keeps_the_contract(finished: Path):
    summary = runs.summary(finished)
    names = [stage["name"] for stage in summary["stages"]]
    assert names == ["transfer", "align", "select", "distill"]
    transfer, align, _, distill = summary["stages"]
    assert transfer["gap_recovered"] == 0 and transfer["tokens"] == 0
    assert align["tokens"] == 5120 and distill["tokens"] == 6144
    assert align["kl"] < transfer["kl"] and distill["kl"] < align["kl"]
    gap = transfer["loss"] - summary["teacher"]["loss"]
    assert distill["gap_recovered"] == pytest.approx((transfer["loss"] - distill["loss"]) / gap)
    assert sorted(summary["student"]["layer_plan"]) == ["attention", "rwkv7", "rwkv7", "rwkv7"]
    assert summary["student"]["state_bytes_per_row"] > 0
    assert set(summary["kernels"]["wkv7"]) >= {"backend", "reason"}


def test_resume_after_two_kills_is_bit_exact(finished: Path, tmp_path: Path, cache: Path):
    # The killed runs log to the csv alone; loggers do not change a run.
    runs.train_and_kill(tmp_path, cache, "align/step-4.ckpt", "ckpt_path=auto")
    runs.train_and_kill(tmp_path, cache, "distill/step-6.ckpt", "ckpt_path=auto")
    done = runs.train(tmp_path, cache, "ckpt_path=auto")
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout
    resumed = runs.run_folder(tmp_path)
    expected, found = runs.losses(finished), runs.losses(resumed)
    assert found.keys() == expected.keys()
    assert found == expected
    timing = ("seconds", "tokens_per_second")
    for before, after in zip(runs.summary(finished)["stages"], runs.summary(resumed)["stages"], strict=True):
        assert {k: v for k, v in before.items() if k not in timing} == {
            k: v for k, v in after.items() if k not in timing
        }


def test_another_config_does_not_resume(tmp_path: Path, cache: Path):
    runs.train_and_kill(tmp_path, cache, "align/step-2.ckpt")
    done = runs.train(tmp_path, cache, "ckpt_path=auto", "seed=2")
    assert done.returncode == 2
    assert "another config" in done.stderr and "seed" in done.stderr


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, cache: Path):
    runs.train_and_kill(tmp_path, cache, "align/step-6.ckpt")
    newest = runs.run_folder(tmp_path) / "checkpoints" / "align" / "step-6.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = runs.train(tmp_path, cache, "ckpt_path=auto", "stages=[align,select,distill]")
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stdout and "step-4.ckpt" in done.stdout


def test_stages_can_be_cut_and_continued(finished: Path, tmp_path: Path, cache: Path):
    done = runs.train(
        tmp_path, cache, "stages=[distill]", f"init_from={finished}", "logger=tensorboard", *LOW_RATES
    )
    assert done.returncode == 0, done.stderr
    folder = runs.run_folder(tmp_path)
    before, after = runs.summary(finished), runs.summary(folder)
    assert [stage["name"] for stage in after["stages"]] == ["distill"]
    assert after["student"]["layer_plan"] == before["student"]["layer_plan"]
    selected = before["stages"][-2]
    assert after["stages"][0]["kl"] < selected["kl"] < before["stages"][0]["kl"]
    assert (
        after["stages"][0]["gap_recovered"] > selected["gap_recovered"]
    )  # counted from the first run's transfer
    assert list(folder.glob("tensorboard/events*"))


def test_a_damaged_student_is_refused(finished: Path, tmp_path: Path, cache: Path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    description = copy / "student" / "student.json"
    description.write_text(description.read_text().replace('"attention"', '"rwkv7"'))
    done = runs.train(tmp_path / "out", cache, "stages=[distill]", f"init_from={copy}")
    assert done.returncode == 2 and "damaged" in done.stderr


def test_eval_finds_what_the_run_measured(finished: Path, tmp_path: Path, cache: Path):
    small = ("data.row_length=128", "data.validation_rows=4")
    options = [
        *small,
        f"paths.cache={cache}",
        f"paths.outputs={tmp_path}",
        "teacher_folder=assets/tiny_qwen2",
    ]
    program = [sys.executable, "eval.py", f"model={finished}", *options]
    done = subprocess.run(
        program, cwd=runs.REPOSITORY, env=runs.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (output,) = tmp_path.glob("eval/*/eval.json")
    found, expected = json.loads(output.read_text())["figures"], runs.summary(finished)["stages"][-1]
    for key in ("loss", "kl", "top1_agreement", "copy_gain"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)


def test_a_sweep_and_a_dry_run(tmp_path: Path, cache: Path):
    done = runs.train(tmp_path, cache, "-m", "seed=1,2", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing was trained") == 2
    assert len(list(tmp_path.glob("sweeps/quickstart/*/*/config.yaml"))) == 2


def test_overfitting_lowers_the_loss(tmp_path: Path, cache: Path):
    overrides = ("debug=overfit", "stages=[distill]", "stage.distill.tokens=24576", "data.row_length=128")
    small = ("data.validation_rows=4", "data.copy_rows=4", "data.copy_passage_length=64")
    done = runs.train(tmp_path, cache, *overrides, *small, "evaluation.decoding_contexts=[]")
    assert done.returncode == 0, done.stderr
    kl = [
        float(v)
        for (_, _, metric), v in runs.losses(runs.run_folder(tmp_path)).items()
        if metric == "distill/kl"
    ]
    assert kl[-1] < 0.5 * kl[0]
