"""Runs one entry of `stages`, whatever its kind."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from callbacks.checkpoint import remove
from conf.launch import build
from conf.launch import device as device_of
from models import ranks
from models.layer_plan import ATTENTION
from models.selection import SelectLayers
from models.student_folder import Student
from pipeline.students import with_kept_layers
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
    """Runs a training stage or a selection.

    Returns:
        The student afterwards, and the stage's facts for the journal: tokens, seconds and what it found out.
    """
    if isinstance(stage, SelectLayers):
        return select_layers(config, stage, student, teacher, tokenizer, journal)
    cost = train_stage(
        config,
        stage,
        student.model,
        teacher,
        tokenizer,
        loggers,
        run_folder=run_folder,
        tokens_before=journal.tokens(),
    )
    return student, cost


def select_layers(
    config: DictConfig,
    stage: SelectLayers,
    student: Student,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal,
) -> tuple[Student, dict[str, Any]]:
    """Scores every replaced layer on training rows, and gives the best ones the teacher's attention back."""
    started = time.perf_counter()
    data = build(config.data, "data", tokenizer=tokenizer)
    device = device_of(config)
    student.model.to(device)
    teacher.to(device)
    replaced = [index for index, name in enumerate(student.plan) if name != ATTENTION]
    scores = stage.scores(student.model, teacher, replaced, *data.calibration_batches(stage.rows))
    kept = stage.choose(scores)
    chosen = with_kept_layers(config, student, teacher, kept)
    every = [scores.get(index, 0.0) for index in range(len(student.plan))]
    label = {"kl": "KL saved by keeping attention (nats/token)", "copy": "copying gain saved (nats/token)"}[
        stage.by
    ]
    all_kept = [index for index, name in enumerate(chosen.plan) if name == ATTENTION]
    journal.note(selection={"scores": every, "kept": all_kept, "label": label})
    seconds = time.perf_counter() - started
    return chosen, {"tokens": 0, "seconds": seconds, "scores": every, "kept": kept}


def remove_step_checkpoints(run_folder: Path, stage: str) -> None:
    """Deletes the optimiser checkpoints of a finished stage; its student folder is all that is needed."""
    if ranks.is_first():
        for path in (run_folder / "checkpoints" / stage).glob("step-*"):
            remove(path)
