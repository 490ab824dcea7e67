"""Turns a Transformer into an RWKV model: `python train.py experiment=quickstart`.

The teacher's attention is replaced and its weights are moved (transfer); then each stage of `stages` brings
the student nearer to the teacher: align, select, distill, ... The run folder holds everything that eval,
generate and export need.
"""

import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from conf import launch


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@launch.plain_errors
def main(config: DictConfig) -> float | None:
    """One run, from the composed config to the table; returns the number at `optimized_metric`."""
    launch.check(config)
    from pipeline.loggers import check_loggers, open_loggers
    from pipeline.sweep import check_metric, optimized_value

    check_metric(config)
    check_loggers(config)
    with launch.running(config) as run, open_loggers(config, run) as loggers:
        convert(config, run, loggers)
    return optimized_value(config)


def convert(config: DictConfig, run: Path, loggers: Any) -> None:
    """What every process of the run does: teacher, student, stages, results."""
    from models import ranks
    from models.student_folder import save_student
    from models.teacher import load_teacher, teacher_outline
    from pipeline.results import HeldOut, finish, log_kernel
    from pipeline.stages import remove_step_checkpoints, run_stage
    from pipeline.students import TRANSFER, place, starting_student, student_folder
    from reports.journal import Journal

    journal = Journal(run, writes=ranks.is_first())
    started = time.perf_counter()
    teacher_config = launch.build(config.teacher, "teacher")
    outlined = config.dry_run and teacher_config.shape_only  # no weights, no tokenizer, no network
    tokenizer = None if outlined else launch.build(config.tokenizer, "tokenizer")
    load = teacher_outline if outlined else load_teacher
    teacher = load(teacher_config) if teacher_config.path else None
    student = starting_student(config, teacher, tokenizer, journal, run)
    log_kernel(student)
    place(config, teacher, trained=False)
    place(config, student.model, trained=True)
    if config.dry_run:
        launch.show_plan(config, student)
        return
    held_out = HeldOut(config, launch.build(config.data, "data", tokenizer=tokenizer), teacher, journal)
    held_out.measure_teacher()
    if teacher is not None and config.init_from is None:
        held_out.record(TRANSFER, student, tokens=0, seconds=time.perf_counter() - started)
    loggers.show(journal)

    for name in config.stages:
        if journal.stage(name):
            continue
        stage = launch.build(config.stage[name], f"stage.{name}")
        student, facts = run_stage(config, stage, student, teacher, tokenizer, journal, run, loggers.all)
        save_student(student_folder(run, name), student, tokenizer, stage=name)
        held_out.record(name, student, **facts)
        loggers.show(journal)
        remove_step_checkpoints(run, name)

    save_student(run / "student", student, tokenizer, stage=config.stages[-1])
    finish(config, student, teacher, journal, run)
    loggers.finish()


if __name__ == "__main__":
    launch.register_resolvers()
    main()
