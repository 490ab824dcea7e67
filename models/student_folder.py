"""A student on disk: a Hugging Face folder, and `student.json` that says what stands in each layer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models import ranks
from models.config import StudentConfig, options_from, plain_options
from models.conversion import install_mixers
from models.hf import TransmuteConfig
from models.layer_plan import ATTENTION, LayerPlan, is_inserted, mixer_name
from models.mixers import MIXERS
from models.parallelize import full_tensors
from models.teacher import REPOSITORY, TeacherConfig, load_teacher
from models.whole_folder import FIX, check_tensors, read_json, read_tensors, whole_folder

DESCRIPTION = "student.json"


class Student(NamedTuple):
    """A student: its model, what stands in each decoder layer (a resolved plan, models/layer_plan.py), and
    the config that it was built by."""

    model: PreTrainedModel
    plan: list[str]
    config: StudentConfig


def save_student(folder: Path, student: Student, tokenizer: PreTrainedTokenizerBase, **facts: Any) -> None:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) and `student.json`, whole or not at all.

    All processes of a run must call it; the first one writes.

    Args:
        folder: replaced if it exists.
        student, tokenizer: what is saved.
        facts: plain data kept in `student.json`, for example the stage that made it.
    """
    tensors = full_tensors(student.model, keep=ranks.is_first())
    if ranks.is_first():
        with whole_folder(folder) as unfinished:
            write_student(unfinished, student, tensors, tokenizer, facts)
    ranks.barrier()


def write_student(
    folder: Path,
    student: Student,
    tensors: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
) -> None:
    """Writes the files of a student into an empty folder; arguments as for `save_student`.

    Args:
        folder: exists.
        student, tokenizer, facts: as for `save_student`.
        tensors: the model's, whole and on the CPU.
    """
    # By the names that modules have in memory: transformers would write the experts of some families apart.
    student.model.save_pretrained(folder, state_dict=tensors, save_original_format=False)
    tokenizer.save_pretrained(folder)
    kept = student.config.layer_plan.kept  # a later stage may still choose layers
    mixers = used_mixers(student)
    if student.config.is_mixer(kept):
        mixers[kept] = plain_options(student.config.options(kept))
    description = {"layer_plan": student.plan, "kept": kept, "mixers": mixers, **facts}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def used_mixers(student: Student) -> dict[str, dict[str, Any]]:
    """Name -> options, as plain data, of every mixer that stands in some layer."""
    used = sorted({mixer_name(student.plan[place]) for place in student.config.replaced(student.plan)})
    return {name: plain_options(student.config.options(name)) for name in used}


def empty_student(hf_config: PretrainedConfig, config: StudentConfig, plan: list[str]) -> PreTrainedModel:
    """A float32 student of which only the shape counts: its tensors are about to be loaded.

    Args:
        hf_config: of the student itself, inserted layers counted.
        config: mixer options.
        plan: resolved.
    """
    model = AutoModelForCausalLM.from_config(
        hf_config, attn_implementation=hf_config._attn_implementation
    ).float()
    install_mixers(model, config, plan)
    return model


def load_student(folder: Path, attention: str = "sdpa") -> Student:
    """Loads what `save_student` or an export wrote, by this repository's code; every tensor must be there.

    Raises:
        ValueError: where the folder is no student's, a file is damaged, or its tensors do not fit its
            description.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists():
        raise ValueError(f"{folder} is no student folder (no {DESCRIPTION}); name a run folder's `student`.")
    hf_config = parent_config(folder, attention)
    plan, config = _described(folder, hf_config)
    tensors = read_tensors(folder)
    model = empty_student(hf_config, config, plan)
    check_tensors(folder, tensors, model.state_dict())
    model.load_state_dict(tensors, strict=False)
    return Student(model.train(), plan, config)


def parent_config(folder: Path, attention: str = "sdpa") -> PretrainedConfig:
    """The config of the Transformer that a student was made of, with its inserted layers; an export keeps it
    as `parent`.

    Raises:
        ValueError: where it is damaged.
    """
    try:
        config = AutoConfig.from_pretrained(folder, attn_implementation=attention, trust_remote_code=False)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is missing or damaged ({error}). {FIX}") from error
    return config.parent if isinstance(config, TransmuteConfig) else config


def _described(folder: Path, hf_config: PretrainedConfig) -> tuple[list[str], StudentConfig]:
    """The layer plan and the options that `student.json` tells.

    Raises:
        ValueError: where it is damaged, or of a version with other mixers or options.
    """
    path = folder / DESCRIPTION
    description = read_json(path)
    try:
        mixers = {name: options_from(name, options) for name, options in description["mixers"].items()}
        plan = LayerPlan(layers=description["layer_plan"], kept=description.get("kept", ATTENTION))
        config = StudentConfig(layer_plan=plan, mixers=mixers)
        inserted = sum(is_inserted(entry) for entry in description["layer_plan"])
        plan = config.layer_plan.resolve(hf_config.num_hidden_layers - inserted, list(MIXERS))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or of another version ({type(error).__name__}: {error}). {FIX}"
        ) from error
    return plan, config


def model_folder(path: str) -> Path:
    """The Hugging Face folder that a path means: a run folder's `student`, or the folder itself.

    Raises:
        ValueError: where there is none.
    """
    for folder in (Path(path) / "student", Path(path), REPOSITORY / path):
        if (folder / "config.json").exists():
            return folder
    raise ValueError(f"model: {path} is neither a finished run nor a Hugging Face folder (no config.json).")


def load_model(folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    """A student or a plain Hugging Face model from a local folder, in float32 and evaluation mode."""
    if (folder / DESCRIPTION).exists():
        return load_student(folder, attention).model.eval()
    return load_teacher(TeacherConfig(path=str(folder), attention=attention))
