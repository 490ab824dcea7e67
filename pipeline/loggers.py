"""The loggers of a run, made once for all its stages, and what Weights & Biases learns beside the metrics."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from callbacks.artifacts import log_model, log_provenance
from callbacks.metrics_csv import read_metrics
from callbacks.panel_charts import COLUMNS, loss_chart, position_chart, results_table, scores_chart
from callbacks.panels import PanelLogger, panel_loggers
from callbacks.provenance import describe_environment, hide_secrets_in
from conf.launch import build
from models import ranks
from reports.journal import Journal

TAG_LENGTH = 64  # characters, wandb's own limit


class RunLoggers:
    """The loggers of a run. `open_loggers` makes one.

    Args:
        config: of the run.
        run_folder: of the run.
    """

    def __init__(self, config: DictConfig, run_folder: Path):
        self.config, self.folder = config, run_folder
        self.all = _build_loggers(config)
        self.panels: list[PanelLogger] = panel_loggers(self.all)
        self._shown: set[str] = set()
        self._has_provenance = False

    def show(self, journal: Journal) -> None:
        """Logs the results of teacher and stages that the journal has and the panels do not have yet.

        In a resumed run that is first everything the earlier attempts found, so that nothing is missing
        where one of them was killed; it lies on the same tokens as before.
        """
        if not self.panels or not ranks.is_first():
            return
        if not self._has_provenance:  # at the first call, when the weights have been transferred
            self._has_provenance = True
            for panel in self.panels:
                log_provenance(panel.experiment, self._provenance())
        teacher = journal.facts.get("teacher")
        tokens = 0
        for index, stage in enumerate(journal.stages):
            tokens += stage["tokens"]
            if stage["name"] not in self._shown:
                self._shown.add(stage["name"])
                self._show_stage(journal.stages[: index + 1], teacher, journal.facts.get("selection"), tokens)

    def finish(self) -> None:
        """Logs what summary.json says of the finished run, and with `log_student` the student."""
        if not self.panels or not ranks.is_first():
            return
        summary = json.loads((self.folder / "summary.json").read_text())
        last, student = summary["stages"][-1], summary["student"]
        kernels = {f"kernels/{name}": choice["backend"] for name, choice in summary["kernels"].items()}
        facts = _figures(last, "held_out") | kernels
        facts |= {f"student/{name}": student[name] for name in ("parameters", "state_bytes_per_row")}
        facts["student/layer_plan"] = " ".join(student["layer_plan"])
        for panel in self.panels:
            panel.experiment.summary.update(facts)
            if panel.log_student:
                log_model(panel.experiment, self.folder / "student", facts)

    def _show_stage(
        self, stages: list[dict[str, Any]], teacher: dict | None, selection: dict | None, tokens: int
    ) -> None:
        """Logs the newest of the given stages: figures, the table so far, and the charts that it changes."""
        newest = stages[-1]
        figures = _figures(newest, "held_out")
        if teacher is not None:
            figures["held_out/teacher_loss"] = teacher["loss"]
        charts = _position_charts(stages, teacher)
        metrics = self.folder / "metrics.csv"
        rows = read_metrics(metrics) if metrics.exists() else []
        charts["charts/loss"] = loss_chart(rows, stages, teacher and teacher["loss"])
        if selection is not None and "scores" in newest:
            shown = (selection[key] for key in ("scores", "kept", "label"))
            charts["charts/layer_scores"] = scores_chart(*shown)
        for panel in self.panels:
            panel.stages = list(stages)
            panel.teacher_loss = teacher and teacher["loss"]
            table = results_table(stages, teacher)
            panel.log_panels({**figures, **charts, "held_out/stages": table}, tokens=tokens)
            summary = _figures(newest, f"held_out/{newest['name']}")
            panel.experiment.summary.update(summary | _figures(teacher or {}, "teacher"))

    def _provenance(self) -> dict[str, str]:
        """Where numbers come from, free of secrets: config, environment and git, every tensor's origin."""
        config = hide_secrets_in(OmegaConf.to_container(self.config, resolve=True))
        files = {
            "config.yaml": OmegaConf.to_yaml(OmegaConf.create(config)),
            "environment.json": json.dumps(describe_environment(), indent=2) + "\n",
        }
        transfer = self.folder / "transfer.csv"
        return files | ({"transfer.csv": transfer.read_text()} if transfer.exists() else {})


def check_loggers(config: DictConfig) -> None:
    """Refuses what the loggers cannot do, before there is a run folder.

    Raises:
        ValueError: for a key or value that a logger refuses, or where wandb is wanted online and nobody has
            logged in.
    """
    for panel in panel_loggers(_build_loggers(config)):
        panel.check()


@contextmanager
def open_loggers(config: DictConfig, run_folder: Path) -> Iterator[RunLoggers]:
    """Makes the loggers of a run, and ends the wandb run with the block, as failed if an error leaves it.

    Args:
        config: of the run.
        run_folder: of the run.
    """
    loggers = RunLoggers(config, run_folder)
    with ExitStack() as open_runs:
        for panel in loggers.panels:
            panel.describe(**describe_run(config, run_folder))
            if not config.dry_run:
                open_runs.enter_context(panel.running())
        yield loggers


def describe_run(config: DictConfig, run_folder: Path) -> dict[str, Any]:
    """What wandb shows of a run unless `logger.wandb` says something else.

    Returns:
        Options of `wandb.init`: name; group (a sweep's folder, None for a single run); job_type; tags (the
        chosen teacher and student, then the stages); config, resolved.
    """
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    teacher = choices.get("teacher") or Path(str(config.teacher.get("path"))).name
    student = None if config.init_from else choices.get("student")  # else it is another run's
    words = [teacher, student, choices.get("experiment"), *config.stages]
    tags = [str(word)[:TAG_LENGTH] for word in words if word not in (None, "null", "none", "None")]
    sweep = None
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep = f"{config.name}/{Path(HydraConfig.get().sweep.dir).name}"
    return {
        "name": f"{config.name} {run_folder.name}",
        "group": sweep,
        "job_type": "sweep" if sweep else "train",
        "tags": list(dict.fromkeys(tags)),
        "config": OmegaConf.to_container(config, resolve=True),
    }


def _build_loggers(config: DictConfig) -> list[Logger]:
    return [build(logger, f"logger.{name}") for name, logger in config.logger.items() if logger]


def _figures(record: dict[str, Any], group: str) -> dict[str, float]:
    """The figures of a stage or of the teacher under one group of panels; those not measured are left out."""
    return {f"{group}/{name}": record[name] for name in COLUMNS if record.get(name) is not None}


def _position_charts(stages: list[dict[str, Any]], teacher: dict | None) -> dict[str, Any]:
    losses = {stage["name"]: stage["positions"] for stage in stages}
    losses |= {"teacher": teacher["positions"]} if teacher else {}
    divergences = {stage["name"]: stage["kl_positions"] for stage in stages if stage.get("kl_positions")}
    charts = {"charts/loss_by_position": position_chart(losses, "Loss by position (nats/token)")}
    if divergences:
        title = "KL(teacher || student) by position (nats/token)"
        charts["charts/kl_by_position"] = position_chart(divergences, title)
    return charts
