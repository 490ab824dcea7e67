"""Whole runs of students with inserted layers."""

import csv
from pathlib import Path

import runs

from models.layer_plan import read_plan_file, teacher_part
from models.student_folder import load_student


def test_a_run_with_inserted_layers_goes_through_every_stage(tmp_path: Path):
    """Four layers and one inserted: calibrated, aligned, selected, distilled, written down and read again."""
    options = ("student=rwkvx_inserted", "stages=[calibrate,align,select,distill]", "stage.calibrate.rows=2")
    done = runs.train(tmp_path, tmp_path / "cache", *options, "evaluation.decoding_contexts=[]")
    assert done.returncode == 0, done.stderr[-2000:]
    folder = runs.run_folder(tmp_path)
    plan = runs.summary(folder)["student"]["layer_plan"]
    assert plan[4] == "+sparse" and sorted(teacher_part(plan)) == ["attention", *["rwkv7"] * 3]
    assert read_plan_file(folder) == plan
    with (folder / "layer_scores.csv").open() as file:
        assert [row["before"] for row in csv.DictReader(file)] == ["rwkv7"] * 4
    with (folder / "transfer.csv").open() as file:
        silent = {row["target"] for row in csv.DictReader(file) if row["action"] == "zero"}
    assert silent == {f"model.layers.4.{name}.weight" for name in ("self_attn.output", "mlp.down_proj")}
    assert f"3 {teacher_part(plan)[3]}, +sparse" in (folder / "report.md").read_text()
    student = load_student(folder / "student")
    assert student.plan == plan
    moved = dict(student.model.named_parameters())
    assert all(moved[name].any() for name in silent), "distillation trains it"
