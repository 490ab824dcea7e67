"""Holds caches of what a model says against the stages that write them or train from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from conf import launch
from conf.ranks import process_count
from conf.stages import build_stage, build_stage_data, stage_timeline
from data.teacher_cache import MANIFEST, check_cache, phase_folders, read_manifest
from data.teacher_cache_writer import TeacherCacheWriter
from data.token_store import tokenizer_fingerprint

READERS = ("teacher_cache", "short_loss")  # keys of objectives that train from a cache
CHOSEN = ("top_k", "rows_per_part", "by")  # by the stage that writes


class Wanted(NamedTuple):
    """What a cache of one phase of a stage is made from, and how many rows the stage reads of it."""

    inputs: dict[str, Any]
    rows: int


def cache_key(objective: Any) -> str | None:
    """The key by which an objective names the cache that it trains from; None where it does without."""
    return next((key for key in READERS if getattr(objective, key, None) is not None), None)


def wanted(config: DictConfig, name: str, tokenizer: Any, kind: str, by: Mapping[str, Any]) -> list[Wanted]:
    """What the caches of a stage's phases are made from.

    Args:
        config: of the run.
        name: of a stage that may train from them.
        tokenizer: of the run; None where nothing will be compared.
        kind: one of READERS.
        by: what the writing stage says of the model: for short losses {"by"}, and of a student {"model"}.
    """
    stage = build_stage(config, name)
    data = build_stage_data(config, name, tokenizer=None)
    phases = _phases(config, stage)
    rows = [
        phase.steps * phase.rows_per_device * stage.accumulate * process_count(config) for phase in phases
    ]
    rows = [min(count, data.repeat_first_rows or count) for count in rows]
    read_by = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    common = {"tokenizer": read_by, **_said_by(config, stage.objective, kind, by)}
    found = []
    for index, phase in enumerate(phases):
        inputs = {**common, "data": {**data.row_inputs(), "row_length": phase.row_length}}
        if (
            len(phases) > 1
        ):  # rows go on where those of the phase before end, and are shuffled among themselves
            until = phases[: index + (index < len(phases) - 1)]
            inputs["phases"] = [[rows[i], earlier.row_length] for i, earlier in enumerate(until)]
        found.append(Wanted(inputs, rows[index]))
    return found


def _phases(config: DictConfig, stage: Any) -> Sequence[Any]:
    return stage_timeline(config, stage, process_count(config)).phases


def _said_by(config: DictConfig, objective: Any, kind: str, by: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what the model says on a row."""
    from models.teacher import load_hf_config
    from models.teacher_targets import teacher_identity

    if kind == "short_loss":
        teacher = {} if by.get("by") == "student" else _teacher(config, teacher_identity)
        return {"short_context": objective.short_context, **teacher, **by}
    return {
        **_teacher(config, teacher_identity),
        "vocabulary": load_hf_config(launch.build(config.teacher, "teacher")).get_text_config().vocab_size,
        "temperature": float(objective.temperature),
    }


def _teacher(config: DictConfig, identity: Any) -> dict[str, Any]:
    return {"teacher": identity(launch.build(config.teacher, "teacher"))}


def cache_writers(
    config: DictConfig, stage: Any, tokenizer: Any, student: dict[str, str] | None = None
) -> list[TeacherCacheWriter]:
    """What writes the caches of a stage, one for each phase.

    Args:
        config: of the run.
        stage: models.teacher_targets.CacheTeacher or models.short_loss.CacheShortLoss.
        tokenizer: of the run.
        student: what tells the student's weights, where it is the student that speaks.
    """
    kind = "teacher_cache" if hasattr(stage, "top_k") else "short_loss"
    own = {name: getattr(stage, name) for name in CHOSEN if hasattr(stage, name)}
    by = {"by": stage.by} | ({"model": student} if student else {}) if kind == "short_loss" else {}
    phases = wanted(config, stage.of, tokenizer, kind, by)
    notes = {"teacher": {key: config.teacher.get(key) for key in ("path", "revision", "dtype")}}
    return [
        TeacherCacheWriter(folder, {**inputs, **own}, rows, notes, f"stage.{stage.name}.folder")
        for folder, (inputs, rows) in zip(phase_folders(stage.folder, len(phases)), phases, strict=True)
    ]


def check_teacher_cache(config: DictConfig, stage: Any) -> None:
    """Checks a stage that writes a cache, and one that trains from a cache that no earlier stage will write.

    Args:
        config: of the run.
        stage: as built; one that has to do with no cache passes.

    Raises:
        ValueError: naming the key and the fix.
    """
    if hasattr(stage, "of"):
        _check_writer(config, stage)
    key = cache_key(getattr(stage, "objective", None))
    if key is None:
        return
    folder = getattr(stage.objective, key)
    before = [config.stage[name] for name in list(config.stages)[: list(config.stages).index(stage.name)]]
    if not any(earlier.get("folder") == folder and earlier.get("of") == stage.name for earlier in before):
        check_reading(config, stage, launch.build(config.tokenizer, "tokenizer"))


def check_reading(
    config: DictConfig, stage: Any, tokenizer: Any, student: dict[str, str] | None = None
) -> list[Path]:
    """Refuses a cache that is not whole, too short for the stage, or made from something else.

    Args:
        config: of the run.
        stage: trains from the cache that its objective names.
        tokenizer: of the run.
        student: what tells the weights that the stage begins with; None where they are not known yet, and a
            cache of a student's word is believed to be of this one.

    Returns:
        The folders of the caches, one for each phase.

    Raises:
        ValueError: naming the key and the fix.
    """
    kind = cache_key(stage.objective)
    key, folder = f"stage.{stage.name}.objective.{kind}", getattr(stage.objective, kind)
    folders = phase_folders(folder, len(_phases(config, stage)))
    for index, place in enumerate(folders):
        found = read_manifest(place, key)["inputs"]
        chosen = {name: found[name] for name in CHOSEN if name in found}
        by = {"by": found["by"]} if "by" in found else {}
        if "model" in found:
            by["model"] = found["model"] if student is None else student
        inputs, rows = wanted(config, stage.name, tokenizer, kind, by)[index]
        check_cache(place, {**inputs, **chosen}, rows, key)
    return folders


def _check_writer(config: DictConfig, writer: Any) -> None:
    key, names = f"stage.{writer.name}", list(config.stages)
    kind = "teacher_cache" if hasattr(writer, "top_k") else "short_loss"
    objective = config.stage[writer.of].get("objective", {}) if writer.of in config.stage else {}
    if kind not in objective:
        what = "distils, such as distill" if kind == "teacher_cache" else "has objective=long_cross_entropy"
        raise ValueError(f"{key}.of={writer.of} is no stage that {what}; name one.")
    # The weights of a student are not known yet: what it has said is held against them when they are.
    folders = phase_folders(writer.folder, len(_phases(config, build_stage(config, writer.of))))
    begun = any((folder / MANIFEST).exists() for folder in folders)  # else there is nothing to compare
    targets = cache_writers(config, writer, launch.build(config.tokenizer, "tokenizer") if begun else None)
    vocabulary = targets[0].inputs.get("vocabulary")
    if kind == "teacher_cache" and writer.top_k > vocabulary:
        raise ValueError(f"{key}.top_k={writer.top_k} is more than the teacher's {vocabulary} ids; lower it.")
    if getattr(writer, "by", "teacher") == "teacher":
        for target in targets:
            target.check()
    if writer.of not in names:
        return
    if names.index(writer.of) < names.index(writer.name):
        raise ValueError(
            f"stages={names}: put {writer.name} before {writer.of}, which trains from its cache."
        )
    if objective[kind] != writer.folder:
        raise ValueError(
            f"stages={names}: {writer.of} would not train from the cache of {writer.name}; set "
            f"stage.{writer.of}.objective.{kind}={writer.folder}."
        )
