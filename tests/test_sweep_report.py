"""The table and the picture of a sweep, whatever became of its trials."""

import csv
import os
from pathlib import Path

import pytest
from sweeps import MIXERS, REST, summary, write_grid, write_trial

from reports import sweep_plot
from reports.sweep_report import (
    failure_lines,
    sweep_csv,
    sweep_markdown,
    sweep_table,
    totals_line,
    write_sweep,
)
from reports.sweep_trials import FAILURE_FILE, read_sweep, short_names


def test_trials_are_read_whatever_became_of_them(tmp_path: Path):
    nan = summary(loss=float("nan"), kl=float("nan"))
    write_trial(tmp_path / "10", "seed=10", "paths.outputs=x", result=summary(kl=0.3))
    write_trial(tmp_path / "9", "seed=9", result=nan)
    (write_trial(tmp_path / "2", "seed=2") / "config.yaml").touch()
    write_trial(tmp_path / "1", "seed=1", "ckpt_path=x", result=summary(kl=0.1))
    write_trial(tmp_path / "3", "seed=3", dry_run=True)
    write_trial(tmp_path / "4", "seed=4", result="{")
    failed = write_trial(tmp_path / "5", "seed=5")
    (failed / FAILURE_FILE).write_text("seed=5 is unlucky.\n")
    found = read_sweep(tmp_path)
    assert {trial.name: trial.status for trial in found.trials} == {
        "1": "finished",
        "2": "unfinished",
        "3": "dry run",
        "4": "failed",
        "5": "failed",
        "9": "diverged",
        "10": "finished",
    }
    assert [trial.name for trial in found.trials][-2:] == ["9", "10"]
    assert found.swept == ["seed"] and found.best.name == "1" and found.metric_key == "stages.-1.kl"
    lines = failure_lines(found)
    assert "trial 5 failed: seed=5 is unlucky." in lines and f"ckpt_path={tmp_path}/2, without -m" in lines[0]
    assert "not a summary" in " ".join(lines) and "stages.-1.kl is nan" in " ".join(lines)


def test_the_asked_metric_and_direction_count(tmp_path: Path):
    for number, gain in enumerate((0.5, 1.5, 1.0)):
        result, key = summary(gain=gain), "stages.distill.copy_gain"
        write_trial(tmp_path / str(number), f"seed={number}", result=result, optimized_metric=key)
    assert read_sweep(tmp_path).best.name == "1"
    (tmp_path / "0/.hydra/hydra.yaml").write_text("hydra: {sweeper: {direction: minimize}}")
    assert read_sweep(tmp_path).best.name == "0"
    without_kl = tmp_path / "without"
    write_trial(without_kl / "0", "seed=1", result=summary(kl=None))
    assert read_sweep(without_kl).metric_key == "stages.-1.loss"


def test_a_folder_of_sweeps_is_read_as_one_and_an_empty_one_refused(tmp_path: Path):
    write_trial(tmp_path / "monday" / "0", "seed=1", result=summary())
    write_trial(tmp_path / "tuesday" / "0", "seed=2", result=summary())
    assert [trial.name for trial in read_sweep(tmp_path).trials] == ["monday/0", "tuesday/0"]
    with pytest.raises(ValueError, match="holds no trial"):
        read_sweep(tmp_path / "nothing")


def test_table_and_page(tmp_path: Path):
    write_grid(tmp_path, lambda rate, seed: None if (rate, seed) == (2e-3, 1) else rate * 100 + seed / 100)
    found = read_sweep(tmp_path)
    assert found.swept == [MIXERS, "seed"]
    write_sweep(tmp_path, found)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row[MIXERS] for row in rows] == ["0.001", "0.001", "0.002", "0.002", "0.004", "0.004"]
    assert rows[0]["kl"] == rows[0]["stages.-1.kl"] == "0.11" and rows[0]["seconds"] == "5.0"
    assert rows[2]["status"] == "failed" and rows[2]["kl"] == "" and "memory" in rows[2]["reason"]
    page = (tmp_path / "sweep.md").read_text()
    assert "| 1 | mixers=0.001 seed=2 | finished | 3.000 | 0.120 | 80.0% | 1.00 | 5.0s | 0.12 |" in page
    assert "trial 2 failed: RuntimeError: out of memory" in page and "](sweep.png)" in page
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert totals_line(found).startswith(
        "6 trials: 5 finished, 1 failed. Best (smallest stages.-1.kl): trial 0"
    )


def test_the_terminal_shows_the_metric_and_keeps_to_80_columns(tmp_path: Path):
    from rich.console import Console

    key = "student.state_bytes_per_row"
    for number in range(2):
        overrides = (
            "stages=[align]",
            f"seed={number}",
            f"student=rwkv{6 + number}",
            f"{MIXERS}=0.00212345678",
        )
        write_trial(tmp_path / str(number), *overrides, result=summary(), optimized_metric=key)
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(sweep_table(read_sweep(tmp_path)))
    text = console.export_text()
    assert "4096" in text and "student=rwkv7" in text and max(map(len, text.splitlines())) <= 80
    write_trial(tmp_path / "alone" / "0", "stages=[align]", result=summary())
    console.print(sweep_table(read_sweep(tmp_path / "alone")))
    assert "stages=[align]" in console.export_text()


def test_short_names_tell_keys_apart():
    assert short_names([MIXERS, REST, "seed"]) == {MIXERS: "mixers", REST: "rest", "seed": "seed"}
    twins = ["stage.align.tokens", "stage.distill.tokens"]
    assert list(short_names(twins).values()) == ["align.tokens", "distill.tokens"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are saved."""
    figures = []
    save = sweep_plot._save
    monkeypatch.setattr(
        sweep_plot, "_save", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    return figures


def test_one_key_is_drawn_as_points_with_the_mean_over_seeds(tmp_path: Path, drawn: list):
    write_grid(tmp_path, lambda rate, seed: None if rate == 4e-3 else rate * 100 + seed / 10)
    sweep_plot.sweep_plot(tmp_path / "sweep.png", read_sweep(tmp_path))
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["mean"].get_xdata() == pytest.approx([1e-3, 2e-3])
    assert lines["mean"].get_ydata() == pytest.approx([0.25, 0.35])
    assert list(lines["no result"].get_xdata()) == [4e-3]
    points = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert [y for _, y in points["seed 2"]] == pytest.approx([0.3, 0.4])
    assert points["best"][0] == pytest.approx([1e-3, 0.2])
    assert axes.get_xscale() == "log" and axes.get_xlabel() == MIXERS and axes.get_ylabel() == "stages.-1.kl"


def test_two_keys_on_a_grid_are_drawn_as_a_heat_map(tmp_path: Path, drawn: list):
    rates = ((1e-3, 2e-3, 4e-3), (1e-4, 2e-4))
    write_grid(
        tmp_path, lambda a, b: None if (a, b) == (4e-3, 2e-4) else a * 100 + b * 100, (MIXERS, REST), rates
    )
    sweep_plot.sweep_plot(tmp_path / "sweep.png", read_sweep(tmp_path))
    cells = [text.get_text() for text in drawn[0].axes[0].texts]
    assert cells == ["0.11", "0.21", "0.41", "0.12", "0.22", "no result"]


def test_values_drawn_by_a_search_get_a_panel_each(tmp_path: Path, drawn: list):
    for number in range(6):
        overrides = (
            f"{MIXERS}={0.001 * 1.7**number}",
            f"{REST}={0.002 / 1.3**number}",
            f"student=rwkv{6 + number % 2}",
        )
        write_trial(tmp_path / str(number), *overrides, result=summary(kl=0.1 * number))
    sweep_plot.sweep_plot(tmp_path / "sweep.png", read_sweep(tmp_path))
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["mixers", "rest", "student"]
    assert all(
        len(axes.collections[-2 if i < 2 else 1].get_offsets()) == 6 for i, axes in enumerate(drawn[0].axes)
    )


def test_seeds_alone_and_no_result_at_all(tmp_path: Path, drawn: list):
    write_grid(tmp_path, lambda rate, seed: seed / 10, values=((1e-3,), (1, 2, 3)))
    sweep_plot.sweep_plot(tmp_path / "sweep.png", read_sweep(tmp_path))
    assert drawn[0].axes[0].get_lines()[0].get_label() == "mean: 0.2"
    write_trial(tmp_path / "nothing" / "0", "seed=1")
    empty = read_sweep(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no trial has a finite"):
        sweep_plot.sweep_plot(tmp_path / "sweep.png", empty)
    write_sweep(tmp_path / "nothing", empty)
    assert "sweep.png" not in sweep_markdown(empty, title="x") and "0,unfinished" in sweep_csv(empty)
