"""Stages with a curriculum: rows, attention, frozen groups and figures follow it, and no kill can tell."""

import csv
import logging
from pathlib import Path
from typing import ClassVar

import pytest
import runs
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from runs import REPOSITORY
from tiny import tiny_student, tiny_teacher
from torch import Tensor, nn
from transformers import PreTrainedModel

from callbacks.metrics_csv import MetricsCsv
from conf import launch
from conf.run_folder import save_config
from conf.stages import build_stage
from models.architectures import decoder_layers
from models.mixers import RWKV7Mixer
from models.student import parameter_groups, student_mixers
from pipeline.training import train_stage

# --- whole stages -------------------------------------------------------------------------------------------


class KillAt(Callback):
    """Raises in a batch of an optimiser step, as a killed process would end it."""

    def __init__(self, step: int, batch: int):
        self.step, self.batch = step, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % ACCUMULATE == self.batch:
            raise RuntimeError("killed")


ACCUMULATE = 2
ROWS = (
    "[{from_tokens:0,row_length:16,rows_per_device:2,attention:dense,learning_rate:{mixers:0,rest:0},"
    "warmup_steps:1},{from_tokens:150,row_length:32,rows_per_device:4,learning_rate:{index:0}},"
    "{from_tokens:900,row_length:64,rows_per_device:1,attention:dense,learning_rate:{rest:0},warmup_steps:1}]"
)
USED = [0, 64, 128, 192, 448, 704, 960, 1088, 1216]  # tokens after each step of the 1250 that there may be
SWITCHES = {0: (16, 2, 1), 3: (32, 4, 0), 6: (64, 1, 1)}  # step -> rows and dense attention from there on
TRAINED = {0: {"inserted", "index"}, 3: {"inserted", "mixers", "rest"}, 6: {"inserted", "mixers", "index"}}
QUIET = ("text_samples", "dashboard", "provenance", "progress", "stop_on_signal")


class Choosing(RWKV7Mixer):
    """A stand-in for a sparse mixer: it has an index, and attends in two ways."""

    dense = False

    def mix(self, hidden, positions, cache, context):
        mixed = super().mix(hidden, positions, cache, context)
        return mixed + (2.0 if self.dense else 0.5) * self.index(hidden)


def expanded_student(vocabulary: int) -> PreTrainedModel:
    """A student with an inserted layer, mixers with an index, and a layer that keeps its attention."""
    student = tiny_student(tiny_teacher(vocab_size=vocabulary, layers=4), (1,))
    for mixer in student_mixers(student).values():
        mixer.index, mixer.__class__ = nn.Linear(64, 64), Choosing
    decoder_layers(student)[2].inserted = True
    return student


class Watch(Callback):
    """Keeps what the weights of each group were when each optimiser step began, and how mixers attended."""

    seen: ClassVar[dict[int, dict[str, Tensor]]] = {}
    dense: ClassVar[dict[int, set[bool]]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(trainer.global_step, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.note(trainer.global_step, pl_module)

    def note(self, step, pl_module):
        groups = parameter_groups(pl_module.student).items()
        self.seen[step] = {name: torch.cat([p.detach().flatten() for p in group]) for name, group in groups}
        self.dense[step] = {mixer.dense for mixer in student_mixers(pl_module.student).values()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small texts, and beside it the cache of their tokens."""
    folder = tmp_path_factory.mktemp("texts") / "files"
    folder.mkdir()
    for number in range(40):
        words = " ".join(f"line {line} of {number}" for line in range(20))
        (folder / f"{number}.txt").write_text(words)
    return folder


def run_stage(folder: Path, texts: Path, *overrides: str) -> dict:
    """Runs the stage `extend` on a tiny student, or goes on with it, in this process."""
    launch.register_resolvers()
    settings = [
        *("experiment=quickstart", "debug=fast", "data=files", f"data.sources.text.paths=[{texts}]"),
        *("stages=[extend]", "stage.extend.tokens=1250", f"stage.extend.curriculum={ROWS}"),
        *(f"stage.extend.accumulate={ACCUMULATE}", "stage.extend.schedule=cosine", "data.repeated_share=0.3"),
        *("stage.extend.learning_rate={mixers: 1e-2, rest: 1e-2}", "data.sources.text.validation_share=0.3"),
        *("data.workers=0", "callbacks.checkpoint.every_steps=1", "callbacks.checkpoint.keep=9"),
        *("stage.extend.log_every_steps=2", "stage.extend.optimizer.weight_decay=0.1"),
        *(f"callbacks.{name}=null" for name in QUIET),
        *(f"paths.run_folder={folder}", f"paths.cache={texts.parent}", "trainer.accelerator=cpu"),
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        config = compose("train", overrides=[*settings, *overrides])
    launch.check(config)
    tokenizer = launch.build(config.tokenizer, "tokenizer")
    torch.manual_seed(1)
    student = expanded_student(len(tokenizer))
    table, config_stage = MetricsCsv(run_folder=folder), build_stage(config, "extend")
    options = {"run_folder": folder, "tokens_before": 1000}
    facts = train_stage(config, config_stage, student, None, tokenizer, [table], **options)
    left = {mixer.dense for mixer in student_mixers(student).values()}
    return {**facts, "student": student.state_dict(), "rows": written(folder), "left_dense": left}


def written(folder: Path) -> list[tuple[str, ...]]:
    """metrics.csv, without what measures time."""
    with (folder / "metrics.csv").open() as file:
        return [tuple(row) for row in csv.reader(file) if not row[3].startswith("throughput/")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> dict:
    """An uninterrupted stage."""
    Watch.seen.clear()
    return run_stage(tmp_path_factory.mktemp("whole"), texts, f"+callbacks.watch._target_={__name__}.Watch")


def test_a_stage_follows_its_table(whole: dict):
    assert whole["tokens"] == USED[-1]
    by_step = {int(row[1]): int(row[2]) for row in whole["rows"][1:]}
    logged = (0, 2, 3, 4, 6, 8)  # every second step, and the switches
    assert by_step == {step: 1000 + USED[step] for step in logged}
    for place, name in enumerate(("row_length", "rows_per_device", "dense_attention")):
        said = [(int(row[1]), float(row[4])) for row in whole["rows"] if row[3] == f"extend/{name}"]
        assert said == [(step, values[place]) for step, values in SWITCHES.items()]  # each once


def test_frozen_groups_stay_as_they_are_and_then_move(whole: dict):
    for step in range(8):
        trained = TRAINED[max(first for first in TRAINED if first <= step)]
        before, after = Watch.seen[step], Watch.seen[step + 1]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == trained, step
        assert Watch.dense[step] == {bool(SWITCHES[max(s for s in SWITCHES if s <= step)][2])}


def test_a_student_is_left_as_it_will_be_used(whole: dict):
    assert whole["left_dense"] == {False}


def test_held_out_loss_along_rows_of_the_last_length_is_kept(whole: dict):
    found = whole["longer_rows"]
    ends, means = zip(*found["by_position"], strict=True)
    assert found["row_length"] == 64 and ends == tuple(range(4, 65, 4))
    assert found["loss"] == pytest.approx(sum(means) / 16, rel=0.05)  # first labels of documents are missing
    assert 0 < min(means) <= found["loss"] <= max(means)


def test_a_resume_may_divide_rows_over_more_processes_and_nothing_else(tmp_path: Path):
    def config(devices: int, rows: int, length: int = 16):
        entry = {"from_tokens": 0, "row_length": length, "rows_per_device": rows}
        parts = {"stages": ["extend"], "stage": {"extend": {"curriculum": [entry]}}}
        return OmegaConf.create({**parts, "trainer": {"devices": devices, "num_nodes": 1}})

    save_config(config(1, 4), tmp_path)
    save_config(config(2, 2), tmp_path)
    for other in (config(2, 4), config(1, 4, length=32)):
        with pytest.raises(ValueError, match=r"these keys differ: stage\.extend\.curriculum\."):
            save_config(other, tmp_path)


# The first phase freezes all but the mixers, the last one the mixers.
FREEZING = (
    "stage.extend.curriculum=[{{from_tokens:0,row_length:16,rows_per_device:{0},learning_rate:{{rest:0}}}},"
    "{{from_tokens:150,row_length:32,rows_per_device:{1}}},"
    "{{from_tokens:1200,row_length:32,rows_per_device:{1},learning_rate:{{mixers:0,inserted:0,index:0}}}}]"
)


@pytest.mark.slow  # three runs of train.py
@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_change_phases_like_one_and_may_become_one(strategy, step, texts, tmp_path):
    given = [
        *("stages=[extend]", "stage.extend.tokens=2000", "data=files", f"data.sources.text.paths=[{texts}]"),
        *("data.sources.text.validation_share=0.3", "data.copy_passage_length=64"),
        *("callbacks.text_samples=null", "trainer.accelerator=cpu"),
        *("evaluation.decoding_contexts=[]", "callbacks.checkpoint.every_steps=1"),
        "stage.extend.optimizer.weight_decay=0.1",
    ]
    one = [*given, FREEZING.format(4, 8), "data.rows_per_device=4"]
    two = [
        *given,
        FREEZING.format(2, 4),
        "data.rows_per_device=2",
        "trainer.devices=2",
        f"strategy={strategy}",
    ]
    kill = (
        f"+callbacks.kill={{_target_: test_curriculum_runs.KillAt, step: {step}, batch: {step % ACCUMULATE}}}"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = runs.train(whole, texts.parent, *one)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("preheat ends") == 1
    assert runs.train(broken, texts.parent, *two, kill, python_path="tests").returncode != 0
    last = {1: two, 4: [*one, "strategy=fsdp"] if strategy == "fsdp" else one, 6: two}[step]
    done = runs.train(broken, texts.parent, *last, "ckpt_path=auto")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "goes on from" in done.stdout
    expected, found = (runs.losses(runs.run_folder(folder)) for folder in (whole, broken))
    expected, found = (
        {key: value for key, value in each.items() if key[2] != "extend/rows_per_device"}
        for each in (expected, found)
    )
    assert found.keys() == expected.keys()
    assert all(float(found[key]) == pytest.approx(float(expected[key]), rel=1e-5) for key in expected)


# Before, at and after a switch, between the batches of a step, and in the last step.
@pytest.mark.parametrize(
    ("step", "batch", "workers"),
    [(2, 0, 0), (3, 0, 0), (3, 1, 2), (4, 0, 0), (5, 1, 0), (6, 0, 2), (7, 1, 0)],
)
def test_a_kill_leaves_no_trace(step, batch, workers, whole, texts, tmp_path, caplog):
    kill = f"+callbacks.kill={{_target_: {__name__}.KillAt, step: {step}, batch: {batch}}}"
    with pytest.raises(RuntimeError, match="killed"):
        run_stage(tmp_path, texts, kill, f"data.workers={workers}")
    assert (tmp_path / "checkpoints" / "extend" / f"step-{step}.ckpt").exists()
    with caplog.at_level(logging.INFO):
        resumed = run_stage(tmp_path, texts, f"data.workers={workers}")
    assert "goes on from" in caplog.text
    assert resumed["rows"] == whole["rows"] and resumed["tokens"] == whole["tokens"]
    for name, tensor in whole["student"].items():
        assert torch.equal(resumed["student"][name], tensor), name
