"""Where a run's student comes from, and what a selection makes of it."""

import csv
import logging
import re
from collections import Counter
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.launch import build
from models.config import StudentConfig
from models.conversion import TransferRow, build_student, check_plan, restore_attention
from models.layer_plan import ATTENTION, LayerPlan
from models.student_folder import Student, load_student
from reports.journal import Journal

log = logging.getLogger(__name__)
TRANSFER = "transfer"
LAYER_NUMBER = re.compile(r"\.\d+\.")


def starting_student(
    config: DictConfig,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal,
    run_folder: Path,
) -> Student:
    """The student to go on with: of the last finished stage, of `init_from`, or made from the teacher.

    A student made anew depends on `seed` alone, so a resumed run makes the same one again.
    """
    trained = [stage["name"] for stage in journal.stages if stage["name"] != TRANSFER]
    if trained:
        return load_student(student_folder(run_folder, trained[-1]), config.teacher.get("attention", "sdpa"))
    if config.init_from is not None:
        return load_student(Path(config.init_from) / "student", config.teacher.get("attention", "sdpa"))
    torch.manual_seed(config.seed)
    if teacher is None:
        model = build(config.student, "student", tokenizer=tokenizer)
        plan = [ATTENTION] * model.config.num_hidden_layers
        return Student(model.train(), plan, StudentConfig(layer_plan=LayerPlan(layers=plan)))
    student_config = build(config.student, "student")
    plan = check_plan(student_config, teacher.config)
    model, rows = build_student(teacher, student_config, plan)
    log_transfer(rows)
    if not journal.facts.get("transfer"):
        journal.note(transfer=transfer_summary(rows))
        write_transfer_table(rows, run_folder / "transfer.csv")
    return Student(model, plan, student_config)


def with_kept_layers(student: Student, teacher: PreTrainedModel, layers: list[int]) -> Student:
    """The student with the teacher's attention, as a trainable copy, in the given layers."""
    restore_attention(student.model, teacher, layers, trainable=True)
    plan = [ATTENTION if index in layers else name for index, name in enumerate(student.plan)]
    return Student(student.model, plan, student.config)


def reference_loss(config: DictConfig, journal: Journal) -> float | None:
    """The held-out loss right after weight transfer, from this run or from the one it continues; None if
    unknown."""
    own = journal.stage(TRANSFER)
    if own is None and config.init_from is not None:
        own = Journal(config.init_from).stage(TRANSFER)
    return own["loss"] if own else None


def student_folder(run_folder: Path, stage: str) -> Path:
    """Where the student stands that a finished stage has made."""
    return run_folder / "checkpoints" / stage / "student"


def transfer_summary(rows: list[TransferRow]) -> list[dict[str, object]]:
    """Tensors by what became of them, for the report."""
    return [
        {"action": action, "tensors": sum(row.action == action for row in rows)}
        for action in sorted({row.action for row in rows})
    ]


def write_transfer_table(rows: list[TransferRow], path: Path) -> None:
    """Every tensor of the teacher and the student, as a table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(TransferRow._fields)
        writer.writerows(rows)


def log_transfer(rows: list[TransferRow]) -> None:
    """Logs what became of every tensor; layers that fare alike share a line."""
    alike = Counter(TransferRow(*(LAYER_NUMBER.sub(".*.", cell) for cell in row)) for row in rows)
    width = max(len(row.source) for row in alike)
    lines = [
        f"{count:4} x  {row.source or '-':{width}}  {row.action:7}  {row.target or '-'}  {row.shape}"
        for row, count in alike.items()
    ]
    log.info(
        "Weight transfer (tensors, in the teacher, action, in the student, shape):\n%s", "\n".join(lines)
    )
