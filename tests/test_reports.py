"""The summary contract, the table, the pictures and the page of a run, from synthetic numbers."""

import io
import json
import math
import struct

import numpy as np
import pytest

from reports import plots, report, summary, table


def png_size(path):
    """Returns (width, height) of a PNG file."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def distinct_colours(path):
    """Returns the number of different pixels of a picture: an empty panel has a handful, text included."""
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 15).round().astype(int)
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.fixture
def example():
    """A summary as a quickstart run writes it."""
    stages = [
        ("transfer", 6.15, 3.41, 0.10, -0.45, 0, 0.0),
        ("align", 3.18, 0.508, 0.62, 0.09, 614_400, 65.0),
        ("distill", 2.731, 0.094, 0.824, 1.07, 1_228_800, 258.0),
    ]
    return {
        "teacher": {"loss": 2.68, "perplexity": summary.perplexity(2.68), "copy_gain": 1.16},
        "stages": [
            summary.stage_entry(
                name=name,
                loss=loss,
                kl=kl,
                top1_agreement=agreement,
                copy_gain=gain,
                tokens=tokens,
                seconds=seconds,
                transfer_loss=6.15,
                teacher_loss=2.68,
            )
            for name, loss, kl, agreement, gain, tokens, seconds in stages
        ],
        "kernels": {"wkv7": {"backend": "cpu", "reason": "first | usable"}},
        "student": {
            "parameters": 3_600_000,
            "state_bytes_per_row": 196_608,
            "layer_plan": ["rwkv7", "attention"],
        },
        "seed": 1,
    }


@pytest.fixture
def rows():
    """Metric rows of an align stage of two layers and a distill stage."""
    align = [
        {
            "stage": "align",
            "step": step,
            "tokens": step * 2048,
            "metric": f"align/layer_{layer}/alignment",
            "value": (layer + 1) / step,
        }
        for step in range(1, 31)
        for layer in (0, 3)
    ]
    distill = [
        {
            "stage": "distill",
            "step": step,
            "tokens": (30 + step) * 2048,
            "metric": "distill/loss",
            "value": 3 + 1 / step,
        }
        for step in range(1, 61)
    ]
    return align + distill


def test_summary_reads_back_exactly(tmp_path, example):
    example["stages"][1]["loss"] = 0.1 + 0.2
    path = summary.write_summary(tmp_path / "run" / "summary.json", example)
    assert summary.read_summary(path) == example
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_a_refused_summary_leaves_the_old_file(tmp_path, example):
    path = summary.write_summary(tmp_path / "summary.json", example)
    before = path.read_bytes()
    example["student"]["layer_plan"] = object()
    with pytest.raises(TypeError):
        summary.write_summary(path, example)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("kernels"), "kernels"),
        (lambda s: s["stages"][0].pop("copy_gain"), r"stages\[0\].*copy_gain"),
        (lambda s: s["stages"][2].update(kl=np.float32(0.5)), r"stages\[2\].kl.*float\(\)"),
        (lambda s: s["stages"][2].update(name="align"), "share a name"),
        (lambda s: s["stages"][2].update(name=""), r"stages\[2\].name"),
        (lambda s: s["teacher"].update(loss="2.68"), "teacher.loss"),
        (lambda s: s["kernels"]["wkv7"].pop("reason"), "kernels.wkv7.*reason"),
        (lambda s: s["student"].pop("layer_plan"), "layer_plan"),
        (lambda s: s.update(stages={}), "must be a list"),
    ],
)
def test_a_broken_summary_is_refused_by_key(example, damage, message):
    damage(example)
    with pytest.raises(ValueError, match=message):
        summary.validate_summary(example)


def test_derived_numbers():
    assert summary.gap_recovered(6.0, 6.0, 2.0) == 0.0
    assert summary.gap_recovered(3.0, 6.0, 2.0) == 0.75
    assert summary.gap_recovered(3.0, None, 2.0) is None
    assert summary.gap_recovered(3.0, 2.0, 2.0) is None
    assert summary.perplexity(1e6) == math.inf
    entry = summary.stage_entry(name="distill", loss=2.0, tokens=1000, seconds=4.0)
    assert (entry["tokens_per_second"], entry["perplexity"], entry["kl"]) == (250.0, math.exp(2.0), None)


def test_table_rows(example):
    cells = table.summary_rows(example)
    assert cells[2] == [
        "distill",
        "2.731",
        "15.35",
        "0.094",
        "82.4%",
        "98.5%",
        "1.07 (92%)",
        "1.23 M",
        "4m 18s",
    ]
    assert cells[0][6] == "-0.45"
    assert cells[-1][0] == "teacher" and cells[-1][1] == "2.680"
    example["teacher"] = None
    assert len(table.summary_rows(example)) == 3


def test_terminal_table_fits_eighty_columns(example):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.summary_table(example))
    text = console.export_text()
    assert "…" not in text and "1.07 (92%)" in text and "All stages: 1.84 M tokens in 5m 23s; seed 1." in text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (999, "999"), (999_999, "1.00 M"), (614_400, "614 k"), (7e8, "700 M"), (1e9, "1.00 B")],
)
def test_tokens_text(tokens, text):
    assert table.format_tokens(tokens) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.44, "0.4s"), (9.96, "10s"), (59.6, "1m 00s"), (323, "5m 23s"), (11040, "3h 04m")],
)
def test_seconds_text(seconds, text):
    assert table.format_seconds(seconds) == text


def test_alignment_matrix_places_values_and_gaps(rows):
    del rows[0]  # layer 0 at step 1
    steps, layers, values = plots.alignment_matrix(rows, "align")
    assert layers == [0, 3] and steps.tolist() == list(range(1, 31))
    assert math.isnan(values[0, 0]) and values[1, 0] == 4.0 and values[1, 9] == 0.4
    with pytest.raises(ValueError, match="distill/layer_"):
        plots.alignment_matrix(rows, "distill")


def test_a_long_alignment_is_averaged():
    long = [
        {
            "stage": "align",
            "step": step,
            "tokens": 0,
            "metric": "align/layer_0/alignment",
            "value": float(step),
        }
        for step in range(1, 2001)
    ]
    steps, _, values = plots.alignment_matrix(long, "align")
    assert values.shape == (1, 400) and np.allclose(values[0], steps) and values[0, 0] == 3.0


def test_every_picture_is_drawn_and_not_empty(tmp_path, example, rows):
    lengths = [64, 256, 1024]
    positions = np.arange(128)
    curve = 2.4 + np.exp(-positions / 40)
    drawn = report.draw_plots(
        tmp_path,
        summary=example,
        rows=rows,
        loss_metrics=["distill/loss"],
        positions={
            "positions": positions,
            "teacher": curve,
            "students": {"align": curve + 1, "distill": curve + 0.1},
        },
        decoding={
            "context_lengths": lengths,
            "models": {
                "teacher": {
                    "seconds_per_token": [0.003, 0.004, 0.007],
                    "state_bytes": [n * 4096 for n in lengths],
                },
                "student": {"seconds_per_token": [0.003] * 3, "state_bytes": [196_608] * 3},
            },
        },
        scores={"scores": [0.02, 0.4, -0.01], "kept": [1]},
    )
    assert [path.name for path in drawn] == [name for name, _, _ in report.PICTURES]
    for path in drawn:
        width, height = png_size(path)
        assert width >= 1000 and height >= 600
        assert distinct_colours(path) > 20, path.name


def test_equal_numbers_give_an_equal_picture(tmp_path, example):
    first = plots.loss_against_tokens(tmp_path / "a.png", rows=[], metrics=[], stages=example["stages"])
    second = plots.loss_against_tokens(tmp_path / "b.png", rows=[], metrics=[], stages=example["stages"])
    assert first.read_bytes() == second.read_bytes()


def test_loss_picture_refuses_to_be_empty(tmp_path, rows):
    with pytest.raises(ValueError, match="neither"):
        plots.loss_against_tokens(tmp_path / "loss.png", rows=rows, metrics=["distill/typo"])


def test_report_holds_what_a_reader_needs(tmp_path, example, rows):
    report.draw_plots(tmp_path, summary=example, rows=rows)
    environment = {
        "python": "3.11.7",
        "platform": "Linux",
        "packages": {"torch": "2.13.0"},
        "git": {"commit": "abc123", "dirty": True},
        "cpu_count": 2,
        "torch_threads": 1,
        "accelerators": [],
    }
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    path = report.write_report(
        tmp_path,
        example,
        title="Quickstart",
        command=["python", "train.py", "experiment=quickstart", "name=two words"],
        config={
            "teacher": {"path": "assets/teacher", "hub_token": "hf_secret"},
            "stages": [{"name": "align", "tokens": 614_400, "data": None}],
            "logger": {"api_key": "wandb_secret"},
            "seed": 1,
        },
        transfer=[{"action": "copied", "tensors": 31}, {"action": "new", "tensors": 9}],
    )
    text = path.read_text()
    assert text.startswith(
        "# Quickstart\n\nAfter stage distill the student's held-out loss is 0.051 nats above"
    )
    assert "92% of the teacher's copy gain is kept." in text
    assert "python train.py experiment=quickstart 'name=two words'" in text
    assert "| teacher.path | assets/teacher |" in text and "| stages[0].tokens | 614400 |" in text
    assert "secret" not in text
    assert "| wkv7 | cpu | first \\| usable |" in text
    assert "| copied | 31 |" in text and "abc123 with uncommitted changes" in text
    links = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert links == ["plots/loss.png", "plots/alignment_align.png"]
    assert all((tmp_path / link).exists() for link in links)


def test_report_of_a_run_without_teacher_or_environment(tmp_path, example):
    example["teacher"] = None
    example["stages"] = [summary.stage_entry(name="pretrain", loss=2.68, tokens=1000, seconds=1.0)]
    path = report.write_report(tmp_path, example, title="Teacher", command="python train.py", config={})
    assert "After stage pretrain the held-out loss is 2.680 nats/token." in path.read_text()
