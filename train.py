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
    from conf.stages import build_stage
    from models import ranks
    from models.student_folder import save_student
    from pipeline.results import HeldOut, finish, log_kernels
    from pipeline.stages import remove_step_checkpoints, run_stage
    from pipeline.students import TRANSFER, load_models, load_run_tokenizer, student_folder
    from reports.journal import Journal

    journal = Journal(run, writes=ranks.is_first())
    ranks.barrier()  # all have read it before the first one writes
    started = time.perf_counter()
    tokenizer = load_run_tokenizer(config)
    teacher, student = load_models(config, tokenizer, journal, run)
    log_kernels(student, config)
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
        stage = build_stage(config, name)
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
