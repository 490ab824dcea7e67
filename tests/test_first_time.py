"""What a new user does on the first day, one command after the other, at a tiny setting."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs

SHORT = ("callbacks.text_samples=null", "evaluation.decoding_contexts=[]")
# What somebody else's machine runs: no folder of this repository is on its path.
ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("import os", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1]:]))
"""


def python(*arguments: str, cwd: Path = runs.REPOSITORY) -> str:
    """Runs Python with arguments and returns what it prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=runs.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_from_the_quickstart_to_a_model_used_elsewhere(tmp_path):
    outputs, cache, away = tmp_path / "outputs", tmp_path / "cache", tmp_path / "away"
    folders = (f"paths.outputs={outputs}", f"paths.cache={cache}")
    away.mkdir()

    # The quickstart, then the same with a changed config.
    python(*runs.command(outputs, cache, *SHORT)[1:])
    python(*runs.command(outputs, cache, *SHORT, "name=changed", "stage.select.keep=2")[1:])
    (first,), (second,) = (list(outputs.glob(f"{name}/*")) for name in ("quickstart", "changed"))
    plans = [runs.summary(folder)["student"]["layer_plan"] for folder in (first, second)]
    assert [plan.count("attention") for plan in plans] == [1, 2]

    # A sweep of two keys with two values each, compared in one table and one picture.
    swept = (
        "stages=[align]",
        "stage.align.tokens=1024",
        "seed=1,2",
        "stage.align.learning_rate.mixers=1e-3,4e-3",
    )
    printed = python(*runs.command(outputs, cache, "-m", *SHORT, *swept)[1:])
    (sweep,) = outputs.glob("sweeps/*/*")
    assert "4 finished" in printed
    assert len((sweep / "sweep.csv").read_text().splitlines()) == 5
    assert (sweep / "sweep.png").stat().st_size > 10_000

    # The best student leaves the house.
    exported = away / "student"
    python("export.py", f"run={first}", f"output={exported}", *folders)
    text = python("-c", ELSEWHERE, str(exported), cwd=away)

    # It writes the same there and here, and is what the run has measured.
    prompt = ("prompt=import os", "max_new_tokens=8")
    for model in (first, exported):
        python("generate.py", f"model={model}", *prompt, *folders)
    here = [
        json.loads(path.read_text())["text"] for path in sorted(outputs.glob("generate/*/generations.jsonl"))
    ]
    assert here[0] == here[1]
    assert text.strip() == here[0].strip()
    small = ("data.row_length=128", "data.validation_rows=4")
    python(
        "eval.py", f"model={exported}", "suite=quick", "teacher_folder=assets/tiny_qwen2", *small, *folders
    )
    (found,) = outputs.glob("eval/*/eval.json")
    figures, last = json.loads(found.read_text())["figures"], runs.summary(first)["stages"][-1]
    for key in ("loss", "kl", "top1_agreement", "copy_gain"):
        assert figures[key] == pytest.approx(last[key], rel=1e-5)
