"""The small callbacks and the metrics table, on a module of one weight."""

import io
import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from one_weight import STEPS, OneWeight, StopAt, begin, fit
from rich.console import Console

from callbacks import provenance
from callbacks.metrics_csv import MetricsCsv, read_metrics
from callbacks.progress import StageProgress, clock
from callbacks.provenance import Provenance
from callbacks.text_samples import TextSamples, write_samples
from callbacks.throughput import Throughput


def test_metrics_csv_counts_completed_steps(tmp_path):
    module = OneWeight()
    logger = begin(MetricsCsv(run_folder=tmp_path), module)
    fit(module, tmp_path, loggers=[logger], val_check_interval=5, limit_val_batches=1)
    rows = read_metrics(tmp_path / "metrics.csv")
    losses = [row for row in rows if row["metric"] == "align/loss"]
    assert [row["step"] for row in losses] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in losses] == [1000 + 64 * step for step in range(1, STEPS + 1)]
    validations = [row for row in rows if row["metric"] == "align/validation/loss"]
    assert [row["step"] for row in validations] == [5, 10]
    assert {row["metric"] for row in rows} == {
        "align/loss",
        "align/layer_0/alignment",
        "align/validation/loss",
    }
    assert validations[-1]["value"] == module.weight.item()


def test_a_resumed_metrics_csv_equals_the_uninterrupted_one(tmp_path):
    def run(folder, **options):
        module = OneWeight()
        logger = begin(MetricsCsv(run_folder=folder), module)
        logger.truncate_after("align", options.pop("resume_step", -1))
        saver = ModelCheckpoint(
            folder / "checkpoints", every_n_train_steps=4, save_top_k=-1, filename="{step}"
        )
        fit(module, folder, loggers=[logger], callbacks=[saver, *options.pop("callbacks", [])], **options)

    run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "broken", callbacks=[StopAt(7)])
    with open(tmp_path / "broken" / "metrics.csv", "a") as file:
        file.write("align,8,15")
    assert read_metrics(tmp_path / "broken" / "metrics.csv")[-1]["step"] == 7
    run(tmp_path / "broken", ckpt_path=tmp_path / "broken" / "checkpoints" / "step=4.ckpt", resume_step=4)
    whole, resumed = (tmp_path / name / "metrics.csv" for name in ("whole", "broken"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_truncation_is_exact(tmp_path):
    logger = MetricsCsv(run_folder=tmp_path)
    for stage in ("align", "distill", "extend"):
        logger.begin_stage(stage, lambda step: 10 * step)
        for step in range(4):
            logger.record({"loss": step + 1 / 3}, step=step)
    logger.save()
    lines = (tmp_path / "metrics.csv").read_text().splitlines(keepends=True)
    assert lines[:3] == ["stage,step,tokens,metric,value\n", "align,0,0,loss,0.3333333333333333\n", lines[2]]
    logger.truncate_after("distill", 2)
    assert (tmp_path / "metrics.csv").read_text() == "".join(lines[:8])
    logger.truncate_after("distill", -1)
    assert (tmp_path / "metrics.csv").read_text() == "".join(lines[:5])
    logger.truncate_after("never_started", 0)
    assert (tmp_path / "metrics.csv").read_text() == "".join(lines[:5])


def test_metrics_csv_flushes_by_itself_and_keeps_every_digit(tmp_path):
    logger = MetricsCsv(run_folder=tmp_path, flush_every=3)
    with pytest.raises(ValueError, match="begin_stage"):
        logger.log_metrics({"loss": 1.0}, step=0)
    logger.begin_stage("align", lambda step: step)
    logger.log_metrics({"a": 0.1 + 0.2, "epoch": 0}, step=0)
    assert not logger.path.exists()
    logger.log_metrics({"a": float("inf"), "b": torch.tensor(2.5)}, step=1)
    assert [row["value"] for row in read_metrics(logger.path)] == [0.1 + 0.2, float("inf"), 2.5]
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="not a metrics table"):
        read_metrics(tmp_path / "other.csv")


def test_throughput_adds_up_over_a_resume(tmp_path):
    class Slow(Callback):
        def on_train_batch_start(self, *arguments):
            time.sleep(0.01)

    def parts():
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        return Throughput(window=3), Slow(), saver

    throughput, *others = parts()
    trainer = fit(OneWeight(), tmp_path, callbacks=[throughput, *others], max_steps=4)
    first = throughput.seconds
    assert throughput.tokens == 4 * 64 and first >= 0.04
    assert 0 < trainer.callback_metrics["throughput/tokens_per_second"] < 64 / 0.01
    resumed, *others = parts()
    fit(OneWeight(), tmp_path, callbacks=[resumed, *others], ckpt_path=tmp_path / "step=4.ckpt")
    assert resumed.tokens == STEPS * 64
    assert 0.1 <= resumed.seconds
    stopped = resumed.seconds
    time.sleep(0.01)
    assert resumed.seconds == stopped
    fit(OneWeight(), tmp_path, callbacks=[resumed], max_steps=2)
    assert resumed.tokens == 2 * 64, "a new stage starts from nothing"


def test_progress_logs_tenths_without_a_terminal(tmp_path, caplog):
    bar = StageProgress(console=Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO, logger="callbacks.progress"):
        fit(OneWeight(), tmp_path, callbacks=[Throughput(), bar], progress=True)
    lines = [record.message for record in caplog.records if record.name == "callbacks.progress"]
    assert len(lines) == 10
    assert lines[4].startswith("align 5/10 (50%): loss ")
    assert "tokens/s" in lines[4] and lines[4].endswith(" left")


def test_progress_draws_a_bar_with_the_stage_in_a_terminal(tmp_path, caplog):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with caplog.at_level(logging.INFO, logger="callbacks.progress"):
        callbacks = [Throughput(), StageProgress(console=console, refresh_seconds=0)]
        fit(OneWeight("distill"), tmp_path, callbacks=callbacks, progress=True)
    drawn = screen.getvalue()
    assert "distill" in drawn and "tokens/s" in drawn and "100%" in drawn and "0:00 left" in drawn
    assert not [record for record in caplog.records if record.name == "callbacks.progress"]


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.7, 125, 3723)] == ["0:00", "1:00", "2:05", "1:02:03"]


def test_text_samples_file_and_modes(tmp_path):
    module = OneWeight()
    samples = TextSamples(run_folder=tmp_path, prompts=["a", "b```"], every_steps=4, max_new_tokens=2)
    module.frozen_mode.eval()
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                pl_module.frozen_mode.eval()
            seen.append((pl_module.training, pl_module.frozen_mode.training))

    fit(module, tmp_path, callbacks=[Watch(), samples])
    text = (tmp_path / "samples.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## align, step 4", "## align, step 8", f"## align, step {STEPS}"]
    assert "Teacher continues:\n```\naa\n```" in text and "````\nb```\n````" in text
    assert module.modes == [(False, False)] * 6
    assert set(seen) == {(True, False)}, "a submodule held in evaluation mode was switched to training"


def test_a_repeated_sample_replaces_the_interrupted_attempt(tmp_path):
    path = tmp_path / "samples.md"
    for heading in ("## align, step 4", "## align, step 8"):
        write_samples(path, heading, [[0, "p", "t", "s"]])
    whole = path.read_bytes()
    for heading in ("## align, step 4", "## align, step 8"):
        write_samples(path, heading, [[0, "p", "t", "s"]])
        write_samples(path, "## align, step 8", [[0, "p", "t", "s"]])
    assert path.read_bytes() == whole


def test_text_samples_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="prompts"):
        TextSamples(run_folder=tmp_path, prompts=[])
    module = OneWeight()
    del module.tokenizer
    with pytest.raises(ValueError, match="callbacks.text_samples.*no tokenizer"):
        TextSamples(run_folder=tmp_path, prompts=["a"]).setup(None, module, "fit")


def test_environment_holds_no_secret(tmp_path, monkeypatch):
    secrets = {
        "WANDB_API_KEY": "f00dfeed" * 5,
        "HF_TOKEN": "hf_abcdefgh12345",
        "PLAIN_SETTING": "visible-by-name",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    command = [
        "train.py",
        f"note=key-is-{secrets['WANDB_API_KEY']}-here",
        "+logger.wandb.api_key=another-secret",
        "--token",
        "third-secret",
        "teacher.tokenizer=gpt2",
        "stage.tokens=1000",
    ]
    monkeypatch.setattr(sys, "argv", command)
    fit(OneWeight(), tmp_path, callbacks=[Provenance(run_folder=tmp_path)], max_steps=1)
    text = (tmp_path / "environment.json").read_text()
    for value in (*secrets.values(), "another-secret", "third-secret"):
        assert value not in text
    assert not [name for name in os.environ if len(name) > 8 and name in text]
    environment = json.loads(text)
    assert environment["command"][1] == "note=key-is-***-here"
    assert environment["command"][-2:] == ["teacher.tokenizer=gpt2", "stage.tokens=1000"]
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["python"].count(".") == 2 and environment["cpu_count"] >= 1


def test_environment_of_a_resumed_run_keeps_the_earlier_one(tmp_path):
    path = tmp_path / "environment.json"
    provenance.write_environment(path, {"python": "3.11"})
    provenance.write_environment(path, {"python": "3.11"})
    assert json.loads(path.read_text()) == {"python": "3.11"}
    provenance.write_environment(path, {"python": "3.12"})
    provenance.write_environment(path, {"python": "3.12"})
    assert json.loads(path.read_text()) == {"python": "3.12", "earlier": [{"python": "3.11"}]}


def test_checkout_is_described(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.describe_checkout(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    remote = "https://user:password@git.example.org/x.git?token=t"
    (tmp_path / "old.txt").write_text("a\n")
    commands = (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "start"])
    for arguments in (*commands, ["remote", "add", "origin", remote]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    clean = provenance.describe_checkout(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False and clean["changes"] == []
    assert clean["remote"] == "https://git.example.org/x.git"
    (tmp_path / "new.txt").write_text("x")
    (tmp_path / "old.txt").write_text("b\n")
    changed = {"dirty": True, "changes": [" M old.txt", "?? new.txt"]}
    lines = "1 file changed, 1 insertion(+), 1 deletion(-)"
    assert provenance.describe_checkout(tmp_path) == {**clean, **changed, "lines": lines}
