"""The wandb panels and charts of a run, on a stand-in for the wandb run."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from one_weight import STEPS, OneWeight, begin, fit

from callbacks.dashboard import Dashboard
from callbacks.metrics_csv import MetricsCsv, read_metrics
from callbacks.panel_charts import loss_chart, position_chart, results_table, scores_chart, thin
from callbacks.panels import PanelLogger, panel_name
from callbacks.text_samples import TextSamples
from pipeline.loggers import RunLoggers
from reports.journal import Journal


class FakeRun:
    """Stands for a wandb run and remembers what it was told."""

    id = "fake"

    def __init__(self, folder: Path | None = None):
        self.entries, self.steps, self.axes, self.artifacts = [], [], {}, []
        self.summary, self.dir = {}, str(folder)

    def log(self, entry, step, commit):
        assert commit
        self.entries.append(entry)
        self.steps.append(step)

    def define_metric(self, name, step_metric=None, step_sync=None):
        self.axes[name] = step_metric

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def save(self, path, base_path, policy):
        assert Path(path).is_relative_to(base_path)

    def tokens_of(self, name):
        return [entry["trainer/tokens"] for entry in self.entries if name in entry]


@pytest.mark.parametrize(
    ("metric", "panel"),
    [
        ("align/layer_3/alignment", "alignment/align/layer_3"),
        ("distill/kl", "losses/distill/kl"),
        ("distill/validation/loss", "losses/distill/validation/loss"),
        ("throughput/tokens_per_second", "throughput/tokens_per_second"),
        ("samples/align", "samples/align"),
        ("held_out/loss", "held_out/loss"),
        ("charts/loss", "charts/loss"),
        ("epoch", "trainer/epoch"),
    ],
)
def test_panel_names(metric, panel):
    assert panel_name(metric) == panel


def draw_nothing(path, *, rows, stage):
    """Draws an empty picture, and keeps how often it was asked to."""
    from PIL import Image

    draw_nothing.calls.append((path, len(rows), stage))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_dashboard_groups_panels_over_tokens(tmp_path):
    run, module, draw_nothing.calls = FakeRun(), OneWeight(), []
    panels = PanelLogger(run_folder=tmp_path, experiment=run)
    loggers = [panels, begin(MetricsCsv(run_folder=tmp_path), module)]
    dashboard = Dashboard(draw_heat_map=draw_nothing, run_folder=tmp_path, every_steps=4)
    samples = TextSamples(run_folder=tmp_path, prompts=["def f"], max_new_tokens=3)
    with panels.running():
        fit(module, tmp_path, loggers=loggers, callbacks=[dashboard, samples])
    tokens = [1000 + 64 * step for step in range(1, STEPS + 1)]
    assert run.tokens_of("losses/align/loss") == tokens == run.tokens_of("alignment/align/layer_0")
    assert run.axes == {"trainer/tokens": None, "*": "trainer/tokens"}
    assert run.steps == list(range(len(run.entries)))
    drawn = [1000 + 64 * step for step in (4, 8, STEPS)]
    assert run.tokens_of("alignment/align/heat_map") == drawn == run.tokens_of("charts/loss")
    assert draw_nothing.calls[-1] == (tmp_path / "plots" / "alignment_align.png", 2 * STEPS, "align")
    tables = [entry["samples/align"] for entry in run.entries if "samples/align" in entry]
    assert tables[0].data == [[STEPS, "def f", "ddd", "sss"]]


def test_charts_are_drawn_once_a_step_however_many_batches_it_has(tmp_path):
    run, module, draw_nothing.calls = FakeRun(), OneWeight(), []
    panels = PanelLogger(run_folder=tmp_path, experiment=run)
    loggers = [panels, begin(MetricsCsv(run_folder=tmp_path), module)]
    dashboard = Dashboard(draw_heat_map=draw_nothing, run_folder=tmp_path, every_steps=2)
    with panels.running():
        fit(
            module,
            tmp_path,
            loggers=loggers,
            callbacks=[dashboard],
            max_steps=4,
            accumulate_grad_batches=2,
        )
    assert run.tokens_of("alignment/align/heat_map") == [1000 + 64 * step for step in (2, 4)]


def test_dashboard_does_nothing_without_wandb(tmp_path):
    module = OneWeight()

    def refuse(*arguments, **options):
        raise RuntimeError("drawn for nobody")

    logger = begin(MetricsCsv(run_folder=tmp_path), module)
    dashboard = Dashboard(draw_heat_map=refuse, run_folder=tmp_path, every_steps=1)
    fit(module, tmp_path, loggers=[logger], callbacks=[dashboard])
    assert read_metrics(logger.path)
    with pytest.raises(ValueError, match=r"callbacks\.dashboard\.every_steps"):
        Dashboard(draw_heat_map=refuse, run_folder=tmp_path, every_steps=-1)


def stage_record(name: str, loss: float, tokens: int, **facts) -> dict:
    curve = [loss, loss / 2, float("nan")]
    return {"name": name, "loss": loss, "tokens": tokens, "positions": curve, "kl_positions": curve, **facts}


def test_a_resumed_journal_is_shown_from_its_beginning(tmp_path):
    config = OmegaConf.create({"logger": {}, "name": "x"})
    journal = Journal(tmp_path)
    journal.note(teacher={"loss": 2.0, "positions": [2.0, 1.0, float("nan")]})
    journal.add(stage_record("transfer", 6.0, 0, kl=3.0))
    journal.add(stage_record("align", 4.0, 100, kl=None))

    def shown(journal: Journal) -> tuple[RunLoggers, FakeRun]:
        loggers, run = RunLoggers(config, tmp_path), FakeRun(tmp_path / "wandb")
        loggers.panels = [PanelLogger(run_folder=tmp_path, experiment=run)]
        loggers.show(journal)
        return loggers, run

    loggers, run = shown(journal)
    journal.note(selection={"scores": [0.1, 0.2], "kept": [1], "label": "worth"})
    journal.add(stage_record("select", 3.0, 0, scores=[0.1, 0.2], kept=[1]))
    loggers.show(journal)
    loggers.show(journal)
    assert run.tokens_of("held_out/loss") == [0, 100, 100]
    assert run.tokens_of("held_out/kl") == [0], "what was not measured is left out"
    assert run.tokens_of("charts/layer_scores") == [100]
    assert run.summary["held_out/align/loss"] == 4.0 and run.summary["teacher/loss"] == 2.0
    assert [artifact.type for artifact in run.artifacts] == ["provenance"]
    _, again = shown(Journal(tmp_path))
    assert again.tokens_of("held_out/loss") == [0, 100, 100]
    table = again.entries[-1]["held_out/stages"]
    assert table.get_column("stage") == ["transfer", "align", "select", "teacher"]
    assert table.get_column("loss") == [6.0, 4.0, 3.0, 2.0]


def lines(chart) -> dict[str, list[tuple[float, float]]]:
    """Name of each line of a chart -> its points."""
    found = {}
    for x, name, y in zip(*(chart.table.get_column(c) for c in ("step", "lineKey", "lineVal")), strict=True):
        found.setdefault(name, []).append((x, y))
    return found


def test_loss_chart_has_the_teachers_line():
    rows = [{"metric": "distill/loss", "tokens": 10 * n, "value": 5.0 - n} for n in (1, 2, 3)]
    rows.append({"metric": "distill/layer_0/loss", "tokens": 40, "value": 0.0})
    stages = [stage_record("transfer", 6.0, 0), stage_record("distill", 3.0, 30)]
    assert lines(loss_chart(rows, stages, 1.5)) == {
        "distill/loss (training)": [(10, 4.0), (20, 3.0), (30, 2.0)],
        "student, held out": [(0, 6.0), (30, 3.0)],
        "teacher, held out": [(0, 1.5), (30, 1.5)],
    }
    assert "teacher, held out" not in lines(loss_chart(rows, [], None))
    assert loss_chart([], [], 1.5) is None


def test_charts_of_positions_layers_and_results():
    chart = position_chart({"align": [4.0, float("nan"), 2.0], "teacher": [1.0, 1.0, 1.0]}, "KL")
    assert lines(chart) == {"align": [(1, 4.0), (3, 2.0)], "teacher": [(1, 1.0), (2, 1.0), (3, 1.0)]}
    bars = scores_chart([0.5, 2.0], [1], "worth").table
    assert bars.data == [["0", 0.5], ["1 (kept)", 2.0]]
    table = results_table([stage_record("align", 4.0, 10)], None)
    assert table.data[0][:2] == ["align", 4.0] and table.data[0][3] is None


def test_thinning_keeps_ends_and_means():
    values = [float(n) for n in range(1000)]
    thinned = thin(values, 100)
    assert len(thinned) == 100 and thinned[0] == 4.5 and sum(thinned) / 100 == sum(values) / 1000
    assert thin([1, 2, 3], 100) == [1, 2, 3] and thin([], 3) == []
    assert len(thin(range(7), 3)) == 3
