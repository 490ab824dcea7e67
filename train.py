"""Turns a Transformer into an RWKV model: `python train.py experiment=quickstart`.

The teacher's attention is replaced and its weights are moved (transfer); then each stage of `stages` brings
the student
nearer to the teacher: align, select, distill, ... The run folder holds everything that eval, generate and
    export need.
"""

import shutil
import time

import hydra
from omegaconf import DictConfig

from conf import launch


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@launch.plain_errors
def main(config: DictConfig) -> None:
    """One run, from the composed config to the table."""
    launch.check(config)
    from models.student_folder import save_student
    from models.teacher import load_teacher
    from pipeline.results import finish, measure_teacher, record_stage
    from pipeline.stages import run_stage
    from pipeline.students import TRANSFER, reference_loss, starting_student, student_folder
    from reports.journal import Journal

    run = launch.begin(config)
    journal = Journal(run)
    started = time.perf_counter()
    tokenizer = launch.build(config.tokenizer, "tokenizer")
    teacher_config = launch.build(config.teacher, "teacher")
    teacher = load_teacher(teacher_config) if teacher_config.path else None
    student = starting_student(config, teacher, tokenizer, journal, run)
    if config.dry_run:
        launch.show_plan(config, student)
        return
    data = launch.build(config.data, "data", tokenizer=tokenizer)
    measure_teacher(teacher, data, journal)
    transfer_loss = reference_loss(config, journal)
    if teacher is not None and transfer_loss is None:
        seconds = time.perf_counter() - started
        record_stage(TRANSFER, student, teacher, data, journal, tokens=0, seconds=seconds, transfer_loss=None)
        transfer_loss = reference_loss(config, journal)

    for name in config.stages:
        if journal.stage(name):
            continue
        stage = launch.build(config.stage[name], f"stage.{name}")
        student, cost, facts = run_stage(config, stage, student, teacher, tokenizer, journal, run)
        save_student(student_folder(run, name), student, tokenizer, stage=name)
        record_stage(name, student, teacher, data, journal, **cost, transfer_loss=transfer_loss, facts=facts)

    save_student(run / "student", student, tokenizer, stage=config.stages[-1])
    finish(config, student, teacher, journal, run)
    shutil.rmtree(run / "checkpoints", ignore_errors=not config.callbacks.get("checkpoint"))


if __name__ == "__main__":
    launch.register_resolvers()
    main()
