"""Runs one entry of `stages`, whatever its kind."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from callbacks.checkpoint import remove
from models import ranks
from models.calibration import CalibrateMixers
from models.selection import SelectLayers
from models.short_loss import CacheShortLoss
from models.student_folder import Student
from models.teacher_targets import CacheTeacher
from pipeline.calibration import calibrate
from pipeline.selection import select_layers
from pipeline.students import frozen_copy
from pipeline.teacher_cache import write_caches
from pipeline.training import train_stage
from reports.journal import Journal


def run_stage(
    config: DictConfig,
    stage: Any,
    student: Student,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal,
    run_folder: Path,
    loggers: list[Logger],
) -> tuple[Student, dict[str, Any]]:
    """Runs a training stage, a calibration, a selection, or the writing of a cache.

    Returns:
        The student afterwards, and the stage's facts for the journal: tokens, seconds and what it found out.
    """
    if isinstance(stage, SelectLayers):
        return select_layers(config, stage, student, teacher, tokenizer, journal, run_folder)
    if isinstance(stage, CalibrateMixers):
        return calibrate(config, stage, student, teacher, tokenizer, run_folder)
    if isinstance(stage, CacheTeacher | CacheShortLoss):
        return student, write_caches(config, stage, student.model, teacher, tokenizer)
    cost = train_stage(
        config,
        stage,
        student.model,
        teacher,
        tokenizer,
        loggers,
        run_folder=run_folder,
        tokens_before=journal.tokens(),
        reference=frozen_copy(config, student) if asks_reference(stage) else None,
    )
    return student, cost


def asks_reference(stage: Any) -> bool:
    """Whether the stage's objective compares the student with what it was before the stage."""
    return getattr(stage.objective, "needs_reference", False)


def remove_step_checkpoints(run_folder: Path, stage: str) -> None:
    """Deletes the optimiser checkpoints of a finished stage; its student folder is all that is needed."""
    if ranks.is_first():
        for path in (run_folder / "checkpoints" / stage).glob("step-*"):
            remove(path)
