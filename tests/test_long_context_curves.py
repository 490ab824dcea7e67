"""The tables and the pictures of long-context figures over seeds."""

import json
from pathlib import Path

import pytest

from pipeline import long_context_curves


def evaluation(folder: Path, means: dict[tuple[int, int], float]) -> Path:
    folder.mkdir(parents=True)
    cells = [{"row_length": t, "pairs": p, "mean": m, "error": 0.0, "rows": 4} for (t, p), m in means.items()]
    gains = [{"row_length": t, "mean": 2 * m, "error": 0.0, "rows": 4} for (t, _), m in means.items()]
    copies = {"model": gains, "teacher": [{**gain, "mean": 1.25} for gain in gains]}
    (folder / "eval.json").write_text(json.dumps({"mqar": {"model": cells}, "copies": copies}))
    return folder


def test_it_prints_and_draws_the_range_over_seeds(tmp_path, capsys):
    one = evaluation(tmp_path / "one", {(64, 4): 1.0, (64, 8): 0.5})
    two = evaluation(tmp_path / "two", {(64, 4): 0.8, (64, 8): 0.25})
    long_context_curves.compare(["part=mqar", "trained=4", f"hybrid={one},{two}", f"rwkv7={two}"], tmp_path)
    told = capsys.readouterr().out
    assert "90.0% (80.0%, 100.0%)" in told and "37.5% (25.0%, 50.0%)" in told and "25.0%" in told
    assert (tmp_path / "mqar.png").stat().st_size > 10_000


def test_it_reads_what_a_sweep_has_left_and_tells_the_teacher(tmp_path, capsys):
    for seed, gain in enumerate((0.5, 0.75)):
        evaluation(tmp_path / "sweep" / str(seed), {(64, 4): gain, (128, 4): 0.25})
    long_context_curves.compare(["part=copies", "trained=64", f"hybrid={tmp_path / 'sweep'}"], tmp_path)
    told = capsys.readouterr().out
    assert "1.250 (1.000, 1.500)" in told and "teacher" in told and "0.500 (0.500, 0.500)" in told
    assert (tmp_path / "copies.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments",
    ["", "hybrid=x", "part=mqar trained=4", "part=mqar trained=4 hybrid", "part=x trained=4 a=b"],
)
def test_a_wrong_command_line_is_told_the_right_one(arguments, tmp_path):
    with pytest.raises(ValueError, match="write python -m pipeline.long_context_curves"):
        long_context_curves.compare(arguments.split(), tmp_path)


def test_evaluations_must_agree(tmp_path):
    one, two = evaluation(tmp_path / "one", {(64, 4): 1.0}), evaluation(tmp_path / "two", {(64, 8): 1.0})
    with pytest.raises(ValueError, match="two has other row lengths"):
        long_context_curves.read_seeds("mqar", [one, two])
    with pytest.raises(ValueError, match="holds no evaluation of mqar"):
        long_context_curves.read_seeds("mqar", [tmp_path / "nowhere"])
