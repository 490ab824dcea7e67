"""Holds a teacher cache against the stage that writes it or trains from it, before any weight is loaded."""

from typing import Any

from omegaconf import DictConfig

from conf import launch
from conf.ranks import process_count
from conf.stages import build_stage, build_stage_data, stage_timeline
from data.teacher_cache import check_cache, read_manifest
from data.teacher_cache_writer import TeacherCacheWriter
from data.token_store import tokenizer_fingerprint


def wanted(config: DictConfig, name: str, tokenizer: Any) -> tuple[dict[str, Any], int]:
    """What the cached targets of a stage are made from, and how many rows the stage reads.

    Args:
        config: of the run.
        name: of a stage that distils.
        tokenizer: of the run.

    Raises:
        ValueError: for a table of row lengths: a cache holds rows of one length.
    """
    from models.teacher import load_hf_config
    from models.teacher_targets import teacher_identity

    stage, teacher = build_stage(config, name), launch.build(config.teacher, "teacher")
    data = build_stage_data(config, name, tokenizer=None)
    phases = stage_timeline(config, stage, process_count(config)).phases
    if len(phases) > 1:
        raise ValueError(
            f"stage.{name}.row_lengths has {len(phases)} entries, and a teacher cache holds rows of one "
            f"length; give one entry, or set stage.{name}.objective.teacher_cache=null."
        )
    rows = phases[0].steps * phases[0].rows_per_device * stage.accumulate * process_count(config)
    inputs = {
        "teacher": teacher_identity(teacher),
        "vocabulary": load_hf_config(teacher).get_text_config().vocab_size,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "temperature": float(stage.objective.temperature),
        "data": data.row_inputs(),
    }
    return inputs, min(rows, data.repeat_first_rows or rows)


def cache_writer(config: DictConfig, stage: Any, tokenizer: Any) -> TeacherCacheWriter:
    """What writes the cache of a stage.

    Args:
        config: of the run.
        stage: models.teacher_targets.CacheTeacher.
        tokenizer: of the run.
    """
    inputs, rows = wanted(config, stage.of, tokenizer)
    inputs |= {"top_k": stage.top_k, "rows_per_part": stage.rows_per_part}
    notes = {"teacher": {key: config.teacher.get(key) for key in ("path", "revision", "dtype")}}
    return TeacherCacheWriter(stage.folder, inputs, rows, notes, f"stage.{stage.name}.folder")


def check_teacher_cache(config: DictConfig, stage: Any) -> None:
    """Checks a stage that writes a cache, and one that trains from a cache that no earlier stage will write.

    Args:
        config: of the run.
        stage: as built; one that has to do with no cache passes.

    Raises:
        ValueError: naming the key and the fix.
    """
    if hasattr(stage, "top_k"):
        _check_writer(config, stage)
    folder = getattr(getattr(stage, "objective", None), "teacher_cache", None)
    if folder is None:
        return
    before = [config.stage[name] for name in list(config.stages)[: list(config.stages).index(stage.name)]]
    if not any(earlier.get("folder") == folder and earlier.get("of") == stage.name for earlier in before):
        check_reading(config, stage, launch.build(config.tokenizer, "tokenizer"))


def check_reading(config: DictConfig, stage: Any, tokenizer: Any) -> None:
    """Refuses a cache that is not whole, too short for the stage, or made from something else.

    Args:
        config: of the run.
        stage: trains from `objective.teacher_cache`.
        tokenizer: of the run.

    Raises:
        ValueError: naming the key and the fix.
    """
    key = f"stage.{stage.name}.objective.teacher_cache"
    found = read_manifest(stage.objective.teacher_cache, key)["inputs"]
    inputs, rows = wanted(config, stage.name, tokenizer)
    chosen = {name: found[name] for name in ("top_k", "rows_per_part") if name in found}  # by who wrote it
    check_cache(stage.objective.teacher_cache, {**inputs, **chosen}, rows, key)


def _check_writer(config: DictConfig, writer: Any) -> None:
    key, names = f"stage.{writer.name}", list(config.stages)
    if writer.of not in config.stage or "temperature" not in config.stage[writer.of].get("objective", {}):
        raise ValueError(f"{key}.of={writer.of} is no stage that distils; name one, such as distill.")
    target = cache_writer(config, writer, launch.build(config.tokenizer, "tokenizer"))
    vocabulary = target.inputs["vocabulary"]
    if writer.top_k > vocabulary:
        raise ValueError(f"{key}.top_k={writer.top_k} is more than the teacher's {vocabulary} ids; lower it.")
    target.check()
    if writer.of not in names:
        return
    if names.index(writer.of) < names.index(writer.name):
        raise ValueError(
            f"stages={names}: put {writer.name} before {writer.of}, which trains from its cache."
        )
    if config.stage[writer.of].objective.teacher_cache != writer.folder:
        raise ValueError(
            f"stages={names}: {writer.of} would not train from the cache of {writer.name}; set "
            f"stage.{writer.of}.objective.teacher_cache={writer.folder}."
        )
