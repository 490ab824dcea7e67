"""Multi-query associative recall: what rows hold, that they resume exactly, and a run from scratch."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
from test_datamodule import attach, equal

from data.mqar import HELD_OUT, TRAINING, Load, Mqar, MqarDataModule, MqarRows
from data.packing import IGNORED
from data.row_module import BatchShape
from data.tokenizer import symbol_tokenizer

SIZE, FILLERS = 150, 9  # ids; 9 fillers, 70 keys, 70 values
KEYS, VALUES = range(10, 80), range(80, 150)
PLACES = [
    Mqar(fillers=FILLERS),
    Mqar(fillers=FILLERS, first_part=0.25),
    Mqar(fillers=FILLERS, distances="power_law"),
    Mqar(fillers=FILLERS, placement="interleaved"),
]


def rows_of(task: Mqar, pairs: int = 8, length: int = 96, seed: int = 1, stream: int = TRAINING) -> MqarRows:
    return MqarRows(task, SIZE, Load(0.0, {length: pairs}), length, seed, stream)


def module(**changes) -> MqarDataModule:
    options = {
        "tokenizer": symbol_tokenizer(SIZE),
        "task": Mqar(fillers=FILLERS),
        "pair_density": 0.125,
        "pairs_per_row": {},
        "row_length": 32,
        "rows_per_device": 3,
        "validation_rows": 8,
        "repeat_first_rows": 0,
        "workers": 0,
        "seed": 1,
    }
    return MqarDataModule(**{**options, **changes})


@pytest.mark.parametrize("task", PLACES, ids=["halves", "quarter", "power_law", "interleaved"])
@pytest.mark.parametrize("pairs", [1, 8, 12])
def test_every_query_asks_for_a_value_that_stands_before_it(task: Mqar, pairs: int):
    rows = rows_of(task, pairs)
    for index in range(20):
        ids, labels, documents = rows.row(index)
        assert ids.shape == labels.shape == documents.shape == (96,) and not documents.any()
        assert ids.dtype == labels.dtype == np.int64 and documents.dtype == np.int32
        asked = np.flatnonzero(labels != IGNORED)
        stored = [place for place in range(95) if ids[place + 1] in VALUES]
        assert len(asked) == len(stored) == pairs
        memory = {ids[place]: ids[place + 1] for place in stored}
        assert len(memory) == len(set(memory.values())) == pairs  # no key twice, no value twice
        assert {ids[place]: labels[place] for place in asked} == memory
        for place in asked:
            assert list(ids).index(ids[place]) < place and labels[place] not in ids[place + 1 :]
        others = np.delete(ids, [*stored, *(place + 1 for place in stored), *asked])
        assert ((others >= 1) & (others <= FILLERS)).all() and len(others) == 96 - 3 * pairs
        assert all(key in KEYS for key in memory)
        if task.placement == "first_part":
            assert max(stored) + 1 < 96 * task.first_part <= min(asked)


def test_interleaved_queries_stand_among_pairs():
    ids, labels, _ = rows_of(PLACES[3]).row(0)
    stored = [place for place in range(95) if ids[place + 1] in VALUES]
    assert np.flatnonzero(labels != IGNORED).min() < max(stored)


def test_places_are_uniform_and_the_power_law_prefers_near_ones():
    """Every place of a part is as likely as any other; by the law the first places of the rest are chosen."""
    places = {}
    for name, task in (("uniform", PLACES[0]), ("power_law", PLACES[2])):
        labels = np.stack([rows_of(task, 4, 64).row(index).labels for index in range(600)])
        places[name] = (labels != IGNORED).sum(0)[32:]
    assert places["uniform"].sum() == places["power_law"].sum() == 2400
    assert places["uniform"].min() > 40 and places["uniform"].max() < 115  # 75 each, on average
    assert places["power_law"][:4].sum() > 1000 > places["power_law"][16:].sum()
    ids = np.stack([rows_of(PLACES[0], 4, 64).row(index).input_ids for index in range(600)])
    keys = np.isin(ids[:, :32], KEYS).sum(0)
    # A pair may begin at any of the first 31 places; its neighbours crowd it a little less at the ends.
    assert keys[31] == 0 and keys[:31].min() > 50 and keys[:31].max() < 130


def test_rows_depend_on_stream_seed_and_index_alone():
    def row(seed: int, index: int, stream: int = TRAINING) -> bytes:
        return rows_of(PLACES[0], seed=seed, stream=stream).row(index).input_ids.tobytes()

    assert row(1, 5) == row(1, 5)
    found = {row(seed, i, stream) for seed in (0, 1) for i in range(50) for stream in (TRAINING, HELD_OUT)}
    assert len(found) == 200  # rows that are held out are no training rows, of seed 0 either


def test_held_out_rows_are_the_same_for_every_run():
    batches = [module(seed=seed).validation_batches() for seed in (0, 1)]
    assert equal(*batches) and [len(batch["input_ids"]) for batch in batches[0]] == [3, 3, 2]
    trained = {tuple(module(seed=0).train_rows().row(index).input_ids) for index in range(100)}
    assert not trained & {tuple(row) for batch in batches[0] for row in batch["input_ids"].tolist()}


def loader(world_size: int = 1, rank: int = 0, **changes):
    data = attach(module(**changes), rank=rank, world_size=world_size, max_steps=6)
    data.train_on([BatchShape(2, 32, 4), BatchShape(3, 64, 2), BatchShape(1, 32, 2)])
    return data.train_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_exactly_within_and_between_lengths(workers: int):
    whole = list(loader())
    assert [tuple(batch["input_ids"].shape) for batch in whole] == [(4, 32)] * 2 + [(2, 64)] * 3 + [(2, 32)]
    counts = [[int(n) for n in (batch["labels"] != IGNORED).sum(1)] for batch in whole]
    assert counts == [[4] * 4] * 2 + [[8] * 2] * 3 + [[4] * 2]  # pairs follow the length
    drawn = {tuple(row) for batch in whole for row in batch["input_ids"].tolist()}
    assert len(drawn) == 16  # no row comes twice
    for done in (1, 2, 3, 5):
        first, second = loader(), loader(workers=workers)
        batches = iter(first)
        for _ in range(done):
            next(batches)
        second.load_state_dict(first.state_dict())
        assert equal(list(second), whole[done:])


def test_two_ranks_share_what_one_reads():
    halves = [list(loader(2, rank)) for rank in (0, 1)]
    rows = {tuple(row) for half in halves for batch in half for row in batch["input_ids"].tolist()}
    assert len(rows) == 32


def test_pairs_follow_the_density_or_the_table():
    data = module(pairs_per_row={64: 5})
    assert [data.load.pairs(length) for length in (4, 32, 64, 65)] == [1, 4, 5, 8]
    first, second = data.train_rows(32).split(10, 64)
    assert (first.row(0).labels != IGNORED).sum() == 4 and (second.row(0).labels != IGNORED).sum() == 5
    assert pickle.loads(pickle.dumps(second)).row(3).labels.tolist() == second.row(3).labels.tolist()
    repeated = module(repeat_first_rows=2).train_rows()
    assert np.array_equal(repeated.row(0).input_ids, repeated.row(2).input_ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"placement": "last"}, "placement='last' is unknown; choose one of first_part, interleaved"),
        ({"distances": "far"}, "distances='far'"),
        ({"fillers": 0}, "fillers=0"),
        ({"first_part": 1.0}, "first_part=1.0"),
        ({"power": 0.0}, "power=0.0"),
        ({"placement": "interleaved", "distances": "power_law"}, "has no effect"),
    ],
)
def test_bad_tasks_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Mqar(**options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pair_density": 0.0}, r"data\.pair_density=0\.0 must lie between 0 and 1"),
        ({"pair_density": 0.3}, r"data\.pair_density=0\.3: 10 pairs do not fit rows of 32 tokens, .* 1 to 8"),
        ({"pairs_per_row": {32: 9}}, r"data\.pairs_per_row\[32\]: 9 pairs do not fit"),
        ({"tokenizer": symbol_tokenizer(15)}, r"a vocabulary of 15 tokens with 9 fillers has 2 of each"),
        ({"row_length": 0}, r"data\.row_length=0 must be at least 1"),
        ({"workers": -1}, r"data\.workers=-1 must be 0 or more"),
    ],
)
def test_a_bad_value_is_refused_by_its_key(changes, words):
    with pytest.raises(ValueError, match=words):
        module(**changes)


def test_the_most_pairs_fill_a_row():
    for task in PLACES:
        most = task.most_pairs(96)
        row = rows_of(task, most).row(0)
        assert (row.labels != IGNORED).sum() == most
        with pytest.raises(ValueError, match="do not fit"):
            task.check(96, most + 1, "key")


def test_stages_that_need_text_are_refused():
    for call in (lambda: module().calibration_batches(2), lambda: module().retrieval_batches(None, 2)):
        with pytest.raises(ValueError, match="data=mqar has no text"):
            call()
    assert module().copy_batches() == []


def test_symbols_are_a_tokenizer(tmp_path: Path):
    tokenizer = symbol_tokenizer(12)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == 12
    assert again("<3> <11> word")["input_ids"] == [3, 11, 0] and again.decode([3, 11]) == "<3> <11>"
    with pytest.raises(ValueError, match="tokenizer.vocabulary_size=1"):
        symbol_tokenizer(1)


SMALL = (
    "experiment=mqar",
    "tokenizer.vocabulary_size=105",
    "data.task.fillers=8",
    "data.row_length=32",
    "data.rows_per_device=4",
    "data.validation_rows=6",
    "student.parent.hidden_size=32",
    "student.parent.num_hidden_layers=2",
    "student.parent.num_attention_heads=1",
    "student.parent.num_key_value_heads=1",
    "student.parent.intermediate_size=32",
    "student.layer_plan.mixer=[rwkv7,sparse]",
    "stage.pretrain.tokens=2048",
    "stage.pretrain.warmup_steps=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from scratch: RWKV-7 below sparse attention, 16 steps."""
    outputs = tmp_path_factory.mktemp("mqar")
    folders = (f"paths.outputs={outputs}", f"paths.cache={outputs / 'cache'}")
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, *folders],
        cwd=runs.REPOSITORY,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return runs.run_folder(outputs)


def test_a_run_from_scratch_leaves_a_student_and_its_accuracy(run: Path):
    summary = runs.summary(run)
    (stage,) = summary["stages"]
    assert stage["tokens"] == 2048 and stage["copy_gain"] is None and summary["teacher"] is None
    assert 0 <= stage["accuracy"] <= 1 and stage["accuracy"] * 12 == pytest.approx(
        round(stage["accuracy"] * 12)
    )
    assert summary["student"]["layer_plan"] == ["rwkv7", "sparse"]
    assert json.loads((run / "student" / "student.json").read_text())["layer_plan"] == ["rwkv7", "sparse"]
    assert "of the values asked for are right" in (run / "report.md").read_text()


def test_the_suite_measures_the_run_beyond_its_load_and_length(run: Path):
    from evaluations import evaluation

    outputs = run.parent / "evaluated"
    done = evaluation(
        f"model={run}",
        "suite=long_context",
        "suite.parts=[mqar]",
        "suite.mqar.task.fillers=8",
        "suite.mqar.row_lengths=[32,64]",
        "suite.mqar.pairs=[2,8,16]",
        "suite.mqar.rows=3",
        f"paths.outputs={outputs}",
    )
    assert done.returncode == 0, done.stderr
    (found,) = outputs.glob("eval/*/eval.json")
    facts = json.loads(found.read_text())
    assert list(facts["figures"]) == ["mqar_32_2", "mqar_32_8", "mqar_64_2", "mqar_64_8", "mqar_64_16"]
    cells = facts["mqar"]["model"]
    assert all(cell["rows"] == 3 and 0 <= cell["mean"] <= 1 and cell["error"] is not None for cell in cells)
    assert (found.parent / "plots" / "mqar.png").stat().st_size > 0
