"""What a composed run would cost: its models are counted without weights, its stages priced one by one."""

from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from conf.launch import build
from conf.stages import build_stage, stage_data
from models.calibration import CalibrateMixers
from models.conversion import build_student, check_plan, restore_attention
from models.cost import Hardware, Work, flops_per_token, kind_of, seconds
from models.layer_plan import ATTENTION, teacher_part, with_names
from models.memory import GIGABYTE, Setting, host_memory, make_it_fit, memory, overrides
from models.outline import Outline, outline, teacher_plan
from models.selection import SelectLayers
from models.short_loss import CacheShortLoss
from models.stage import StageConfig
from models.student import GROUPS
from models.teacher import DTYPES, teacher_outline
from models.teacher_targets import CacheTeacher
from models.timeline import Timeline

PROBE = 2**16  # parameters on which an optimiser's state is measured


def make_plan(config: DictConfig, hardware: Hardware) -> dict[str, Any]:
    """Counts the models, then prices every entry of `stages`.

    Returns:
        {"hardware", "parameters", "stages", "total", "host_memory_gb", "notes"}: plain data, as in plan.json.

    Raises:
        ValueError: for a run that continues another one, or a model trained from scratch.
    """
    if config.init_from is not None:
        raise ValueError(
            "init_from: a plan begins with the teacher; leave it out and name the stages to price."
        )
    teacher_config = build(config.teacher, "teacher")
    if teacher_config.path is None:
        raise ValueError("teacher.path is null: plan.py prices conversions; name a teacher.")
    teacher = teacher_outline(teacher_config)
    student_config = build(config.student, "student")
    layers = check_plan(student_config, teacher.config)
    student = build_student(teacher, student_config, layers)[0]
    watched = outline(teacher, teacher_plan(teacher))
    begun = outline(student, layers)
    single = config.strategy.name == "single"
    devices = 1 if single else hardware.devices * hardware.nodes
    entries, hosts = [], []
    for name in config.stages:
        stage = build_stage(config, name)
        work = stage_work(config, stage, watched, outline(student, layers))
        setting = stage_setting(config, stage, teacher_config.dtype, hardware)
        read = selection_tokens(stage, work)
        if isinstance(stage, CacheTeacher | CacheShortLoss):  # windows that overlap by half read all twice
            read = int(config.stage[stage.of].tokens) * (2 if isinstance(stage, CacheShortLoss) else 1)
        entries.append(price(name, stage, work, setting, hardware, devices, read))
        hosts.append(host_memory(work, setting, 1 if single else hardware.devices))
        if isinstance(stage, SelectLayers):
            # Which layers it will keep is not known; the first ones cost the same.
            name = student_config.layer_plan.kept
            own = enumerate(teacher_part(layers))
            kept = [index for index, layer in own if layer not in (ATTENTION, name)][: stage.keep]
            restore_attention(student, teacher, kept, trainable=True, config=student_config)
            layers = with_names(layers, dict.fromkeys(kept, name))
    hours = sum(entry["hours"] for entry in entries)
    return {
        "hardware": {"name": hardware.name, "devices": devices, "capacity_gb": hardware.capacity / GIGABYTE},
        "parameters": {
            "teacher": watched.parameters,
            "student": begun.parameters,
            "mixers": begun.mixers,
            "inserted": begun.inserted,
        },
        "stages": entries,
        "total": {"hours": hours, "cost": sum(e["cost"] for e in entries), "currency": hardware.currency},
        "host_memory_gb": max(hosts) / GIGABYTE,
        "notes": notes(config, hardware) + expert_notes(watched),
    }


def stage_work(
    config: DictConfig, stage: StageConfig | SelectLayers, teacher: Outline, student: Outline
) -> Work:
    """What a stage does, as the cost model wants it."""
    data = stage_data(config, getattr(stage, "of", stage.name))
    objective = getattr(stage, "objective", None)
    cached = getattr(objective, "teacher_cache", None) is not None
    if isinstance(stage, CacheTeacher | CacheShortLoss):  # one model alone runs
        student, cached = student if getattr(stage, "by", "teacher") == "student" else teacher, True
    rates = getattr(stage, "learning_rate", dict.fromkeys(GROUPS, 0.0))
    return Work(
        kind=kind_of(objective),
        student=student,
        teacher=teacher,
        # A reference is a copy of the student, which costs about what the teacher does.
        asks_teacher=not cached and (getattr(objective, "needs_teacher", True) or _has_reference(objective)),
        mixers_trained=rates["mixers"] > 0,
        inserted_trained=rates["inserted"] > 0,
        rest_trained=rates["rest"] > 0,
        row_length=data.row_length,
        recompute=config.trainer.recompute_blocks,
    )


def stage_setting(
    config: DictConfig, stage: StageConfig | SelectLayers, teacher_dtype: str, hardware: Hardware
) -> Setting:
    """How a stage would run on the machine."""
    data = stage_data(config, stage.name)
    return Setting(
        devices=hardware.devices * hardware.nodes,
        strategy=config.strategy.name,
        precision=config.trainer.precision,
        rows=data.rows_per_device,
        accumulate=getattr(stage, "accumulate", 1),
        chunk_tokens=getattr(getattr(stage, "objective", None), "chunk_tokens", 0),
        teacher_bytes=DTYPES[teacher_dtype].itemsize + 4 * _has_reference(getattr(stage, "objective", None)),
        optimizer_bytes=optimizer_bytes(stage),
        masked=not data.cross_documents,
    )


def _has_reference(objective: Any) -> bool:
    """Whether a frozen float32 copy of the student stands beside the teacher."""
    return getattr(objective, "needs_reference", False)


def optimizer_bytes(stage: StageConfig | SelectLayers) -> float:
    """Bytes of state that the stage's optimiser keeps per parameter, found out by one step of it."""
    if not isinstance(stage, StageConfig):
        return 0.0
    parameter = torch.nn.Parameter(torch.zeros(256, PROBE // 256))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = stage.optimizer([parameter])
    optimizer.step()
    state = (value for value in optimizer.state[parameter].values() if torch.is_tensor(value))
    return sum(value.numel() * value.element_size() for value in state if value.numel() > 1) / PROBE


def price(
    name: str,
    stage: StageConfig | SelectLayers,
    work: Work,
    setting: Setting,
    hardware: Hardware,
    devices: int,
    read: int,
) -> dict[str, Any]:
    """One stage as plain data: work, time, money, memory, and what would make it fit.

    A stage that does not train reads `read` tokens.

    Where rows change their length, memory is that of the rows that need most.
    """
    steps, parts = None, [(work, setting, read)]
    if isinstance(stage, StageConfig):
        timeline = stage.timeline(row_length=work.row_length, rows_per_device=setting.rows, devices=devices)
        steps, parts = timeline.steps, _by_phase(timeline, work, setting)
    tokens = sum(count for *_, count in parts)
    flops = sum(flops_per_token(case) * count for case, _, count in parts)
    hours = seconds(flops, work.kind, hardware, devices, setting.precision) / 3600
    index = max(range(len(parts)), key=lambda index: sum(memory(*parts[index][:2]).values()))
    largest = parts[index][:2]
    rows_at = f"curriculum.{index}" if getattr(stage, "curriculum", []) else "data"
    needed = memory(*largest)
    total = sum(needed.values())
    fits = total <= hardware.capacity
    found = None if fits else make_it_fit(*largest, hardware.capacity)
    return {
        "name": name,
        "kind": work.kind,
        "tokens": tokens,
        "steps": steps,
        "curriculum": [{"row_length": case.row_length, "tokens": count} for case, _, count in parts],
        "trained": work.trained,
        "flops_per_token": flops / max(tokens, 1),
        "flops": flops,
        "hours": hours,
        "tokens_per_second": tokens / (3600 * hours) if hours else 0.0,
        "cost": hours * devices * hardware.price_per_device_hour,
        "memory_gb": {key: value / GIGABYTE for key, value in needed.items()},
        "total_gb": total / GIGABYTE,
        "fits": fits,
        "makes_it_fit": None if found is None else overrides(name, largest, found, rows_at),
    }


def _by_phase(timeline: Timeline, work: Work, setting: Setting) -> list[tuple[Work, Setting, int]]:
    """What a stage does in each phase, how, and over how many tokens."""
    return [
        (
            replace(work, row_length=phase.row_length),
            replace(setting, rows=phase.rows_per_device),
            phase.steps * phase.tokens_per_step,
        )
        for phase in timeline.phases
    ]


def selection_tokens(stage: StageConfig | SelectLayers, work: Work) -> int:
    """Tokens that a calibration or a selection reads, those read again included."""
    if isinstance(stage, StageConfig | CacheTeacher | CacheShortLoss):
        return 0
    if isinstance(stage, CalibrateMixers):
        return stage.tokens_read(work.row_length)
    replaced = sum(layer != ATTENTION for layer in teacher_part(work.student.plan))
    return stage.tokens_read(work.row_length, replaced)


def expert_notes(teacher: Outline) -> list[str]:
    """What is different about a teacher whose tokens each go through some of its experts."""
    if not teacher.idle:
        return []
    share = 1 - teacher.idle / teacher.parameters
    return [
        f"A token meets {share:.0%} of the teacher's parameters, the router's choice of experts: all of them "
        "take memory, those alone take time."
    ]


def notes(config: DictConfig, hardware: Hardware) -> list[str]:
    """Where the config and the machine do not go together."""
    trainer, said = config.trainer, []
    devices = hardware.devices * hardware.nodes
    if config.strategy.name == "single" and devices > 1:
        said.append(
            f"strategy=single uses one of the {devices} devices; choose strategy=fsdp or strategy=ddp with "
            f"trainer.devices={hardware.devices}."
        )
    elif (trainer.devices, trainer.num_nodes) != (hardware.devices, hardware.nodes):
        said.append(
            f"The config is for {trainer.devices} x {trainer.num_nodes} devices. On this machine set "
            f"trainer.devices={hardware.devices} trainer.num_nodes={hardware.nodes}; with rows_per_device as "
            f"it is, a step has {devices / (trainer.devices * trainer.num_nodes):g} times the rows."
        )
    return said
