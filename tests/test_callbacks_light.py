"""The small callbacks and the metrics table, on a module of one weight."""

import io
import json
import logging
import os
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from torch.utils.data import DataLoader

from callbacks import provenance
from callbacks.dashboard import Dashboard, PanelLogger, panel_name
from callbacks.metrics_csv import MetricsCsv, read_metrics
from callbacks.progress import StageProgress, clock
from callbacks.provenance import Provenance
from callbacks.text_samples import TextSamples, write_samples
from callbacks.throughput import Throughput

STEPS = 10


class WordTokenizer:
    """Turns characters into their code points and back."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, token_ids):
        return "".join(chr(token_id) for token_id in token_ids)


class OneWeight(pl.LightningModule):
    """A module with what the callbacks expect of the conversion module."""

    def __init__(self, stage_name="align", tokens_before=1000):
        super().__init__()
        self.stage_name, self.tokens_before, self.tokens_per_step = stage_name, tokens_before, 64
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.frozen_mode = torch.nn.Dropout(0.5)
        self.tokenizer = WordTokenizer()
        self.modes = []

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch.float().mean() - 0.5).square().sum()
        self.log(f"{self.stage_name}/loss", loss)
        self.log(f"{self.stage_name}/layer_0/alignment", loss + 1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log(f"{self.stage_name}/validation/loss", self.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.05)

    def generate_pair(self, prompt_ids, max_new_tokens):
        assert prompt_ids.dtype == torch.int64 and prompt_ids.ndim == 2
        self.modes.append((self.training, self.frozen_mode.training))
        teacher = prompt_ids[:, :1].repeat(1, max_new_tokens)
        return teacher, [ord("s")] * max_new_tokens


class StopAt(Callback):
    """Raises after a step, as a killed process would end it."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def fit(
    module, folder, *, callbacks=(), loggers=(), ckpt_path=None, max_steps=STEPS, progress=False, **options
):
    """Fits a module for a few steps and returns the trainer."""
    trainer = pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        logger=list(loggers),
        callbacks=list(callbacks),
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=folder,
        log_every_n_steps=1,
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        **options,
    )
    # Equal batches, because a plain loader starts over on resume; the loss still moves with the weight.
    loader = DataLoader(torch.ones(STEPS, 8, dtype=torch.int64), batch_size=1)
    trainer.fit(module, loader, loader if options.get("val_check_interval") else None, ckpt_path=ckpt_path)
    return trainer


def begin(logger, module):
    """Does what train.py does before a stage."""
    logger.begin_stage(module.stage_name, module.tokens_before, module.tokens_per_step)
    return logger


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
        logger.begin_stage(stage, 0, 10)
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
    logger.begin_stage("align", 0, 1)
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


@pytest.mark.parametrize(
    ("metric", "panel"),
    [
        ("align/layer_3/alignment", "alignment/align/layer_3"),
        ("distill/kl", "losses/distill/kl"),
        ("distill/validation/loss", "losses/distill/validation/loss"),
        ("throughput/tokens_per_second", "throughput/tokens_per_second"),
        ("samples/align", "samples/align"),
        ("epoch", "trainer/epoch"),
    ],
)
def test_panel_names(metric, panel):
    assert panel_name(metric) == panel


class FakeRun:
    """Stands for a wandb run and remembers what it was told."""

    def __init__(self):
        self.entries, self.axes = [], {}

    def log(self, entry):
        self.entries.append(entry)

    def define_metric(self, name, step_metric=None, step_sync=None):
        assert name not in self.axes
        self.axes[name] = step_metric


def test_dashboard_groups_panels_over_tokens(tmp_path):
    calls = []

    def draw(path, *, rows, stage):
        from PIL import Image

        calls.append((path, len(rows), stage))
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
        return path

    run, module = FakeRun(), OneWeight()
    loggers = [PanelLogger(experiment=run), begin(MetricsCsv(run_folder=tmp_path), module)]
    dashboard = Dashboard(draw_heat_map=draw, run_folder=tmp_path)
    samples = TextSamples(run_folder=tmp_path, prompts=["def f"], max_new_tokens=3)
    fit(module, tmp_path, loggers=loggers, callbacks=[dashboard, samples])
    steps = [entry for entry in run.entries if "losses/align/loss" in entry]
    assert [entry["trainer/tokens"] for entry in steps] == [1000 + 64 * step for step in range(1, STEPS + 1)]
    assert "alignment/align/layer_0" in steps[0]
    assert set(run.axes.values()) == {"trainer/tokens"} and "losses/align/loss" in run.axes
    assert calls == [(tmp_path / "plots" / "alignment_align.png", 2 * STEPS, "align")]
    assert any("alignment/align/heat_map" in entry for entry in run.entries)
    tables = [entry["samples/align"] for entry in run.entries if "samples/align" in entry]
    assert tables[0].data == [[STEPS, "def f", "ddd", "sss"]]


def test_dashboard_does_nothing_without_wandb(tmp_path):
    module = OneWeight()

    def refuse(*arguments, **options):
        raise RuntimeError("drawn for nobody")

    logger = begin(MetricsCsv(run_folder=tmp_path), module)
    fit(module, tmp_path, loggers=[logger], callbacks=[Dashboard(draw_heat_map=refuse, run_folder=tmp_path)])


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
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "start"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    clean = provenance.describe_checkout(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "new.txt").write_text("x")
    assert provenance.describe_checkout(tmp_path) == {**clean, "dirty": True}
