"""eval.py suite=lm_eval: local tasks end to end, scores that do not depend on the batch, and bad settings."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exported
import pytest
import torch
import yaml
from evaluations import BUNDLED, TEXT, composed, evaluation, hybrid
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedModel

from pipeline.lm_eval_suite import LmEvalSuite

pytestmark = pytest.mark.xdist_group("lm-eval")  # importing it takes seconds
CHOICES = [
    {"text": "import os\nimport ", "choices": ["sys", " qqq zzz"], "gold": 0},
    {"text": "def f(self, x):\n    return ", "choices": ["%%%% ;;; of the", "x"], "gold": 1},
    {"text": "class A:\n    def __init__(", "choices": ["banana ] [", "self):"], "gold": 1},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    },
}


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    """A hybrid over the bundled tokenizer's vocabulary."""
    return hybrid()


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of our own, with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CHOICES))
    files = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
    data = {"dataset_path": "json", "dataset_kwargs": files}
    for name, settings in TASKS.items():
        task = {"task": f"tiny_{name}", "test_split": "test", "fewshot_split": "test", **data, **settings}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def suite(**options: Any) -> LmEvalSuite:
    """The suite with its defaults, offline."""
    config = composed("model=x", "suite=lm_eval", "tasks=[a]", "include_defaults=false", "include_path=.")
    return LmEvalSuite(**{**without_target(config.suite), **options})


def without_target(config: Any) -> dict[str, Any]:
    """The arguments in a config."""
    plain = OmegaConf.to_container(config, resolve=True)
    return {key: value for key, value in plain.items() if not key.startswith("_")}


def test_local_tasks_run_on_the_bundled_teacher(task_folder: Path, tmp_path: Path):
    done = evaluation(
        f"model={BUNDLED}",
        "suite=lm_eval",
        "tasks=[tiny_*]",
        f"include_path={task_folder}",
        "include_defaults=false",
        "limit=2",
        "chance={tiny_choice: 0.5}",
        f"teacher_folder={BUNDLED}",
        f"paths.outputs={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    (output,) = tmp_path.glob("eval/*/eval.json")
    facts = json.loads(output.read_text())
    assert facts["suite"] == "lm_eval" and facts["figures"] == facts["teacher_figures"]
    assert facts["figures"]["tiny_choice/acc"] == 1.0 and facts["relative"]["tiny_choice/acc"] == 1.0
    assert facts["figures"]["tiny_written/exact_match"] in (0.0, 0.5, 1.0)
    assert 0.5 < facts["figures"]["tiny_text/bits_per_byte"] < 8
    assert facts["tasks"]["tiny_choice"]["documents"] == 2 and facts["tasks"]["tiny_choice"]["chance"] == 0.5
    assert "tiny_written" in done.stdout and "tiny_choice: acc" in (output.parent / "eval.md").read_text()
    assert (output.parent / "plots" / "tasks.png").read_bytes().startswith(b"\x89PNG")


def test_a_student_scores_the_same_in_any_batch(student: PreTrainedModel):
    """Requests of unequal length: lm-eval pads log-likelihoods right, without a mask, and texts left."""
    from lm_eval.api.instance import Instance

    from pipeline.lm_eval_tasks import harness_model

    tokenizer = AutoTokenizer.from_pretrained(exported.TOKENIZER)
    subject = SimpleNamespace(load=lambda: student, tokenizer=tokenizer)
    texts = [text.rstrip() for text in (TEXT[:6], TEXT[:40], TEXT, TEXT * 3)]
    scored = [Instance("loglikelihood", {}, (text, "return os.path"), 0) for text in texts]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    options = {"until": ["never said"], "max_gen_toks": 6, "do_sample": False}
    written = [Instance("generate_until", {}, (text, options), 0) for text in texts]
    found = {}
    for size in (1, 4):
        harness = harness_model(subject, size, None)
        found[size] = (
            [score for score, _ in harness.loglikelihood(scored)] + harness.loglikelihood_rolling(rolling),
            harness.generate_until(written),
        )
    assert found[4][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[4][1] == found[1][1]
    for text, score, said in zip(texts, found[1][0], found[1][1], strict=False):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        after = torch.tensor(tokenizer(text + "return os.path")["input_ids"])
        with torch.no_grad():
            log_shares = student(after[None]).logits[0, :-1].double().log_softmax(-1)
        wanted = log_shares.gather(-1, after[1:, None])[len(ids) - 1 :].sum().item()
        assert score == pytest.approx(wanted, rel=1e-4)
        assert said == tokenizer.decode(exported.greedy(student, ids[None], 6)[0, len(ids) :])


def test_solved_examples_are_the_same_for_both_models(student: PreTrainedModel, task_folder: Path):
    from pipeline.lm_eval_tasks import load_tasks, run_tasks, set_examples

    tasks = load_tasks(["tiny_choice"], str(task_folder), False)
    set_examples(tasks["tasks"], 1)
    (task,) = tasks["tasks"].values()
    tokenizer = AutoTokenizer.from_pretrained(exported.TOKENIZER)
    subject = SimpleNamespace(load=lambda: student, tokenizer=tokenizer)
    asked = []
    for seed in (1, 1, 2, 3, 4):
        options = {"limit": None, "batch_size": 2, "max_length": None, "bootstrap_samples": 0, "seed": 1}
        results = run_tasks(subject, tasks, fewshot_seed=seed, **options)
        asked.append([instance.arguments[0] for instance in task.instances])
    assert asked[0] == asked[1] and any(other != asked[0] for other in asked[2:])
    assert results["n-shot"]["tiny_choice"] == 1 and all(text.count("\n\n") == 1 for text in asked[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": []}, "tasks is empty; name at least one"),
        ({"include_path": "nowhere"}, "include_path=nowhere is no folder"),
        ({"include_path": None}, "include_defaults=false leaves no task; .*include_path="),
        ({"batch_size": 0}, "batch_size=0 must be a whole number from 1 on"),
        ({"batch_size": "auto"}, "batch_size=auto must be"),
        ({"num_fewshot": -1}, "num_fewshot=-1 must be"),
        ({"limit": 0}, "limit=0 must be"),
        ({"chance": {"a": 25}}, "chance=.* must lie in"),
    ],
)
def test_bad_settings_of_lm_eval_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        suite(**options)


def test_unknown_and_unreadable_tasks_are_refused_before_a_model_is_loaded(task_folder: Path, tmp_path: Path):
    nobody = SimpleNamespace(load=lambda: pytest.fail("a model was loaded"), tokenizer=None)
    options = {"include_path": str(task_folder)}
    with pytest.raises(ValueError, match="tasks: 'tiny_chioce' is unknown .*did you mean .*tiny_choice"):
        suite(tasks=["tiny_chioce"], **options).run(nobody, None, tmp_path)
    with pytest.raises(ValueError, match=r"max_length=4 leaves no room: tiny_written wants up to 4 tokens"):
        suite(tasks="tiny_written", max_length=4, **options).run(nobody, None, tmp_path)
    broken = yaml.safe_load((task_folder / "choice.yaml").read_text())
    broken["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "none.jsonl")
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(ValueError, match=r"tasks=\['tiny_choice'\] cannot be loaded"):
        suite(tasks=["tiny_choice"], include_path=str(tmp_path)).run(nobody, None, tmp_path)
