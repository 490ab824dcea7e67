"""Runs a calibration and writes what it has set."""

import csv
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.launch import device as device_of
from conf.stages import build_stage_data
from data.loader import collate
from models import ranks
from models.calibration import CalibrateMixers, CalibrationRow
from models.student_folder import Student
from pipeline.students import with_induction

log = logging.getLogger(__name__)
TABLE = "calibration.csv"


def calibrate(
    config: DictConfig,
    stage: CalibrateMixers,
    student: Student,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_folder: Path,
) -> tuple[Student, dict[str, Any]]:
    """Sets the student's starting values from the first training rows, and writes `calibration.csv`.

    Returns:
        The student, with a bank of induction heads where the teacher has such heads, and facts for the
        journal: the tokens that its fit has trained on, and seconds.
    """
    started = time.perf_counter()
    data = build_stage_data(config, stage.name, tokenizer=tokenizer)
    rows, size = data.train_rows(), data.rows_per_device
    taken = [rows.row(index) for index in range(stage.rows)]
    batches = [collate(taken[start : start + size]) for start in range(0, len(taken), size)]
    device = device_of(config)
    for model in (student.model, teacher):
        model.to(device)
    copies = data.calibration_batches(stage.rows)[1] if stage.induction else []
    found = stage.find_induction(student.model, teacher, copies)
    if found:
        log.info("Layers with a bank of induction heads: %s", ", ".join(map(str, found)))
        student = with_induction(config, student, list(found))
    mixed = config.trainer.precision == "bf16-mixed"
    precision = partial(torch.autocast, torch.device(device).type, dtype=torch.bfloat16, enabled=mixed)
    table, tokens = stage.calibrate(student.model, teacher, batches, found, copies, precision)
    if ranks.is_first():
        write_table(table, run_folder / TABLE)
    for layer in sorted({row.layer for row in table}):
        row = next(row for row in table if row.layer == layer)
        log.info(
            "Layer %d calibrated: error %.3f, was %.3f (of the output's energy)",
            layer,
            row.layer_error_after,
            row.layer_error_before,
        )
    return student, {"tokens": tokens, "seconds": time.perf_counter() - started}


def write_table(rows: Sequence[CalibrationRow], path: Path) -> None:
    """One line for each head; a cell is empty where nothing was set."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CalibrationRow._fields)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
