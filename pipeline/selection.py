"""Chooses the layers that keep attention, and writes down why."""

import csv
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.launch import device as device_of
from conf.stages import build_stage_data
from data.datamodule import TextDataModule
from models import ranks
from models.layer_plan import ATTENTION, teacher_part, write_plan_file
from models.layer_scores import ScoringRows
from models.selection import SelectLayers
from models.student_folder import Student
from pipeline.students import with_kept_layers
from reports.journal import Journal

log = logging.getLogger(__name__)
TABLE = "layer_scores.csv"


def select_layers(
    config: DictConfig,
    stage: SelectLayers,
    student: Student,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal,
    run_folder: Path,
) -> tuple[Student, dict[str, Any]]:
    """Scores every replaced layer on training rows, and gives the best ones what the student's plan has for
    kept layers.

    Writes `layer_scores.csv` and `layer_plan.yaml` into the run folder.

    Returns:
        The student afterwards, and facts for the journal: seconds, scores and the chosen layers.
    """
    started = time.perf_counter()
    data = build_stage_data(config, stage.name, tokenizer=tokenizer)
    device = device_of(config)
    student.model.to(device)
    teacher.to(device)
    candidates = replaced_layers(student.plan, student.config.layer_plan.kept)
    stage.check_candidates(len(candidates))
    scores = stage.scores(student.model, teacher, candidates, scoring_rows(stage, data))
    kept = stage.choose(scores)
    log.info("Layers %s keep attention, by %s", kept, stage.by)
    chosen = with_kept_layers(config, student, teacher, kept)
    before = teacher_part(student.plan)
    every = [scores.get(index, 0.0) for index in range(len(before))]
    rounded = {index: float(f"{score:.6g}") for index, score in scores.items()}
    left = replaced_layers(chosen.plan, chosen.config.layer_plan.kept)
    all_kept = [index for index in range(len(before)) if index not in left]
    if ranks.is_first():
        write_scores(run_folder / TABLE, before, rounded, kept)
        write_plan_file(run_folder, chosen.plan, by=stage.by, kept=kept, scores=rounded)
    journal.note(selection={"scores": every, "kept": all_kept, "label": stage.criterion.label})
    seconds = time.perf_counter() - started
    return chosen, {"tokens": 0, "seconds": seconds, "scores": every, "kept": kept}


def replaced_layers(plan: Sequence[str], kept: str) -> list[int]:
    """The teacher's layers, by number, that have neither attention nor what the student has for kept
    layers."""
    return [index for index, name in enumerate(teacher_part(plan)) if name not in (ATTENTION, kept)]


def scoring_rows(stage: SelectLayers, data: TextDataModule) -> ScoringRows:
    """The kinds of training rows that the stage's criterion reads."""
    makers = {
        "plain": lambda: data.calibration_batches(stage.rows)[0],
        "copies": lambda: data.calibration_batches(stage.rows)[1],
        "retrieval": lambda: data.retrieval_batches(stage.task, stage.rows),
    }
    return {kind: makers[kind]() for kind in stage.criterion.reads}


def write_scores(path: Path, plan: Sequence[str], scores: Mapping[int, float], kept: Sequence[int]) -> None:
    """One line for each decoder layer of the teacher: what stood there before, its score (none where it was
    not scored), and whether the stage has chosen it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "before", "score", "chosen"))
        for index, name in enumerate(plan):
            writer.writerow((index, name, scores.get(index, ""), "yes" if index in kept else "no"))
