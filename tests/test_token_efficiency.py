"""Tokens until a level: read off the curves, compared between recipes."""

import numpy as np
import pytest

from pipeline.token_efficiency import METRIC, compare, read_curves
from reports.token_efficiency import Curve, efficiency_table


def _curve(kl: list[float], tokens: list[int] | None = None) -> Curve:
    tokens = tokens or [1000 * (index + 1) for index in range(len(kl))]
    return Curve("run", np.array(tokens, float), np.array(kl))


def _write_run(folder, kl: list[float], metric: str = f"distill/{METRIC}") -> None:
    folder.mkdir(parents=True)
    lines = ["stage,step,tokens,metric,value"]
    lines += [f"distill,{step},{1000 * step},{metric},{value}" for step, value in enumerate(kl, start=1)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_level_is_read_between_two_measurements_on_a_log_scale():
    curve = _curve([1.0, 0.25])
    assert curve.tokens_until(0.5) == pytest.approx(1500)
    assert curve.tokens_until(0.25) == pytest.approx(2000)
    assert curve.tokens_until(1.5) == 1000  # reached before the first measurement
    assert curve.tokens_until(0.2) is None


def test_first_crossing_counts():
    assert _curve([1.0, 0.25, 0.9, 0.1]).tokens_until(0.5) == pytest.approx(1500)


def test_ratio_is_that_of_geometric_means_to_the_first_recipe():
    slow = [_curve([1.0, 0.5], [0, 2_000_000]), _curve([1.0, 0.5], [0, 8_000_000])]
    fast = [_curve([1.0, 0.5], [0, 1_000_000])]
    rows = efficiency_table({"slow": slow, "fast": fast}, 0.5)
    assert rows[0] == ("slow", "2.000 M, 8.000 M", "4.000 M", "1.00 x")
    assert rows[1] == ("fast", "1.000 M", "1.000 M", "4.00 x")


def test_a_run_above_the_level_bounds_the_mean_and_the_ratios_to_it():
    reaches, never = [_curve([1.0, 0.5], [0, 500_000])], [_curve([1.0, 0.9], [0, 2_000_000])]
    rows = efficiency_table({"a": reaches, "b": never}, 0.5)
    assert rows[1] == ("b", "not reached", "> 2.000 M", "–")
    rows = efficiency_table({"b": never, "a": reaches}, 0.5)
    assert [row[3] for row in rows] == ["–", "> 4.00 x"]


def test_a_sweep_is_read_with_all_its_runs_and_other_metrics_are_left_out(tmp_path):
    _write_run(tmp_path / "sweep" / "0", [1.0, 0.5])
    _write_run(tmp_path / "sweep" / "1", [1.0, 0.4])
    _write_run(tmp_path / "sweep" / "2", [1.0, 0.4], metric="distill/kl")
    curves = read_curves(tmp_path / "sweep")
    assert [curve.kl.tolist() for curve in curves] == [[1.0, 0.5], [1.0, 0.4]]


def test_picture_and_errors(tmp_path, capsys):
    _write_run(tmp_path / "a", [1.0, 0.5])
    _write_run(tmp_path / "b", [1.0, 0.3])
    _write_run(tmp_path / "unmeasured", [1.0], metric="distill/kl")
    picture = tmp_path / "picture.png"
    compare(["level=0.6", f"one={tmp_path / 'a'}", f"two={tmp_path / 'b'}"], picture)
    assert picture.stat().st_size > 10_000
    assert "Tokens until the held-out KL is 0.6" in capsys.readouterr().out
    for arguments, words in (
        ([f"one={tmp_path / 'a'}"], "level="),
        (["level=0.5"], "folder"),
        (["level=0.5", str(tmp_path)], "recipe"),
        (["level=0.5", f"one={tmp_path / 'unmeasured'}"], "validate_every_steps"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(arguments, picture)
