"""Dotted keys into `summary.json`: `stages.distill.kl`, `stages.-1.loss`, `student.state_bytes_per_row`.

A key is a path of parts joined by dots. In a mapping a part is a key; in `stages` it is the name of a stage
or an index, -1 being the last one; in another list it is an index. The path must end at a number.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from reports.summary import STAGE_NUMBERS, TEACHER_NUMBERS

COPIES = ("copy_first", "copy_second")
NEEDS_TEACHER = ("kl", "top1_agreement", "gap_recovered")
# Larger is better for numbers of these names; of all others, smaller.
HIGHER_IS_BETTER = ("top1_agreement", "gap_recovered", "copy_gain", "tokens_per_second")


def find(summary: Mapping, key: str) -> float:
    """The number at a key.

    Args:
        summary: the contents of `summary.json`, or what `expected` returns.
        key: as described above.

    Raises:
        ValueError: there is no such key, or no number; the message lists what there is.
    """
    value, passed = summary, []
    for part in key.split("."):
        value = _step(value, part, key, ".".join(passed))
        passed.append(part)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"optimized_metric={key} is no number{_hint(value, key)}.")
    return float(value)


def expected(stages: Sequence[str], *, with_teacher: bool, with_transfer: bool) -> dict[str, Any]:
    """A summary of the shape that a run will have, every number 0: what a key can be held against beforehand.

    Args:
        stages: names of the run's stages, in order.
        with_teacher: whether there is a teacher to compare with.
        with_transfer: whether the student is made from the teacher in this run.
    """
    numbers = dict.fromkeys((*STAGE_NUMBERS, *COPIES), 0)
    if not with_teacher:
        numbers |= dict.fromkeys(NEEDS_TEACHER)
    names = ["transfer", *stages] if with_transfer else list(stages)
    return {
        "teacher": dict.fromkeys((*TEACHER_NUMBERS, *COPIES), 0) if with_teacher else None,
        "stages": [{"name": name, **numbers} for name in names],
        "student": {"parameters": 0, "state_bytes_per_row": 0},
        "seed": 0,
    }


def higher_is_better(key: str) -> bool:
    """Whether the number at a key should be large, judged by its name."""
    return key.rpartition(".")[2] in HIGHER_IS_BETTER


def _step(value: Any, part: str, key: str, passed: str) -> Any:
    """What `part` names inside `value`."""
    choices = _choices(value)
    if part in choices:
        return choices[part]
    if isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
        return value[int(part)]
    where = f"{passed} has" if passed else "summary.json has"
    raise ValueError(f"optimized_metric={key}: {where} no {part!r}{_hint(value, key)}.")


def _choices(value: Any) -> dict[str, Any]:
    """The parts that may follow, by name, with what they lead to."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        return {entry["name"]: entry for entry in value}
    return {str(index): entry for index, entry in enumerate(value)} if isinstance(value, list) else {}


def _hint(value: Any, key: str) -> str:
    """The end of a refusal: what there is instead."""
    if value is None:
        return ": it is not measured in this run"
    measured = [name for name, entry in _choices(value).items() if entry is not None and name != "name"]
    if not measured:
        return ""
    return f"; choose from {', '.join(measured)}" + (", or an index" if isinstance(value, list) else "")
