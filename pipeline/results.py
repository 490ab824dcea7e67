"""Measures stages on held-out text and writes what a run leaves behind."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

import kernels
from callbacks.metrics_csv import read_metrics
from conf import launch
from models import ranks
from models.decoding import decoding_cost
from models.evaluation import held_out_row
from models.retrieval import answered_share, teacher_forced_answers
from models.sequence_state import cache_bytes_per_row
from models.student import count_parameters, student_mixers
from models.student_folder import Student
from pipeline.students import TRANSFER, reference_loss
from reports.journal import Journal
from reports.report import draw_plots, write_report
from reports.summary import stage_entry, write_summary
from reports.table import summary_table

log = logging.getLogger(__name__)


class HeldOut:
    """The held-out text of a run, and the ledger of how teacher and student do on it.

    Args:
        config: of the run.
        data: the data module; its held-out rows are the same for every run.
        teacher: or None.
        journal: where each row of the results table is kept.
    """

    def __init__(self, config: DictConfig, data: Any, teacher: PreTrainedModel | None, journal: Journal):
        self.config, self.teacher, self.journal = config, teacher, journal
        self.device = launch.device(config)
        self.batches, self.copies = data.validation_batches(), data.copy_batches()
        self.asks = data.labels_answers

    def measure_teacher(self) -> None:
        """Records the teacher's figures, once."""
        if self.teacher is None or "teacher" in self.journal.facts:
            return
        row, positions = self._measure(self.teacher.to(self.device), None)
        log.info("Teacher: %s", _words(row))
        self.journal.note(teacher={"copy_gain": None, **row, "positions": positions["loss"]})

    def record(self, name: str, student: Student, *, tokens: int, seconds: float, **facts: Any) -> None:
        """Measures the student as a stage has left it and adds the row to the journal, unless it is there.

        Args:
            name: of the stage.
            student: its state after the stage.
            tokens, seconds: the stage's own.
            facts: kept beside the figures.
        """
        if self.journal.stage(name):
            return
        models = [model for model in (student.model, self.teacher) if model is not None]
        for model in models:
            model.to(self.device)
        row, positions = self._measure(student.model, self.teacher)
        entry = stage_entry(
            name=name,
            loss=row["loss"],
            tokens=tokens,
            seconds=seconds,
            kl=row.get("kl"),
            top1_agreement=row.get("top1_agreement"),
            copy_gain=row.get("copy_gain"),
            transfer_loss=row["loss"] if name == TRANSFER else reference_loss(self.config, self.journal),
            teacher_loss=self.journal.facts.get("teacher", {}).get("loss"),
        )
        others = {key: row[key] for key in ("copy_first", "copy_second", "accuracy") if key in row}
        curves = {"positions": positions["loss"], "kl_positions": positions.get("kl")}
        self.journal.add({**entry, **others, **curves, **facts})
        log.info("After %s: %s", name, _words(row))

    def _measure(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """As `held_out_row`; where only answers have labels, also `accuracy`, the share of right ones."""
        row, positions = held_out_row(model, teacher, self.batches, self.copies)
        if self.asks:
            row["accuracy"] = answered_share(teacher_forced_answers(model, self.batches))
        return row, positions


def finish(
    config: DictConfig, student: Student, teacher: PreTrainedModel | None, journal: Journal, folder: Path
) -> None:
    """Measures decoding, then writes summary.json, plots and report.md, and prints the table."""
    for model in (student.model, teacher):
        if model is not None:
            model.to(launch.device(config))
    summary = run_summary(config, student, teacher, journal)
    decoding = _decoding(config, student, teacher)  # a sharded model needs every process
    if ranks.is_first():
        _write(config, summary, decoding, journal, folder)
    ranks.barrier()


def _write(
    config: DictConfig, summary: dict[str, Any], decoding: dict | None, journal: Journal, folder: Path
) -> None:
    shown = [stage for stage in journal.stages if stage["name"] != "select"] or journal.stages
    positions = {stage["name"]: stage["positions"] for stage in shown}
    teacher_positions = journal.facts.get("teacher", {}).get("positions")
    length = len(next(iter(positions.values())))
    metrics = folder / "metrics.csv"  # a run that only chooses layers has none
    draw_plots(
        folder,
        summary=summary,
        rows=read_metrics(metrics) if metrics.exists() else [],
        loss_metrics=[f"{name}/loss" for name in config.stages],
        positions={
            "positions": list(range(1, length + 1)),
            "students": positions,
            "teacher": teacher_positions,
        },
        decoding=decoding,
        scores=journal.facts.get("selection"),
    )
    write_report(
        folder,
        summary,
        title=f"{config.name}, {folder.name}",
        command=_command(folder),
        config=OmegaConf.to_container(config, resolve=True),
        transfer=journal.facts.get("transfer", ()),
        scores=journal.facts.get("selection"),
    )
    write_summary(folder / "summary.json", summary)  # last: a run that has it is finished
    console = Console()
    console.print(summary_table(summary))
    console.print(f"Report: {folder / 'report.md'}   student: {folder / 'student'}", highlight=False)


def run_summary(
    config: DictConfig, student: Student, teacher: PreTrainedModel | None, journal: Journal
) -> dict[str, Any]:
    """The contract of summary.json."""
    hidden = ("positions", "kl_positions")
    measured = journal.facts.get("teacher")
    return {
        "teacher": None if measured is None else {k: v for k, v in measured.items() if k not in hidden},
        "stages": [{k: v for k, v in stage.items() if k not in hidden} for stage in journal.stages],
        "kernels": chosen_kernels(student.model, config),
        "student": {
            "parameters": count_parameters(student.model),
            "state_bytes_per_row": state_bytes(student.model, config.data.row_length),
            "layer_plan": student.plan,
        },
        "seed": config.seed,
    }


def chosen_kernels(model: PreTrainedModel, config: DictConfig) -> dict[str, dict[str, Any]]:
    """Backend of every operator that this student runs on in training, and why; none where all is attention.

    Args:
        model: the student.
        config: of the run; says the device, the precision and the rows.
    """
    users = {mixer.operator: mixer for mixer in student_mixers(model).values() if mixer.operator is not None}
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else torch.float32
    choices = {}
    for operator, mixer in sorted(users.items()):
        if mixer.options.backend != "auto":
            choices[operator] = {"backend": mixer.options.backend, "reason": "named in the config"}
            continue
        heads, size = mixer.operator_heads
        units = config.data.rows_per_device * heads
        choices[operator] = kernels.explain(operator, device=device, dtype=dtype, head_size=size, units=units)
    return choices


def log_kernels(student: Student, config: DictConfig) -> None:
    """Logs which backend each operator of the student runs on, why, and why not the others."""
    for operator, choice in chosen_kernels(student.model, config).items():
        rejected = "".join(f"; not {name}: {why}" for name, why in choice.get("rejected", {}).items())
        log.info("Kernel %s: %s (%s)%s", operator, choice["backend"], choice["reason"], rejected)


@torch.no_grad()
def state_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Decoding memory of one row after `tokens` tokens: states, and keys and values of kept layers."""
    was_training = model.training
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    model.eval()(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    model.train(was_training)
    return cache_bytes_per_row(cache)


def _decoding(config: DictConfig, student: Student, teacher: PreTrainedModel | None) -> dict[str, Any] | None:
    contexts = list(config.evaluation.decoding_contexts)
    if not contexts or teacher is None:
        return None
    tokens = config.evaluation.decoding_tokens
    models = {"teacher": teacher, "student": student.model}
    return {"context_lengths": contexts, "models": decoding_cost(models, contexts, tokens)}


def _command(folder: Path) -> list[str]:
    path = folder / "environment.json"
    return ["python", *(json.loads(path.read_text())["command"] if path.exists() else ["train.py"])]


def _words(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())
