"""The stages of a run: each one's config, data and steps, and whether they fit one another."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.build import build
from conf.ranks import process_count


def build_stage(config: DictConfig, name: str) -> Any:
    """The stage of that name; its `data` stays plain, because that may be a config with a `_target_` itself.

    Raises:
        ValueError: as for `build`.
    """
    node = config.stage[name]
    if "data" not in node:
        return build(node, f"stage.{name}")
    stage = build(node, f"stage.{name}", data=None)
    return replace(stage, data=OmegaConf.to_container(node.data, resolve=True) if node.data else {})


def build_stage_data(config: DictConfig, stage: str, **arguments: Any) -> Any:
    """The data module of a stage.

    Raises:
        ValueError: as for `build`, naming the keys of the stage's own data where it has them.
    """
    own = "_target_" in (config.stage[stage].get("data") or {})
    try:
        return build(stage_data(config, stage), "data", **arguments)
    except ValueError as error:
        if not own:
            raise
        said = str(error)
        raise ValueError(f"stage.{stage}.{'' if said.startswith('data') else 'data: '}{said}") from error


def stage_data(config: DictConfig, stage: str) -> DictConfig:
    """The data config of a stage: `data` with the overrides of `stage.<name>.data`, and the rows that a table
    of `stage.<name>.curriculum` ends with. With a `_target_`, `stage.<name>.data` stands for itself.

    Raises:
        ValueError: where an override is no key of `data`.
    """
    overrides = config.stage[stage].get("data") or {}
    base = () if "_target_" in overrides else (config.data,)
    unknown = sorted(set(overrides) - set(config.data)) if base else []
    if unknown:
        raise ValueError(
            f"stage.{stage}.data: {unknown} is no key of data; keys are {', '.join(config.data)}."
        )
    table = config.stage[stage].get("curriculum") or []
    last = {key: table[-1][key] for key in ("row_length", "rows_per_device")} if table else {}
    return OmegaConf.merge(*base, overrides, last)


def stage_timeline(config: DictConfig, stage: Any, devices: int) -> Any:
    """The optimiser steps of a training stage on so many devices (models/timeline.py).

    Raises:
        ValueError: where not even one fits into its budget.
    """
    data = stage_data(config, stage.name)
    return stage.timeline(row_length=data.row_length, rows_per_device=data.rows_per_device, devices=devices)


def checked_stage(config: DictConfig, name: str, teacher: Any) -> Any:
    """A stage that fits its name, the teacher and its data."""
    stage = build_stage(config, name)
    if stage.name != name:
        raise ValueError(f"stage.{name}.name={stage.name!r} must be {name!r}: results are kept by it.")
    needs_teacher = getattr(getattr(stage, "objective", stage), "needs_teacher", True)
    if teacher.path is None and needs_teacher:
        raise ValueError(
            f"stage.{name} needs a teacher; teacher.path is null. Choose teacher=tiny_qwen2 or teacher=hub."
        )
    if getattr(stage, "segment_length", 0) and config.trainer.recompute_blocks:
        raise ValueError(
            f"stage.{name}.segment_length={stage.segment_length} and trainer.recompute_blocks=true: a block "
            "that is computed again would find the state of a later segment. Set one of them to 0 or false."
        )
    data = stage_data(config, name)
    module = build_stage_data(config, name, tokenizer=None)
    _check_rows(stage, module)
    if hasattr(stage, "timeline"):
        phases = stage_timeline(config, stage, process_count(config)).phases  # refuses what gets no step
        for length in {phase.row_length for phase in phases} - {data.row_length}:
            build(OmegaConf.merge(data, {"row_length": length}), "data", tokenizer=None)
    return stage


def build_callbacks(config: DictConfig) -> dict[str, Any]:
    """The callbacks of a run, by name, in their order; those that are null are left out.

    Raises:
        ValueError: as for `build`, and for one that has options but no class.
    """
    given = {name: callback for name, callback in config.callbacks.items() if callback}
    for name, callback in given.items():
        if "_target_" not in callback:
            raise ValueError(
                f"callbacks.{name} has options but no _target_: this run switches it off, or it is misspelt; "
                "leave them out, or say which class it is."
            )
    return {name: build(callback, f"callbacks.{name}") for name, callback in given.items()}


def check_callbacks(config: DictConfig, stage: Any, callbacks: Mapping[str, Any]) -> None:
    """Refuses a stage whose curriculum asks for what no callback of the run does.

    Args:
        config: of the run.
        stage: as built; one that does not train passes.
        callbacks: the run's, by name.

    Raises:
        ValueError: naming the key and the fix.
    """
    if not hasattr(stage, "timeline"):
        return
    served = {getattr(callback, "serves", None) for callback in callbacks.values()}
    timeline = stage_timeline(config, stage, process_count(config))
    dense = [index for index, phase in enumerate(timeline.phases) if phase.attention == "dense"]
    needs = {
        "attention": (dense, "attention=dense", "context_curriculum.ContextCurriculum"),
        "freezing": (stage.freezing_phases(timeline), "learning_rate of 0", "preheat.Preheat"),
    }
    for service, (phases, asked, target) in needs.items():
        if phases and service not in served:
            name = target.partition(".")[0]
            raise ValueError(
                f"stage.{stage.name}.curriculum[{phases[0]}] asks for {asked}, which is the work of a "
                f"callback that this run lacks; set +callbacks.{name}._target_=callbacks.{target}, or take "
                "it out of the entry."
            )


def _check_rows(stage: Any, data: Any) -> None:
    """Holds what a stage learns from against what its data gives."""
    key = f"stage.{stage.name}"
    if hasattr(stage, "check_row_length"):
        stage.check_row_length(data.row_length)
    if getattr(getattr(stage, "objective", None), "rows_together", 1) > data.rows_together:
        raise ValueError(
            f"{key}.objective compares pairs, and its data has none; set data@{key}.data=preferences."
        )
    whole = [name for name, source in data.sources.items() if hasattr(source, "packed")]
    if whole and getattr(stage, "curriculum", []):
        raise ValueError(
            f"{key}.curriculum: conversations ({', '.join(whole)}) are packed whole, in rows of one length; "
            f"set {key}.curriculum=[] and {key}.data.row_length."
        )
