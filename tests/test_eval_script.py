"""eval.py: the suite `quick` end to end, which teacher is taken, what is told, and bad input."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import exported
import pytest
import runs
import yaml
from evaluations import BUNDLED, SIZE, TEXT, composed, evaluation, hybrid
from rich.console import Console
from tiny import student_config, tiny_teacher
from transformers import AutoTokenizer

from conf import suites
from models.layer_plan import ATTENTION
from models.student_folder import Student, save_student
from models.teacher import TeacherConfig
from pipeline.evaluation import find_subjects, teacher_of_run
from reports.eval_plots import task_bars
from reports.eval_report import Figure, Findings, eval_page, figures_table

pytestmark = pytest.mark.xdist_group("eval-script")  # they share one evaluation
PLAN = ["rwkv7", ATTENTION, "rwkv7"]
SUITES = ["lm_eval", "long_context", "quick", "retrieval", "sparse_choice"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of a run: its student, and a config that names its teacher."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = AutoTokenizer.from_pretrained(exported.TOKENIZER)
    tiny_teacher(vocab_size=SIZE).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    save_student(folder / "student", Student(hybrid(), PLAN, student_config((1,))), tokenizer)
    teacher = {"_target_": "os.system", "path": str(folder / "teacher"), "trust_remote_code": True}
    (folder / "config.yaml").write_text(yaml.safe_dump({"teacher": teacher}))
    return folder


# --- quick --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the facts of an evaluation of a run, beside its own teacher."""
    folder = tmp_path_factory.mktemp("quick")
    for number in range(40):
        (folder / f"{number}.txt").write_text(TEXT * 5 + f"# {number}\n")
    small = ("row_length=48", "validation_rows=3", "copy_rows=2", "copy_passage_length=16")
    done = evaluation(
        f"model={run}",
        "data=files",
        f"data.sources.text.paths=[{folder}]",
        "data.sources.text.validation_share=0.3",
        *(f"data.{option}" for option in small),
        f"paths.outputs={folder}",
        f"paths.cache={folder / 'cache'}",
    )
    assert done.returncode == 0, done.stderr
    for words in ("perplexity", "KL (teacher ‖ model)", "top-5 agreement", "copy gain", "relative"):
        assert words in done.stdout, done.stdout
    (output,) = folder.glob("eval/*/eval.json")
    return output.parent, json.loads(output.read_text())


def test_quick_keeps_the_contract_of_its_file(quick, run: Path):
    _, facts = quick
    assert facts["model"] == str(run) and facts["teacher"] == str(run / "teacher")
    assert facts["suite"] == "quick"
    both = {"loss", "perplexity", "copy_first", "copy_second", "copy_gain", "copy_ratio"}
    against = {"kl", "reverse_kl", "top1_agreement", "top5_agreement"}
    assert set(facts["figures"]) == both | against
    for section in ("teacher_figures", "difference", "relative"):
        assert set(facts[section]) == both, section
    assert facts["figures"]["kl"] > 0 and facts["figures"]["reverse_kl"] > 0
    ours, theirs = facts["figures"]["loss"], facts["teacher_figures"]["loss"]
    assert facts["difference"]["loss"] == pytest.approx(ours - theirs)
    assert facts["relative"]["loss"] == pytest.approx(ours / theirs)
    assert set(facts["by_position"]) == {"loss", "teacher_loss"} | against
    assert all(len(curve) == 48 for curve in facts["by_position"].values())
    assert [record["mixer"] for record in facts["per_layer"]] == PLAN
    assert [record["layer"] for record in facts["per_layer"]] == [0, 1, 2]
    assert all(0 < record["relative_error"] < 10 for record in facts["per_layer"])


def test_quick_leaves_a_page_with_its_plots(quick):
    folder, facts = quick
    page = (folder / "eval.md").read_text()
    assert f"| {facts['figures']['loss']:.4f} | {facts['teacher_figures']['loss']:.4f} |" in page
    for picture in ("plots/by_position.png", "plots/layers.png"):
        assert f"({picture})" in page and (folder / picture).read_bytes().startswith(b"\x89PNG")


# --- which teacher ------------------------------------------------------------------------------------------


def test_the_teacher_of_a_run_is_found_from_its_folders(run: Path, tmp_path: Path):
    stage = tmp_path / "checkpoints" / "align"
    shutil.copytree(run / "student", stage / "student")
    shutil.copy(run / "config.yaml", tmp_path)
    for student in (run / "student", stage / "student"):
        assert teacher_of_run(student) == TeacherConfig(
            path=str(run / "teacher")
        )  # nothing else is taken over
    assert teacher_of_run(runs.REPOSITORY / BUNDLED) is None
    shutil.copytree(run / "student", tmp_path / "elsewhere" / "deep" / "student")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"teacher": {"path": None}}))
    assert teacher_of_run(stage / "student") is None
    for broken in ("teacher: [", "nothing: 1", "teacher: {path: some/model}"):
        (tmp_path / "config.yaml").write_text(broken)
        with pytest.raises(ValueError, match="teacher_folder=auto: .*teacher_folder=null"):
            teacher_of_run(stage / "student")


def test_teacher_folder_decides(run: Path):
    assert find_subjects(composed(f"model={BUNDLED}"))[1] is None
    assert find_subjects(composed(f"model={run}", "teacher_folder=null"))[1] is None
    model, teacher = find_subjects(composed(f"model={run / 'student'}", f"teacher_folder={run}"))
    assert teacher.source == run / "student" and model.vocabulary == teacher.vocabulary == SIZE


def other_teacher(run: Path, folder: Path, change: str) -> Path:
    """The run's teacher with another vocabulary."""
    shutil.copytree(run / "teacher", folder)
    if change == "size":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": SIZE + 64}))
    elif change == "numbers":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        first, second = sorted(words, key=words.get)[400:402]
        words[first], words[second] = words[second], words[first]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("size", "another vocabulary: it has logits for 2112 tokens, the model for 2048"),
        ("numbers", "another vocabulary: token .* is number .* there, and .* in the model"),
        ("no tokenizer", "cannot be read"),
    ],
)
def test_a_teacher_with_another_vocabulary_is_refused(run: Path, tmp_path: Path, change: str, said: str):
    folder = other_teacher(run, tmp_path / "other", change)
    with pytest.raises(ValueError, match=f"(?s)teacher_folder={folder}.*{said}.*teacher_folder=null"):
        find_subjects(composed(f"model={run}", f"teacher_folder={folder}"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=nowhere"], "model: nowhere is neither a finished run"),
        ([f"model={BUNDLED}", "teacher_folder=nowhere"], "teacher_folder=nowhere is neither a finished run"),
        ([f"model={BUNDLED}", "device=tpu"], "device='tpu' is unknown"),
    ],
)
def test_bad_folders_and_devices_are_refused(overrides: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        find_subjects(composed(*overrides))


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_damaged_weights_are_told_by_the_key(run: Path, tmp_path: Path, damage: str):
    folder = shutil.copytree(run / "teacher", tmp_path / "other")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    if damage == "missing":
        weights.unlink()
    model, teacher = find_subjects(composed(f"model={folder}", f"teacher_folder={folder}"))
    for subject, key in ((model, "model"), (teacher, "teacher_folder")):
        with pytest.raises(ValueError, match=f"{key}: the weights of {folder} are missing or damaged"):
            subject.load()


# --- the command line and what is told ----------------------------------------------------------------------


def test_a_bad_command_line_is_refused_in_one_line():
    for overrides, said in (
        (["model=x", "suite=kernels"], f"unknown; choose one of {', '.join(SUITES)}."),
        (["model=x", "suite=lm_eval", "tasks=[]"], "tasks is empty"),
    ):
        done = evaluation(*overrides)
        assert done.returncode == 2 and said in done.stderr
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr


def test_every_suite_belongs_to_one_script():
    files = {path.stem for path in suites.FOLDER.glob("*.yaml")}
    of_scripts = [suites.suites_of("eval.py"), suites.suites_of("benchmark.py")]
    assert sorted(sum(of_scripts, [])) == sorted(files)
    assert of_scripts[0] == SUITES


def test_relative_scores():
    figure = Figure(name="task/acc", label="", value=0.4, teacher=0.5, chance=0.25)
    assert figure.relative == pytest.approx(0.6) and figure.difference == pytest.approx(-0.1)
    assert dataclasses.replace(figure, chance=0.0).relative == pytest.approx(0.8)
    assert dataclasses.replace(figure, teacher=0.25).relative is None
    assert dataclasses.replace(figure, teacher=None).relative is None


def test_tables_without_a_teacher_and_with_numbers_that_are_none(tmp_path: Path):
    figures = [Figure(name="loss", label="loss|nats", value=float("nan"))]
    findings = Findings(figures=figures, explanation="Why.")
    assert "loss\\|nats | nan |" in eval_page(findings, model="m", teacher=None, suite="quick")
    console = Console(width=60, record=True, quiet=True)
    console.print(figures_table(findings, title="t"))
    assert not findings.has_teacher
    score = {"label": "a", "value": 0.0, "teacher": float("inf"), "chance": 0, "error": None}
    for rising in (True, False):
        path = tmp_path / f"{rising}.png"
        assert task_bars(path, scores=[{**score, "teacher_error": None, "rising": rising}]).stat().st_size > 0
