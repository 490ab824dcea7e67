"""What eval.py measures: a model and perhaps its teacher, checked before any weight is loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from yaml import YAMLError

from models.student_folder import DESCRIPTION, load_model, model_folder, parent_config
from models.teacher import TeacherConfig, load_hf_config, load_teacher, load_tokenizer
from pipeline.generation import DEVICES, folder_tokenizer

log = logging.getLogger(__name__)
AUTO = "auto"
NO_TEACHER = "Name another teacher_folder, or set teacher_folder=null."


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure; its folder and tokenizer have been read, its weights have not.

    Args:
        key: of the config that names it.
        name: for tables.
        source: folder of a student or a Hugging Face model, or a teacher's config.
        tokenizer: its own.
        vocabulary: tokens that it has logits for.
        attention: `sdpa` or `eager`.
        device: where it is put.
    """

    key: str
    name: str
    source: Path | TeacherConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    attention: str
    device: str

    def load(self) -> PreTrainedModel:
        """The model, in evaluation mode, on its device.

        Raises:
            ValueError: where the weights are missing or damaged.
        """
        try:
            if isinstance(self.source, TeacherConfig):
                model = load_teacher(self.source)
            else:
                model = load_model(self.source, self.attention)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.key}: the weights of {self.name} are missing or damaged ({_one_line(error)}); copy "
                "the folder again, or name another."
            ) from error
        return model.to(self.device).requires_grad_(False).eval()


def find_subjects(config: DictConfig) -> tuple[Subject, Subject | None]:
    """The model and the teacher of an evaluation.

    Args:
        config: with the keys model, teacher_folder, attention, device.

    Raises:
        ValueError: where a folder or a tokenizer is missing or damaged, or the two have not one vocabulary.
    """
    places = {"attention": config.attention, "device": _device(config.device)}
    folder = model_folder(config.model)
    model = Subject(
        key="model",
        name=str(config.model),
        source=folder,
        tokenizer=folder_tokenizer(folder),
        vocabulary=_vocabulary(parent_config(folder)),
        **places,
    )
    source = _teacher_source(config)
    if source is None:
        return model, None
    try:
        teacher = _teacher(source, places)
    except Exception as error:  # whatever a foreign folder, the Hub or the tokenizers library come up with
        raise ValueError(
            f"teacher_folder={config.teacher_folder}: {_place(source)} cannot be read "
            f"({_one_line(error)}). {NO_TEACHER}"
        ) from error
    _check_one_vocabulary(config, model, teacher)
    return model, teacher


def _teacher_source(config: DictConfig) -> Path | TeacherConfig | None:
    if config.teacher_folder is None:
        return None
    if config.teacher_folder == AUTO:
        return teacher_of_run(model_folder(config.model), config.attention)
    try:
        return model_folder(config.teacher_folder)
    except ValueError:
        raise ValueError(
            f"teacher_folder={config.teacher_folder} is neither a finished run nor a Hugging Face folder (no "
            f"config.json). {NO_TEACHER}"
        ) from None


def teacher_of_run(student: Path, attention: str = "sdpa") -> TeacherConfig | None:
    """The teacher named in the config of the run that a student lies in; None where there is no such run.

    Only values are taken from that file: code that it names is not run, and neither is a teacher's own.

    Args:
        student: `<run>/student`, `<run>/checkpoints/<stage>/student`, or any other model's folder.
        attention: the teacher's implementation.

    Raises:
        ValueError: where the run's config is damaged.
    """
    if not (student / DESCRIPTION).exists():
        return None
    folder = student.resolve()
    found = [parent / "config.yaml" for parent in (folder.parent, *folder.parent.parents[1:2])]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return None
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)["teacher"]
        chosen = {key: values[key] for key in ("path", "revision", "dtype") if key in values}
        return TeacherConfig(**chosen, attention=attention) if chosen["path"] is not None else None
    except (KeyError, TypeError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"teacher_folder=auto: {path} names no teacher that is here ({_one_line(error)}). {NO_TEACHER}"
        ) from error


def _teacher(source: Path | TeacherConfig, places: dict[str, str]) -> Subject:
    if isinstance(source, TeacherConfig):
        tokenizer, hf_config = load_tokenizer(source), load_hf_config(source)
    else:
        tokenizer, hf_config = folder_tokenizer(source), parent_config(source)
    return Subject(
        key="teacher_folder",
        name=_place(source),
        source=source,
        tokenizer=tokenizer,
        vocabulary=_vocabulary(hf_config),
        **places,
    )


def _check_one_vocabulary(config: DictConfig, model: Subject, teacher: Subject) -> None:
    """KL and agreement compare logits token by token; perplexities are per token.

    Raises:
        ValueError: where the two count other tokens, or give tokens other numbers.
    """
    difference = None
    ours, theirs = model.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if model.vocabulary != teacher.vocabulary:
        difference = f"it has logits for {teacher.vocabulary} tokens, the model for {model.vocabulary}"
    elif ours != theirs:
        token = min(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        difference = (
            f"token {token!r} is number {theirs.get(token)} there, and {ours.get(token)} in the model"
        )
    if difference:
        raise ValueError(
            f"teacher_folder={config.teacher_folder}: {teacher.name} has another vocabulary: {difference}. "
            f"{NO_TEACHER}"
        )


def _vocabulary(hf_config: Any) -> int:
    return hf_config.get_text_config().vocab_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _place(source: Path | TeacherConfig) -> str:
    return str(source.path if isinstance(source, TeacherConfig) else source)


def _device(name: str) -> str:
    """The device that `device` means.

    Raises:
        ValueError: where it is unknown or not there.
    """
    if name not in DEVICES:
        raise ValueError(f"device={name!r} is unknown; choose one of {', '.join(DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU here; set device=cpu or device=auto.")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
