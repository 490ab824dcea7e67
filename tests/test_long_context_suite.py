"""The evaluation suite `long_context`: exact maps, buckets of positions, recall, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from evaluations import BUNDLED, TEXT, composed, evaluation
from tiny import tiny_teacher

from conf.launch import build
from data.mqar import Mqar
from data.tokenizer import symbol_tokenizer
from pipeline.long_context_mqar import RecallCurves
from pipeline.long_context_parts import Place, mean_of
from pipeline.long_context_positions import bucket_ends, in_buckets
from reports.long_context_plot import loss_by_bucket, recall_by_pairs

LENGTHS, DEPTHS = (96, 160), (0.0, 0.4, 1.0)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder and the facts of an evaluation of the bundled teacher, beside itself."""
    folder = tmp_path_factory.mktemp("long_context")
    for number in range(30):
        (folder / f"{number}.txt").write_text(TEXT * 20 + f"# {number}\n")
    code = r"suite.needles.tasks.{}.template='\n{{key}} = {{value}}\n'"
    done = evaluation(
        f"model={BUNDLED}",
        f"teacher_folder={BUNDLED}",
        "suite=long_context",
        "suite.needles.names=[niah_2]",
        code.format("niah_2"),
        "suite.needles.tasks.niah_2.values=letters",
        "suite.needles.tasks.niah_2.value_length=4",
        f"suite.needles.row_lengths={list(LENGTHS)}".replace(" ", ""),
        f"suite.needles.depths={list(DEPTHS)}".replace(" ", ""),
        "suite.needles.rows=4",
        "suite.prefill_chunk=50",
        "suite.copies.row_lengths=[60,90]",
        "suite.copies.passage_length=24",
        "suite.copies.rows=3",
        "suite.positions.row_length=300",
        "suite.positions.rows=3",
        "suite.mqar.row_lengths=[48]",
        "suite.mqar.pairs=[2,4,64]",
        "suite.mqar.rows=3",
        "data=files",
        f"data.sources.text.paths=[{folder}]",
        "data.sources.text.validation_share=0.3",
        f"paths.outputs={folder}",
        f"paths.cache={folder / 'cache'}",
    )
    assert done.returncode == 0, done.stderr
    (output,) = folder.glob("eval/*/eval.json")
    return output.parent, json.loads(output.read_text())


def test_every_cell_of_a_map_is_measured_at_its_length_and_depth(evaluated):
    folder, facts = evaluated
    for who in ("model", "teacher"):
        cells = facts["niah_2"][who]
        assert [(c["row_length"], c["depth"]) for c in cells] == [(n, d) for n in LENGTHS for d in DEPTHS]
        assert all(cell["rows"] == 4 for cell in cells)
    for length in LENGTHS:
        cells = [cell["mean"] for cell in facts["niah_2"]["model"] if cell["row_length"] == length]
        assert facts["figures"][f"niah_2_{length}"] == pytest.approx(sum(cells) / len(cells))
    assert facts["figures"] == facts["teacher_figures"]  # the same model on the same rows
    assert facts["figures"]["niah_2_96"] > 0.5  # an untrained model has 0
    page = (folder / "eval.md").read_text()
    assert "niah_2, 160 tokens (12 rows)" in page and "±" in page and "plots/niah_2.png" in page
    assert (folder / "plots" / "niah_2.png").stat().st_size > 0


def test_loss_is_told_by_buckets_of_positions(evaluated):
    folder, facts = evaluated
    buckets = facts["loss_by_position"]["model"]
    assert [bucket["to"] for bucket in buckets] == [128, 256, 300]
    for bucket in buckets:
        assert bucket["rows"] == 3 and 0 < bucket["mean"] < 8 and bucket["error"] is not None
        assert facts["figures"][f"loss_to_{bucket['to']}"] == bucket["mean"]
    assert buckets[1]["mean"] < buckets[0]["mean"]  # the text repeats itself
    assert (folder / "plots" / "loss_by_position.png").stat().st_size > 0


def test_copies_are_measured_at_each_length(evaluated):
    folder, facts = evaluated
    cells = facts["copies"]["model"]
    assert [(cell["row_length"], cell["rows"]) for cell in cells] == [(60, 3), (90, 3)]
    assert all(cell["mean"] > 0 and cell["cache_bytes"] > 0 for cell in cells)
    assert all(c["loss_other"] - c["loss_shown"] == pytest.approx(c["mean"]) for c in cells)
    assert cells[1]["cache_bytes"] == 1.5 * cells[0]["cache_bytes"], "attention keeps every token"
    assert facts["figures"]["copy_gain_60"] == cells[0]["mean"] == facts["teacher_figures"]["copy_gain_60"]
    assert "copy gain, 90 tokens (3 rows)" in (folder / "eval.md").read_text()
    assert (folder / "plots" / "copies.png").stat().st_size > 0


def test_recall_is_measured_where_rows_have_room(evaluated):
    folder, facts = evaluated
    assert [(cell["row_length"], cell["pairs"]) for cell in facts["mqar"]["teacher"]] == [(48, 2), (48, 4)]
    assert (folder / "plots" / "mqar.png").stat().st_size > 0


def test_buckets_double_and_hold_the_mean_of_their_tokens():
    assert bucket_ends(100) == [100] and bucket_ends(128) == [128]
    assert bucket_ends(1000) == [128, 256, 512, 1000]
    losses = torch.arange(300.0)
    losses[128:256] = math.nan
    losses[0] = math.nan
    first, missing, last = in_buckets(losses, [128, 256, 300])
    assert first == sum(range(128)) / 127 and math.isnan(missing) and last == sum(range(256, 300)) / 44


def test_a_standard_error_is_that_of_the_mean():
    mean, error, rows = mean_of([0.0, 1.0, 1.0, 1.0])
    assert (mean, rows) == (0.75, 4) and error == pytest.approx(0.25)
    assert mean_of([1.0]) == (1.0, None, 1)


def test_recall_counts_what_a_model_finds(tmp_path: Path, monkeypatch):
    """Half of the values right in every row gives one half, without spread."""
    from models.retrieval import Answered
    from pipeline import long_context_parts

    asked = []

    def half(model, batches, chunk):
        asked.extend((tuple(batch["input_ids"].shape), chunk) for batch in batches)
        return [Answered(int(row), int(row) // 2) for b in batches for row in (b["labels"] >= 0).sum(1)]

    monkeypatch.setattr(long_context_parts, "generated_answers", half)
    part = RecallCurves(task=Mqar(fillers=4), row_lengths=[24, 40], pairs=[2, 8], rows=5, rows_per_batch=3)
    subject = type("One", (), {"tokenizer": symbol_tokenizer(60)})
    found = part.run(Place(subject, {"model": tiny_teacher()}, {}, 7, tmp_path))
    assert asked == [((rows, length), 7) for length in (24, 40, 40) for rows in (3, 2)]
    assert [(figure.name, figure.value, figure.error) for figure in found.figures] == [
        (f"mqar_{cell}", 0.5, 0.0) for cell in ("24_2", "40_2", "40_8")
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("suite.parts=[]", "suite.parts: is empty; choose from needles, copies, positions, mqar"),
        ("suite.copies.rows=0", "suite.copies.rows=0"),
        ("suite.copies.row_lengths=[]", "suite.copies.row_lengths is empty"),
        ("suite.copies.row_lengths=[511]", "suite.copies.row_lengths: rows of 511 tokens have no room"),
        ("suite.copies.passage_length=1", "suite.copies.row_lengths.*fewer than 2 tokens"),
        ("suite.parts=[needle]", "suite.parts: 'needle' is unknown"),
        ("suite.prefill_chunk=0", "suite.prefill_chunk=0"),
        ("suite.needles.rows=0", "suite.needles.rows=0"),
        ("suite.needles.names=[]", "suite.needles.names: is empty; choose from .*facts"),
        ("suite.needles.names=[needle]", "suite.needles.names: 'needle' is unknown"),
        ("suite.needles.depths=[]", "suite.needles.depths is empty"),
        ("suite.needles.depths=[0.5,0.2]", "suite.needles.depths=.* must ascend"),
        ("suite.needles.depths=[0,1.5]", "depth=1.5"),
        ("suite.needles.row_lengths=[64]", "suite.needles.row_lengths=64 is too short"),
        ("suite.needles.tasks.niah_1.keys=names", "suite.needles.tasks.niah_1.*keys='names'"),
        ("suite.positions.row_length=0", "suite.positions.row_length=0"),
        ("suite.mqar.pairs=[200]", "suite.mqar.pairs: 200 pairs do not fit"),
        ("suite.mqar.rows_per_batch=0", "suite.mqar.rows_per_batch=0"),
    ],
)
def test_bad_suites_are_refused_before_any_weight(override, words):
    config = composed("suite=long_context", "model=nowhere", override)
    with pytest.raises(ValueError, match=words):
        build(config.suite, "suite")


def test_a_part_that_is_not_measured_is_not_looked_at():
    config = composed("suite=long_context", "model=nowhere", "suite.parts=[mqar]", "suite.needles.rows=0")
    build(config.suite, "suite")


def test_a_vocabulary_that_is_too_small_is_refused_before_any_weight(tmp_path: Path):
    suite = build(composed("suite=long_context", "model=nowhere", "suite.parts=[mqar]").suite, "suite")
    subject = type("One", (), {"tokenizer": symbol_tokenizer(70)})
    with pytest.raises(ValueError, match="vocabulary of 70 tokens with 64 fillers has 2 of each"):
        suite.run(subject, None, tmp_path)


def test_pictures_can_be_drawn_with_gaps_and_for_one_model(tmp_path: Path):
    for who in (("model",), ("model", "teacher")):
        path = loss_by_bucket(
            tmp_path / f"loss{len(who)}.png",
            ends=[128, 256],
            losses=dict.fromkeys(who, [3.0, math.nan]),
            errors=dict.fromkeys(who, [0.1, None]),
        )
        assert path.stat().st_size > 0
        curves = {64: [1.0, None], 4096: [0.5, 0.0]}
        path = recall_by_pairs(tmp_path / f"r{len(who)}.png", pairs=[4, 8], shares=dict.fromkeys(who, curves))
        assert path.stat().st_size > 0
