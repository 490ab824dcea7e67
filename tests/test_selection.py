"""Which layers keep attention: every criterion, what a run writes down, and what is refused."""

import csv
import math
from pathlib import Path

import pytest
import runs
import torch
from hydra import compose, initialize_config_dir
from tiny import convert, packed_batch, random_ids, student_config, tiny_student, tiny_teacher
from torch import Tensor
from transformers import PreTrainedModel

from conf import launch
from data.retrieval import Needles
from models.align import aligned_layers
from models.architectures import attention_modules
from models.evaluation import evaluate
from models.layer_plan import read_plan_file
from models.layer_scores import CRITERIA, exchanged
from models.losses import ALIGNMENT_LOSSES, IGNORED
from models.selection import SelectLayers
from pipeline.selection import replaced_layers
from reports.plots import layer_scores
from reports.report import write_report

ROWS = [[9, 14, -3], [-4, 22]]
TASK = Needles()
QUIET = "evaluation.decoding_contexts=[]"


def select(by: str, **options) -> SelectLayers:
    return SelectLayers(name="select", by=by, task=TASK, **options)


def answers(length: int, rows: int = 2) -> dict[str, Tensor]:
    """Rows of which the last three tokens have labels, as retrieval rows have them."""
    ids = random_ids(rows, length + 1, seed=5)
    labels = ids[:, 1:].clone()
    labels[:, :-3] = IGNORED
    documents = torch.zeros_like(labels, dtype=torch.int32)
    return {"input_ids": ids[:, :-1], "labels": labels, "document_ids": documents}


def passages_twice(length: int, rows: int = 2) -> dict[str, Tensor]:
    ids = random_ids(rows, length).repeat(1, 2)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    return {"input_ids": ids, "labels": labels, "document_ids": torch.zeros_like(ids, dtype=torch.int32)}


def scoring() -> dict[str, list[dict[str, Tensor]]]:
    return {"plain": [packed_batch(ROWS)], "copies": [passages_twice(10)], "retrieval": [answers(20)]}


def hook_count(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def quiet_outer_layers() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher and its student, in both of which layers 0 and 2 hardly speak."""
    teacher = tiny_teacher()
    student = tiny_student(teacher, noise=0.0)
    with torch.no_grad():
        for index in (0, 2):
            for model, output in ((teacher, "o_proj"), (student, "output")):
                getattr(attention_modules(model)[index], output).weight.mul_(1e-3)
    return teacher, student


# --- criteria -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", list(CRITERIA))
def test_both_models_are_as_before(by):
    teacher, student = quiet_outer_layers()
    student.train()
    ids = random_ids(1, 10)
    weights = [{n: p.clone() for n, p in model.named_parameters()} for model in (teacher, student)]
    hooks = [hook_count(model) for model in (teacher, student)]
    logits = [model.eval()(ids).logits for model in (teacher, student)]
    student.train()
    scores = select(by).scores(student, teacher, [0, 1, 2], scoring())
    assert list(scores) == [0, 1, 2] and all(math.isfinite(score) for score in scores.values())
    assert all(module.training for module in student.modules())
    assert not any(module.training for module in teacher.modules())
    for model, before, wanted, hooked in zip((teacher, student), weights, logits, hooks, strict=True):
        assert torch.equal(model.eval()(ids).logits, wanted)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert hook_count(model) == hooked


def test_kl_restores_the_layer_that_speaks():
    teacher, student = quiet_outer_layers()
    scores = select("kl").scores(student, teacher, [0, 1, 2], scoring())
    assert select("kl").choose(scores) == [1] and scores[1] > 0
    whole = [evaluate(student, teacher, scoring()[kind]).means()["kl"] for kind in ("plain", "copies")]
    assert scores[1] < 1.01 * max(whole)


def test_recall_puts_the_one_mixer_into_the_teacher():
    teacher, student = quiet_outer_layers()
    scores = select("recall").scores(student, teacher, [0, 1, 2], scoring())
    assert max(abs(scores[0]), abs(scores[2])) < 0.1 * abs(scores[1])
    mixed, _ = convert(teacher, student_config((0, 2)))  # what stands in the student's layer 1
    attention_modules(mixed)[1].load_state_dict(attention_modules(student)[1].state_dict())
    losses = [evaluate(model, None, [answers(20)]).means()["loss"] for model in (mixed, teacher)]
    assert scores[1] == pytest.approx(losses[0] - losses[1], abs=1e-5)


def test_recall_of_a_student_with_the_teachers_attention_loses_nothing():
    teacher = tiny_teacher()
    student = tiny_student(teacher, (0, 1, 2), noise=0.0)
    assert list(select("recall").scores(student, teacher, [0, 1, 2], scoring()).values()) == [0.0] * 3


def test_alignment_is_the_error_of_stage_one():
    """On one batch it is the relative loss that `align` minimises; over batches, tokens count alike."""
    teacher = tiny_teacher()
    student = tiny_student(teacher, (1,), noise=0.05)
    batch = packed_batch([*ROWS, [26]])
    found = select("alignment").scores(student, teacher, [0, 2], {"plain": [batch]})
    wanted = aligned_layers(student, teacher, batch, ALIGNMENT_LOSSES["relative"]).layers
    assert found == pytest.approx({index: float(loss) for index, loss in wanted.items()}, rel=1e-4)
    assert min(found.values()) > 0.01
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(1), slice(1, 3))]
    again = select("alignment").scores(student, teacher, [0, 2], {"plain": parts})
    assert again == pytest.approx(found, rel=1e-4)


def test_uniform_keeps_the_last_layer_of_each_group():
    teacher, student = quiet_outer_layers()

    def kept(layers: list[int], keep: int) -> list[int]:
        stage = select("uniform", keep=keep)
        return stage.choose(stage.scores(student, teacher, layers, {}))

    assert kept(list(range(8)), 2) == [3, 7]
    assert kept(list(range(28)), 7) == [3, 7, 11, 15, 19, 23, 27]
    assert kept(list(range(10)), 3) == [2, 5, 9]
    assert kept([0, 2, 3, 6], 4) == [0, 2, 3, 6]
    assert kept([1, 4, 6], 1) == [6]


@pytest.mark.parametrize("by", ["kl", "alignment", "recall"])
def test_a_teacher_in_16_bits_can_be_mixed_with_its_student(by):
    teacher, student = quiet_outer_layers()
    exact = select(by).scores(student, teacher, [0, 1, 2], scoring())
    halved = select(by).scores(student, teacher.bfloat16(), [0, 1, 2], scoring())
    assert halved[1] == pytest.approx(exact[1], rel=0.2, abs=0.02)
    assert next(teacher.parameters()).dtype == torch.bfloat16
    assert next(student.parameters()).dtype == torch.float32


def test_borrowed_modules_go_back_after_an_error():
    teacher, student = quiet_outer_layers()
    own = attention_modules(student)[1]
    with pytest.raises(KeyError), exchanged(student, {1: attention_modules(teacher)[1]}):
        assert attention_modules(student)[1] is attention_modules(teacher)[1]
        raise KeyError
    assert attention_modules(student)[1] is own


# --- the choice ---------------------------------------------------------------------------------------------


def test_choosing_layers_by_score():
    scores = {0: 0.1, 1: 0.7, 2: -0.2, 3: 0.4}
    assert select("kl", keep=2).choose(scores) == [1, 3]
    assert select("kl", keep=3).choose(scores) == [0, 1, 3]
    assert select("kl", keep=2).choose(dict.fromkeys(range(4), 0.5)) == [0, 1]
    with pytest.raises(ValueError, match="stage.select.keep=5 is more than the 4 replaced layers"):
        select("kl", keep=5).choose(scores)
    for key, value, named in (
        ("by", "loss", "by"),
        ("keep", 0, "keep"),
        ("rows", 0, "rows"),
        ("by", "recall", "task"),
    ):
        with pytest.raises(ValueError, match=f"stage.select.{named}"):
            SelectLayers(name="select", **{key: value})


def test_a_student_that_has_diverged_is_refused():
    teacher, student = quiet_outer_layers()
    with torch.no_grad():
        attention_modules(student)[2].output.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"stage.select: the scores of layers \[2\] are not numbers"):
        select("recall").scores(student, teacher, [0, 1, 2], scoring())


def test_layers_that_are_kept_already_are_no_candidates():
    plan = ["rwkv7", "attention", "sliding_window", "rwkv6"]
    assert replaced_layers(plan, "attention") == [0, 2, 3]
    assert replaced_layers(plan, "sliding_window") == [0, 3]


def test_tokens_read():
    read = {by: select(by, rows=8).tokens_read(512, 4) for by in CRITERIA}
    once = 8 * 512
    assert read == {"kl": 10 * once, "copy": 5 * once, "alignment": once, "recall": 5 * once, "uniform": 0}


# --- configs and runs ---------------------------------------------------------------------------------------


def composed(*overrides: str):
    launch.register_resolvers()
    with initialize_config_dir(str(runs.REPOSITORY / "conf"), version_base="1.3"):
        return compose("train", ["paths.run_folder=/nowhere", *overrides])


def test_every_criterion_has_its_config():
    names = {path.stem for path in (runs.REPOSITORY / "conf" / "layer_plan").glob("*.yaml")}
    assert names == set(CRITERIA)
    for name in names:
        config = composed("experiment=quickstart", f"layer_plan={name}")
        assert config.stage.select.by == name
        launch.check(config)
    assert composed().stage.select.by == "kl"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage.select.keep=5"], ["stage.select.keep=5", "4 replaced"]),
        (["stage.select.by=loss"], ["stage.select.by", "recall"]),
        (["stage.select.by=recall"], ["stage.select.task", "layer_plan=recall"]),
        (["layer_plan=recall", "stage.select.task.needles=0"], ["needles=0"]),
        (["layer_plan=recall", "data.row_length=32"], ["stage.select.data.row_length=32", "too short"]),
        (["layer_plan=recall", "+stage.select.data.row_length=48"], ["stage.select.data.row_length=48"]),
    ],
)
def test_bad_selections_are_refused_before_any_weight(overrides, words):
    with pytest.raises(Exception) as caught:
        launch.check(composed("experiment=quickstart", *overrides))
    for word in words:
        assert word in launch.plain_message(caught.value)


def test_a_layer_plan_without_its_stage_is_refused():
    with pytest.raises(ValueError, match=r"layer_plan=recall has no effect.*stages=\[align,select,distill\]"):
        launch.check_overrides(composed("layer_plan=recall"), ["layer_plan=recall"])
    launch.check_overrides(composed("experiment=quickstart"), ["layer_plan=recall"])


def test_a_run_writes_down_what_it_has_chosen(tmp_path: Path):
    options = ("stages=[select]", "layer_plan=recall", QUIET)
    done = runs.train(tmp_path, tmp_path / "cache", *options)
    assert done.returncode == 0, done.stderr
    folder = runs.run_folder(tmp_path)
    plan = runs.summary(folder)["student"]["layer_plan"]
    assert read_plan_file(folder) == plan and plan.count("attention") == 1
    with (folder / "layer_scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["before"] for row in rows] == ["rwkv7"] * 4
    best = max(rows, key=lambda row: float(row["score"]))
    assert best["chosen"] == "yes" and plan[int(best["layer"])] == "attention"
    report = (folder / "report.md").read_text()
    assert "## Scores of layers" in report and CRITERIA["recall"].label in report
    assert (folder / "plots" / "layer_scores.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("by", ["alignment", "recall", "kl"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_find_the_scores_of_one(strategy, by, tmp_path: Path):
    options = ("stages=[align,select]", f"layer_plan={by}", "stage.select.rows=6")
    found = []
    for name, devices in (
        ("one", ("data.rows_per_device=4",)),
        ("two", ("data.rows_per_device=2", "trainer.devices=2", f"strategy={strategy}")),
    ):
        done = runs.train(
            tmp_path / name, tmp_path / "cache", "trainer.accelerator=cpu", *options, *devices, QUIET
        )
        assert done.returncode == 0, done.stderr[-2000:]
        with (runs.run_folder(tmp_path / name) / "layer_scores.csv").open() as file:
            found.append([float(row["score"]) for row in csv.DictReader(file)])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [4, 80])
def test_the_chart_is_drawn_for_few_and_many_layers(layers, tmp_path: Path):
    scores = [math.sin(layer) for layer in range(layers)]
    kept = list(range(0, layers, 4))
    path = layer_scores(tmp_path / "scores.png", scores=scores, kept=kept, label="x (nats)")
    assert path.stat().st_size > 0


def test_the_report_ranks_the_layers(tmp_path: Path):
    summary = {"teacher": None, "stages": [], "kernels": {}, "seed": 1}
    summary["student"] = {"parameters": 1, "state_bytes_per_row": None, "layer_plan": ["rwkv7", "attention"]}
    scores = {"scores": [0.25, 0.5], "kept": [1], "label": "worth (nats)"}
    page = write_report(tmp_path, summary, title="t", command="c", config={}, scores=scores).read_text()
    table = page[page.index("## Scores of layers") :]
    assert table.index("| 1 | 0.5 | yes |") < table.index("| 0 | 0.25 |")
