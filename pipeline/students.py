"""Where a run's student comes from, and what a selection makes of it."""

import csv
import logging
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf import launch
from conf.launch import build
from conf.stages import build_stage_data
from models import ranks
from models.architectures import attention_modules
from models.config import StudentConfig
from models.conversion import build_student, check_plan, kept_module, restore_attention
from models.layer_plan import ATTENTION, LayerPlan, with_names
from models.parallelize import (
    connect,
    full_tensors,
    is_sharded,
    process_mesh,
    recompute_blocks,
    shard,
)
from models.student import teacher_places
from models.student_folder import Student, empty_student, load_student, model_folder
from models.teacher import load_teacher, teacher_outline
from models.transfer import TransferRow, attention_prefix
from reports.journal import Journal

log = logging.getLogger(__name__)
TRANSFER = "transfer"
LAYER_NUMBER = re.compile(r"\.\d+\.")


def load_models(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase | None, journal: Journal, run_folder: Path
) -> tuple[PreTrainedModel | None, Student]:
    """The teacher (None where there is none) and the student to go on with, where `strategy` wants them."""
    sharded = config.strategy.name == "fsdp" and not config.dry_run
    device = launch.device(config)
    mesh = process_mesh(device) if sharded else None
    # A machine holds the whole models of one process at a time.
    with ranks.in_turn(config.trainer.devices) if sharded else nullcontext():
        teacher = _load_teacher(config)
        student = _starting_student(config, teacher, tokenizer, journal, run_folder)
        for model in (teacher, student.model) if sharded else ():
            if model is not None:
                shard(model, device, mesh)
    _make_ready(config, student.model)
    if sharded and teacher is not None:
        connect(teacher)
    return teacher, student


def load_run_tokenizer(config: DictConfig) -> PreTrainedTokenizerBase | None:
    """The run's tokenizer; None in a dry run that has the teacher's shape alone.

    Raises:
        ValueError: where the data of a stage needs what it has not, such as a chat template.
    """
    if _is_outlined(config):
        return None
    tokenizer = build(config.tokenizer, "tokenizer")
    for name in config.stages:
        build_stage_data(config, name, tokenizer=tokenizer)
    return tokenizer


def _load_teacher(config: DictConfig) -> PreTrainedModel | None:
    teacher = build(config.teacher, "teacher")
    if teacher.path is None:
        return None
    return teacher_outline(teacher) if _is_outlined(config) else load_teacher(teacher)


def _is_outlined(config: DictConfig) -> bool:
    """Whether the run needs neither weights nor network: a dry run of a teacher whose shape is bundled."""
    return config.dry_run and build(config.teacher, "teacher").shape_only


def _make_ready(config: DictConfig, student: PreTrainedModel) -> None:
    """What a student needs after it has been sharded or left whole, in place."""
    if config.trainer.recompute_blocks:
        recompute_blocks(student)
    if is_sharded(student):
        connect(student)


def _starting_student(
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
    attention = config.teacher.get("attention", "sdpa")
    if trained:
        return load_student(student_folder(run_folder, trained[-1]), attention)
    if config.init_from is not None:
        return load_student(model_folder(config.init_from), attention)
    torch.manual_seed(config.seed)
    if teacher is None:
        made = build(config.student, "student", tokenizer=tokenizer)
        if isinstance(made, Student):
            return made
        plan = [ATTENTION] * made.config.num_hidden_layers
        return Student(made.train(), plan, StudentConfig(layer_plan=LayerPlan(layers=plan)))
    student_config = build(config.student, "student")
    plan = check_plan(student_config, teacher.config)
    model, rows = build_student(teacher, student_config, plan)
    log_transfer(rows)
    if not journal.facts.get("transfer") and ranks.is_first():
        journal.note(transfer=transfer_summary(rows))
        write_transfer_table(rows, run_folder / "transfer.csv")
    return Student(model, plan, student_config)


def with_kept_layers(
    config: DictConfig, student: Student, teacher: PreTrainedModel, layers: list[int]
) -> Student:
    """The student with what its config has for kept layers in the given ones of the teacher's: a trainable
    copy of its attention, or a mixer with its weights.

    What such a mixer draws depends on `seed` alone, not on processes and stages before.
    """
    kept = student.config.layer_plan.kept
    plan = with_names(student.plan, dict.fromkeys(layers, kept))
    if not is_sharded(student.model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            restore_attention(student.model, teacher, layers, trainable=True, config=student.config)
        return Student(student.model, plan, student.config)
    # What a sharded model is made of cannot be exchanged: the student is made anew, from whole tensors.
    model = empty_student(student.model.config, student.config, plan)
    tensors, places = full_tensors(student.model), teacher_places(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for index in layers:
            prefix = attention_prefix(model, places[index])
            attention = full_tensors(attention_modules(teacher)[index])
            if student.config.is_mixer(kept):
                attention = kept_module(teacher, index, student.config, attention).state_dict()
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in attention.items()}
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    device = launch.device(config)
    shard(model.train(), device, process_mesh(device))
    _make_ready(config, model)
    return Student(model, plan, student.config)


def with_induction(config: DictConfig, student: Student, layers: list[int]) -> Student:
    """The student with a bank of induction heads in the RWKV-7 mixers of the given layers of the teacher's.

    It computes what it did, because a bank starts at 0. What a bank draws depends on `seed` alone.
    """
    options = student.config.options("rwkv7")
    banks = sorted({*options.induction_layers, *layers})
    mixers = {**student.config.mixers, "rwkv7": replace(options, induction_layers=banks)}
    changed = replace(student.config, mixers=mixers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = empty_student(student.model.config, changed, student.plan)
    model.load_state_dict(model.state_dict() | full_tensors(student.model))
    device, model = launch.device(config), model.train()
    if is_sharded(student.model):
        shard(model, device, process_mesh(device))
    else:
        model.to(device)
    _make_ready(config, model)
    return Student(model, student.plan, changed)


def frozen_copy(config: DictConfig, student: Student) -> PreTrainedModel:
    """The student as it stands, never to change again, where `strategy` wants it.

    A stage asks for it before it loads its own checkpoint. So a run that goes on in the middle of the stage
    makes the same copy again, from the student that the stage before has left.
    """
    model = empty_student(student.model.config, student.config, student.plan)
    model.load_state_dict(full_tensors(student.model))
    model.requires_grad_(False).eval()
    if is_sharded(student.model):
        device = launch.device(config)
        shard(model, device, process_mesh(device))
        connect(model)
    return model


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
