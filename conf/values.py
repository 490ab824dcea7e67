"""Holds the values of a config against what reads them: wrong types, and numbers that are none."""

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
CHOICES = {
    "accelerator": ("auto", "cpu", "gpu"),
    "precision": ("32-true", "bf16-mixed"),
    "profiler": (None, "simple", "advanced"),
    "recompute_blocks": (True, False),
    "deterministic": (True, False),
}


def check_types(config: Any, key: str) -> None:
    """Holds the values of a config with `_target_`, and of such configs in it, against the annotations of
    what they are given to. Only annotations made of numbers, texts, null, and lists and dictionaries of them
    count.

    Args:
        config: what is about to be instantiated.
        key: where it stands in the run's config.

    Raises:
        ValueError: naming the key and what it must be.
    """
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, dict):
        return
    hints = _hints(config["_target_"]) if "_target_" in config else {}
    for name, value in config.items():
        if name in hints:
            _check_value(value, hints[name], f"{key}.{name}")
        check_types(value, f"{key}.{name}")


def check_trainer(trainer: DictConfig) -> None:
    """Refuses what Lightning would refuse much later.

    Raises:
        ValueError: naming the key and what there is instead.
    """
    for name, choices in CHOICES.items():
        if trainer[name] not in choices:
            known = ", ".join("null" if choice is None else str(choice).lower() for choice in choices)
            raise ValueError(f"trainer.{name}={trainer[name]} is unknown; choose from {known}.")
    check_count(trainer.threads, "trainer.threads", 0)


def check_evaluation(evaluation: DictConfig) -> None:
    """Refuses what would only fail when the run has been trained.

    Raises:
        ValueError: naming the key.
    """
    check_count(evaluation.decoding_tokens, "evaluation.decoding_tokens", 1)
    contexts, least = evaluation.decoding_contexts, 1
    if not OmegaConf.is_list(contexts):
        raise ValueError(f"evaluation.decoding_contexts={contexts} must be a list; [] measures nothing.")
    for index, context in enumerate(contexts):  # one cache grows from length to length
        check_count(context, f"evaluation.decoding_contexts[{index}]", least)
        least = context + 1


def check_count(value: Any, key: str, least: int) -> None:
    """Refuses what is no whole number from `least` on.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}={value} must be a whole number from {least} on.")


def _hints(target: str) -> dict[str, Any]:
    """The annotated arguments of a class or function; none where it cannot be found, which Hydra will say."""
    try:
        found = get_object(target)
        return get_type_hints(found.__init__ if isinstance(found, type) else found)
    except Exception:  # whatever importing it raises, and annotations of names that are not imported
        return {}


def _check_value(value: Any, hint: Any, key: str) -> None:
    """Refuses a value that does not fit an annotation."""
    inner = get_args(hint)
    if isinstance(value, list) and get_origin(hint) in (list, Sequence) and inner:
        for index, part in enumerate(value):
            _check_value(part, inner[0], f"{key}[{index}]")
        return
    if isinstance(value, dict) and get_origin(hint) in (dict, Mapping) and inner:
        for name, part in value.items():
            _check_value(part, inner[1], f"{key}.{name}")
        return
    if isinstance(value, str) and get_origin(hint) in (list, Sequence):
        raise ValueError(f"{key}={value} must be a list; write {key}=[{value}].")
    kinds = inner if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if set(kinds) <= WORDS.keys() and not any(_fits(value, kind) for kind in kinds):
        raise ValueError(f"{key}={value} must be {' or '.join(WORDS[kind] for kind in kinds)}.")


def _fits(value: Any, kind: type) -> bool:
    if kind is int and isinstance(value, float):
        return value.is_integer()  # 1e6 is a float in YAML
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
