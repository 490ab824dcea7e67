"""A table of row lengths: steps, rates, text and every figure follow it, and no kill can tell."""

import csv
import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from data_inputs import store_of
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from runs import REPOSITORY
from test_loader import Numbered, indices, taken
from test_stage import FINAL, PEAK, stage
from tiny import tiny_student, tiny_teacher

from callbacks.metrics_csv import MetricsCsv
from conf import launch
from conf.run_folder import save_config
from conf.stages import build_stage
from data.loader import Segment, StatefulLoader
from data.packing import FirstRows, MixedRows, PackedRows, RepeatedPassages, passage_range
from models.timeline import Timeline
from pipeline.training import batch_shapes, train_stage


def table(*entries: tuple[int, int, int]) -> list[dict[str, int]]:
    names = ("from_tokens", "row_length", "rows_per_device")
    return [dict(zip(names, entry, strict=True)) for entry in entries]


THREE = table((0, 16, 2), (200, 32, 1), (500, 16, 8))


def timeline(entries=THREE, devices: int = 1, **changes) -> Timeline:
    config = stage(row_lengths=entries, **changes)
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
    config = stage(schedule=schedule, warmup_steps=warmup, row_lengths=entries)
    uneven = config.timeline(row_length=1, rows_per_device=1, devices=1)
    flat = dataclasses.replace(config, row_lengths=table((0, 10, 1)))
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
        ({"row_lengths": table((5, 16, 2))}, ["row_lengths[0].from_tokens=5 must be 0"]),
        (
            {"row_lengths": table((0, 16, 2), (9, 8, 1), (9, 4, 1))},
            ["[2].from_tokens=9", "the 9 of", "order"],
        ),
        ({"row_lengths": table((0, 16, 2), (1000, 8, 1))}, ["[1].from_tokens=1000", "1000 tokens", "remove"]),
        ({"row_lengths": table((0, 1, 2))}, ["row_lengths[0].row_length=1 must be at least 2"]),
        ({"row_lengths": table((0, 4, 0))}, ["row_lengths[0].rows_per_device=0 must be at least 1"]),
        (
            {"row_lengths": [{"from_tokens": 0}]},
            ["row_lengths[0]", "from_tokens, row_length, rows_per_device"],
        ),
        ({"row_lengths": [16]}, ["row_lengths[0]=16 needs exactly the keys"]),
        ({"row_lengths": None}, ["stage.distill.row_lengths=None must be a list"]),
        ({"row_lengths": THREE, "data": {"row_length": 9}}, ["data.row_length=9 contradicts", "=[]"]),
        ({"row_lengths": THREE, "data": {"rows_per_device": 9}}, ["data.rows_per_device=9 contradicts"]),
        ({"row_lengths": table((0, 16, 2), (900, 101, 1))}, ["[1] gets no", "101 tokens", "tokens=1000"]),
        ({"row_lengths": table((0, 300, 1), (10, 4, 1), (20, 4, 1))}, ["[1] gets no", "[2].from_tokens=20"]),
        ({"row_lengths": table((0, 1001, 1))}, ["tokens=1000 is less than one optimiser step of 1001"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_contradictory_tables_are_refused(changes: dict, words: list[str]):
    with pytest.raises(ValueError) as error:
        stage(**changes).timeline(row_length=1, rows_per_device=1, devices=1)
    assert all(word in str(error.value) for word in words), str(error.value)


# --- text ---------------------------------------------------------------------------------------------------


def numbers(rows, count: int) -> np.ndarray:
    """Every token of the first rows; `store_of` numbers its tokens."""
    return np.concatenate([rows.row(index).input_ids for index in range(count)])


@pytest.mark.parametrize("lengths", [(4, 8, 16), (16, 3, 5), (7, 7, 2)])
@pytest.mark.parametrize("seed", [None, 1])
def test_no_text_comes_twice_within_an_epoch_of_several_lengths(lengths, seed):
    store, counts, seen = store_of([9, 30, 1, 25, 60, 3, 100]), (5, 4, 3), []  # 228 tokens
    rest = PackedRows(store, lengths[0], seed)
    for index, count in enumerate(counts):
        rows, rest = rest.split(count, lengths[(index + 1) % 3])
        seen.append(numbers(rows, count))
        assert len(seen[-1]) == count * lengths[index]
    flat = np.concatenate(seen)
    assert len(set(flat.tolist())) == len(flat) < 227
    if seed is None:
        np.testing.assert_array_equal(flat, np.arange(len(flat)))
    left = rest.rows_per_epoch and (227 - len(flat)) // lengths[0]
    more = numbers(rest, left)  # to the end of the epoch
    assert not set(more.tolist()) & set(flat.tolist())
    assert len(more) > 227 - len(flat) - lengths[0]


def test_rows_go_on_into_further_epochs():
    store = store_of([10, 11])  # an epoch has 5 rows of 4 tokens, or 2 of 10
    rows, rest = PackedRows(store, 4, 1).split(13, 10)
    for epoch in range(2):
        part = np.concatenate([rows.row(5 * epoch + index).input_ids for index in range(5)])
        assert len(set(part.tolist())) == 20
    assert len(set(numbers(rows, 13)[40:].tolist())) == 12
    whole = PackedRows(store, 10, 1)  # 8 tokens of the third epoch are left, too few for a row of 10
    for index in range(5):
        np.testing.assert_array_equal(rest.row(index).input_ids, whole.row(6 + index).input_ids)
    _, same = rest.split(0, 10)
    np.testing.assert_array_equal(same.row(3).input_ids, rest.row(3).input_ids)


def test_mixtures_split_each_part_where_it_stands():
    store = store_of([400, 300])
    parts = [PackedRows(store, 8, 1), RepeatedPassages(store, 8, passage_range(8), 1)]
    rows, rest = MixedRows(parts, [3.0, 1.0]).split(10, 16)
    packed = [row for row in (rows.row(i) for i in range(10)) if len(set(row.input_ids.tolist())) == 8]
    after = [row for row in (rest.row(i) for i in range(10)) if len(set(row.input_ids.tolist())) == 16]
    assert len(packed) == rows._drawn(0, 10) and len(after) == rest._drawn(0, 10)
    before = {int(token) for row in packed for token in row.input_ids}
    assert before and not before & {int(token) for row in after for token in row.input_ids}
    draws = [rest.parts[1].row(index).input_ids for index in range(2)]
    again = RepeatedPassages(store, 16, passage_range(16), 1)
    for index, draw in enumerate(draws):
        np.testing.assert_array_equal(draw, again.row(rows._drawn(1, 10) + index).input_ids)


def test_the_first_rows_of_each_length_are_repeated():
    rows, rest = FirstRows(PackedRows(store_of([200]), 4, 1), 2).split(50, 8)
    for part in (rows, rest):
        np.testing.assert_array_equal(part.row(0).input_ids, part.row(2).input_ids)
    assert rest.row(1).input_ids.shape == (8,)


# --- the loader ---------------------------------------------------------------------------------------------


def loader(rank: int = 0, world_size: int = 1, workers: int = 0) -> StatefulLoader:
    """3, 2 and 2 batches of 4, 2 and 6 rows in all."""
    shapes = ((4, 3), (2, 2), (6, 2))
    segments = [Segment(Numbered(), rows // world_size, batches) for rows, batches in shapes]
    return StatefulLoader(segments, rank=rank, world_size=world_size, workers=workers)


WHOLE = [
    *([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]),
    *([0, 1], [2, 3]),
    *([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]),
]
CONSUMED = [0, 4, 8, 12, 14, 16, 22, 28]


@pytest.mark.parametrize("stop", range(8))
def test_every_position_resumes_on_one_and_on_two_processes(stop: int):
    assert indices(loader()) == WHOLE and len(loader()) == 7
    interrupted = loader()
    assert indices(taken(interrupted, stop) if stop else []) == WHOLE[:stop]
    state = interrupted.state_dict()
    assert state == {"rows_consumed": CONSUMED[stop]}
    resumed = [loader(), loader(0, 2), loader(1, 2)]
    for one in resumed:
        one.load_state_dict(state)
    found, *pair = [indices(one) for one in resumed]
    assert found == WHOLE[stop:] == [sum(parts, []) for parts in zip(*pair, strict=True)]
    assert all(one.state_dict() == {"rows_consumed": 28} for one in resumed)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_what_workers_have_prefetched_across_a_switch_is_not_consumed(stop: int):
    interrupted = loader(workers=2)
    before = indices(taken(interrupted, stop))
    resumed = loader(workers=2)
    resumed.load_state_dict(interrupted.state_dict())
    assert before + indices(resumed) == WHOLE


def test_a_position_inside_a_later_batch_is_refused():
    with pytest.raises(ValueError, match="after 13 rows.* 2 rows per batch"):
        loader().load_state_dict({"rows_consumed": 13})


# --- whole stages -------------------------------------------------------------------------------------------


class KillAt(Callback):
    """Raises in a batch of an optimiser step, as a killed process would end it."""

    def __init__(self, step: int, batch: int):
        self.step, self.batch = step, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % ACCUMULATE == self.batch:
            raise RuntimeError("killed")


ACCUMULATE = 2
ROWS = "[{from_tokens:0,row_length:16,rows_per_device:2},{from_tokens:150,row_length:32,rows_per_device:4},"
ROWS += "{from_tokens:900,row_length:64,rows_per_device:1}]"
USED = [0, 64, 128, 192, 448, 704, 960, 1088, 1216]  # tokens after each step of the 1250 that there may be
SWITCHES = {0: 16, 3: 32, 6: 64}  # step -> row length from there on
QUIET = ("text_samples", "dashboard", "provenance", "progress", "stop_on_signal")


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
        *("stages=[extend]", "stage.extend.tokens=1250", f"stage.extend.row_lengths={ROWS}"),
        *(f"stage.extend.accumulate={ACCUMULATE}", "stage.extend.schedule=cosine", "data.repeated_share=0.3"),
        *("stage.extend.learning_rate={mixers: 1e-2, rest: 1e-2}", "data.sources.text.validation_share=0.3"),
        *("data.workers=0", "callbacks.checkpoint.every_steps=1", "callbacks.checkpoint.keep=9"),
        "stage.extend.log_every_steps=2",
        *(f"callbacks.{name}=null" for name in QUIET),
        *(f"paths.run_folder={folder}", f"paths.cache={texts.parent}", "trainer.accelerator=cpu"),
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        config = compose("train", overrides=[*settings, *overrides])
    launch.check(config)
    tokenizer = launch.build(config.tokenizer, "tokenizer")
    torch.manual_seed(1)
    student = tiny_student(tiny_teacher(vocab_size=len(tokenizer)), (1,))
    table, config_stage = MetricsCsv(run_folder=folder), build_stage(config, "extend")
    options = {"run_folder": folder, "tokens_before": 1000}
    facts = train_stage(config, config_stage, student, None, tokenizer, [table], **options)
    return {**facts, "student": student.state_dict(), "rows": written(folder)}


def written(folder: Path) -> list[tuple[str, ...]]:
    """metrics.csv, without what measures time."""
    with (folder / "metrics.csv").open() as file:
        return [tuple(row) for row in csv.reader(file) if not row[3].startswith("throughput/")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> dict:
    """An uninterrupted stage."""
    return run_stage(tmp_path_factory.mktemp("whole"), texts)


def test_a_stage_follows_its_table(whole: dict):
    assert whole["tokens"] == USED[-1]
    by_step = {int(row[1]): int(row[2]) for row in whole["rows"][1:]}
    logged = (0, 2, 3, 4, 6, 8)  # every second step, and the switches
    assert by_step == {step: 1000 + USED[step] for step in logged}
    switches = {int(r[1]): float(r[4]) for r in whole["rows"] if r[3] == "extend/row_length"}
    assert switches == SWITCHES


def test_held_out_loss_along_rows_of_the_last_length_is_kept(whole: dict):
    found = whole["longer_rows"]
    ends, means = zip(*found["by_position"], strict=True)
    assert found["row_length"] == 64 and ends == tuple(range(4, 65, 4))
    assert found["loss"] == pytest.approx(sum(means) / 16, rel=0.05)  # first labels of documents are missing
    assert 0 < min(means) <= found["loss"] <= max(means)


def test_a_resume_may_divide_rows_over_more_processes_and_nothing_else(tmp_path: Path):
    def config(devices: int, rows: int, length: int = 16):
        entry = {"from_tokens": 0, "row_length": length, "rows_per_device": rows}
        parts = {"stages": ["extend"], "stage": {"extend": {"row_lengths": [entry]}}}
        return OmegaConf.create({**parts, "trainer": {"devices": devices, "num_nodes": 1}})

    save_config(config(1, 4), tmp_path)
    save_config(config(2, 2), tmp_path)
    for other in (config(2, 4), config(1, 4, length=32)):
        with pytest.raises(ValueError, match=r"these keys differ: stage\.extend\.row_lengths\."):
            save_config(other, tmp_path)


@pytest.mark.slow  # three runs of train.py
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_change_rows_like_one_and_may_become_one(strategy: str, texts: Path, tmp_path: Path):
    rows = "stage.extend.row_lengths=[{from_tokens:0,row_length:16,rows_per_device:%d},"
    rows += "{from_tokens:150,row_length:32,rows_per_device:%d}]"
    given = [
        "stages=[extend]",
        "stage.extend.tokens=2000",
        "data=files",
        f"data.sources.text.paths=[{texts}]",
    ]
    given += [
        "data.sources.text.validation_share=0.3",
        "callbacks.text_samples=null",
        "trainer.accelerator=cpu",
    ]
    given += ["evaluation.decoding_contexts=[]", "callbacks.checkpoint.every_steps=1"]
    one = [*given, rows % (4, 8), "data.rows_per_device=4"]
    two = [*given, rows % (2, 4), "data.rows_per_device=2", "trainer.devices=2", f"strategy={strategy}"]
    kill = "+callbacks.kill={_target_: test_row_lengths.KillAt, step: 4, batch: 0}"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = runs.train(whole, texts.parent, *one)
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.train(broken, texts.parent, *two, kill, python_path="tests").returncode != 0
    last = [*one, "strategy=fsdp"] if strategy == "fsdp" else one
    done = runs.train(broken, texts.parent, *last, "ckpt_path=auto")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "goes on from" in done.stdout
    expected, found = (runs.losses(runs.run_folder(folder)) for folder in (whole, broken))
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
