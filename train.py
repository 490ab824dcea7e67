"""Turns a Transformer into an RWKV model: `python train.py experiment=quickstart`.

The teacher's attention is replaced and its weights are moved (transfer); then each stage of `stages` brings
the student
nearer to the teacher: align, select, distill, ... The run folder holds everything that eval, generate and
    export need.
"""

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
    from pipeline.results import HeldOut, finish, log_kernel
    from pipeline.stages import remove_step_checkpoints, run_stage
    from pipeline.students import TRANSFER, starting_student, student_folder
    from reports.journal import Journal

    run = launch.begin(config)
    journal = Journal(run)
    started = time.perf_counter()
    tokenizer = launch.build(config.tokenizer, "tokenizer")
    teacher_config = launch.build(config.teacher, "teacher")
    teacher = load_teacher(teacher_config) if teacher_config.path else None
    student = starting_student(config, teacher, tokenizer, journal, run)
    log_kernel(student)
    if config.dry_run:
        launch.show_plan(config, student)
        return
    held_out = HeldOut(config, launch.build(config.data, "data", tokenizer=tokenizer), teacher, journal)
    held_out.measure_teacher()
    if teacher is not None and config.init_from is None:
        held_out.record(TRANSFER, student, tokens=0, seconds=time.perf_counter() - started)

    for name in config.stages:
        if journal.stage(name):
            continue
        stage = launch.build(config.stage[name], f"stage.{name}")
        student, facts = run_stage(config, stage, student, teacher, tokenizer, journal, run)
        save_student(student_folder(run, name), student, tokenizer, stage=name)
        held_out.record(name, student, **facts)
        remove_step_checkpoints(run, name)

    save_student(run / "student", student, tokenizer, stage=config.stages[-1])
    finish(config, student, teacher, journal, run)


if __name__ == "__main__":
    launch.register_resolvers()
    main()
