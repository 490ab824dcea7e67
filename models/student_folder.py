"""A student on disk: a Hugging Face folder, and `student.json` that says what stands in each layer."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from models.config import StudentConfig, options_from, plain_options
from models.conversion import install_mixers
from models.layer_plan import ATTENTION, LayerPlan
from models.teacher import REPOSITORY, TeacherConfig, load_teacher

DESCRIPTION = "student.json"


class Student(NamedTuple):
    """A student: its model, what stands in each decoder layer, and the config that it was built by."""

    model: PreTrainedModel
    plan: list[str]
    config: StudentConfig


def save_student(folder: Path, student: Student, tokenizer: PreTrainedTokenizerBase, **facts: Any) -> None:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) and `student.json`, whole or not at all.

    Args:
        folder: replaced if it exists.
        student, tokenizer: what is saved.
        facts: plain data kept in `student.json`, for example the stage that made it.
    """
    unfinished = folder.with_name(folder.name + ".writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    student.model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    used = sorted(set(student.plan) - {ATTENTION})
    mixers = {name: plain_options(student.config.options(name)) for name in used}
    description = {"layer_plan": student.plan, "mixers": mixers, **facts}
    (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=1))
    for file in unfinished.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def load_student(folder: Path, attention: str = "sdpa") -> Student:
    """Loads what `save_student` wrote; every tensor must be there, and no other.

    Raises:
        ValueError: where the folder is no student's, or its tensors do not fit its description.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists():
        raise ValueError(f"{folder} is no student folder (no {DESCRIPTION}); name a run folder's `student`.")
    description = json.loads((folder / DESCRIPTION).read_text())
    plan = description["layer_plan"]
    mixers = {name: options_from(name, options) for name, options in description["mixers"].items()}
    config = StudentConfig(layer_plan=LayerPlan(layers=plan), mixers=mixers)
    hf_config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention).float()
    install_mixers(model, config, plan)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{folder} is damaged or of another version: missing {sorted(missing)[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}."
        )
    return Student(model.train(), plan, config)


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
