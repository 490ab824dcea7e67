"""What a composed run would cost: its models are counted without weights, its stages priced one by one."""

from typing import Any

import torch
from omegaconf import DictConfig

from conf.launch import build, stage_data
from models.conversion import build_student, check_plan, restore_attention
from models.cost import Hardware, Work, flops_per_token, kind_of, seconds
from models.layer_plan import ATTENTION
from models.memory import GIGABYTE, Setting, host_memory, make_it_fit, memory, overrides
from models.outline import Outline, outline, teacher_plan
from models.selection import SelectLayers
from models.stage import StageConfig
from models.teacher import DTYPES, teacher_outline

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
        stage = build(config.stage[name], f"stage.{name}")
        work = stage_work(config, stage, watched, outline(student, layers))
        setting = stage_setting(config, stage, teacher_config.dtype, hardware)
        entries.append(price(name, stage, work, setting, hardware, devices))
        hosts.append(host_memory(work, setting, 1 if single else hardware.devices))
        if isinstance(stage, SelectLayers):
            # Which layers it will keep is not known; the first ones cost the same.
            kept = [index for index, layer in enumerate(layers) if layer != ATTENTION][: stage.keep]
            restore_attention(student, teacher, kept, trainable=True)
            layers = [ATTENTION if index in kept else layer for index, layer in enumerate(layers)]
    hours = sum(entry["hours"] for entry in entries)
    return {
        "hardware": {"name": hardware.name, "devices": devices, "capacity_gb": hardware.capacity / GIGABYTE},
        "parameters": {"teacher": watched.parameters, "student": begun.parameters, "mixers": begun.mixers},
        "stages": entries,
        "total": {"hours": hours, "cost": sum(e["cost"] for e in entries), "currency": hardware.currency},
        "host_memory_gb": max(hosts) / GIGABYTE,
        "notes": notes(config, hardware),
    }


def stage_work(
    config: DictConfig, stage: StageConfig | SelectLayers, teacher: Outline, student: Outline
) -> Work:
    """What a stage does, as the cost model wants it."""
    data = stage_data(config, stage.name)
    objective = getattr(stage, "objective", None)
    rates = getattr(stage, "learning_rate", {"mixers": 0.0, "rest": 0.0})
    return Work(
        kind=kind_of(objective),
        student=student,
        teacher=teacher,
        asks_teacher=getattr(objective, "needs_teacher", True),
        mixers_trained=rates["mixers"] > 0,
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
        teacher_bytes=DTYPES[teacher_dtype].itemsize,
        optimizer_bytes=optimizer_bytes(stage),
        masked=not data.cross_documents,
    )


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
) -> dict[str, Any]:
    """One stage as plain data: work, time, money, memory, and what would make it fit."""
    tokens_per_step = setting.rows * work.row_length * setting.accumulate * devices
    steps, tokens = None, selection_tokens(stage, work)
    if isinstance(stage, StageConfig):
        steps = stage.steps(tokens_per_step)
        tokens = steps * tokens_per_step
    each = flops_per_token(work)
    hours = seconds(each * tokens, work.kind, hardware, devices, setting.precision) / 3600
    parts = memory(work, setting)
    total = sum(parts.values())
    fits = total <= hardware.capacity
    found = None if fits else make_it_fit(work, setting, hardware.capacity)
    return {
        "name": name,
        "kind": work.kind,
        "tokens": tokens,
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "trained": work.trained,
        "flops_per_token": each,
        "flops": each * tokens,
        "hours": hours,
        "tokens_per_second": tokens / (3600 * hours),
        "cost": hours * devices * hardware.price_per_device_hour,
        "memory_gb": {key: value / GIGABYTE for key, value in parts.items()},
        "total_gb": total / GIGABYTE,
        "fits": fits,
        "makes_it_fit": None if found is None else overrides(name, (work, setting), found),
    }


def selection_tokens(stage: StageConfig | SelectLayers, work: Work) -> int:
    """Tokens that a selection looks at: packed rows and passages shown twice, for each replaced layer and
    once more."""
    if isinstance(stage, StageConfig):
        return 0
    replaced = sum(layer != ATTENTION for layer in work.student.plan)
    return 2 * stage.rows * work.row_length * (replaced + 1)


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
