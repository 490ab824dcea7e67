"""The table and the picture of recall over seeds."""

import json
from pathlib import Path

import pytest

from pipeline import recall_curves


def evaluation(folder: Path, means: dict[tuple[int, int], float]) -> Path:
    folder.mkdir()
    cells = [{"row_length": t, "pairs": p, "mean": m, "error": 0.0, "rows": 4} for (t, p), m in means.items()]
    (folder / "eval.json").write_text(json.dumps({"mqar": {"model": cells}}))
    return folder


def test_it_prints_and_draws_the_range_over_seeds(tmp_path, capsys):
    one = evaluation(tmp_path / "one", {(64, 4): 1.0, (64, 8): 0.5})
    two = evaluation(tmp_path / "two", {(64, 4): 0.8, (64, 8): 0.25})
    picture = tmp_path / "recall.png"
    recall_curves.compare(["trained=4", f"hybrid={one},{two}", f"rwkv7={two}"], picture)
    told = capsys.readouterr().out
    assert "90.0% (80.0%, 100.0%)" in told and "37.5% (25.0%, 50.0%)" in told
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("arguments", [[], ["hybrid=x"], ["trained=4"], ["trained=4", "hybrid"]], ids=str)
def test_a_wrong_command_line_is_told_the_right_one(arguments, tmp_path):
    with pytest.raises(ValueError, match="write python -m pipeline.recall_curves"):
        recall_curves.compare(arguments, tmp_path / "recall.png")


def test_evaluations_must_agree(tmp_path):
    one, two = evaluation(tmp_path / "one", {(64, 4): 1.0}), evaluation(tmp_path / "two", {(64, 8): 1.0})
    with pytest.raises(ValueError, match="two has other row lengths"):
        recall_curves.read_recall([one, two])
    with pytest.raises(ValueError, match="holds no evaluation of recall"):
        recall_curves.read_recall([tmp_path])
