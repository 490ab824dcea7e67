"""A stage's `curriculum`: the table that says which rows, which attention and which rates its phases have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DENSE, SPARSE = "dense", "sparse"
ATTENTION = (DENSE, SPARSE)
BEGINNINGS = ("from_tokens", "from_step")
REQUIRED = ("row_length", "rows_per_device")
OPTIONAL = ("attention", "learning_rate", "warmup_steps")
LEAST = {"from_tokens": 0, "from_step": 0, "row_length": 2, "rows_per_device": 1, "warmup_steps": 0}
KEYS = f"one of {', '.join(BEGINNINGS)}, the keys {', '.join(REQUIRED)}, and may have {', '.join(OPTIONAL)}"


@dataclass(frozen=True, kw_only=True)
class CurriculumEntry:
    """One entry of a stage's `curriculum`.

    Args:
        begins: tokens, or optimiser steps, of the stage that come before. By tokens, the first optimiser step
            that begins with so many used or more is the first of the phase.
        row_length: T, tokens.
        rows_per_device: B.
        attention: `dense` or `sparse`: how the student's sparse mixers attend.
        learning_rate: peak rates of this phase by group; a group that is not named has the stage's, one with
            rate 0 is frozen for the length of the phase.
        warmup_steps: optimiser steps of linear warm-up, from the phase's first one on; None means the stage's
            in the first phase and 0 in later ones.
    """

    begins: int
    row_length: int
    rows_per_device: int
    attention: str = SPARSE
    learning_rate: Mapping[str, float] = field(default_factory=dict)
    warmup_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The checked table.

    Args:
        begins_by: `from_tokens` or `from_step`, what all its entries say their beginning by.
        entries: in order.
    """

    begins_by: str
    entries: tuple[CurriculumEntry, ...]


def read_curriculum(entries: Any, rates: Mapping[str, float], tokens: float, stage: str) -> Curriculum | None:
    """A stage's `curriculum`, checked.

    Args:
        entries: plain dictionaries, as configured.
        rates: the stage's peak rate of each group.
        tokens: the stage's budget.
        stage: its key.

    Returns:
        None for an empty table: the whole stage has the rows of its data.

    Raises:
        ValueError: naming the key and the fix.
    """
    key = f"{stage}.curriculum"
    if not isinstance(entries, list):
        raise ValueError(f"{key}={entries} must be a list of {{from_tokens, row_length, rows_per_device}}.")
    if not entries:
        return None
    kinds = [_beginning(entry, f"{key}[{index}]") for index, entry in enumerate(entries)]
    if len(set(kinds)) > 1:
        first = next(index for index, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"{key}[{first}].{kinds[first]} follows {kinds[0]} of the entries before it; say all beginnings "
            "by from_tokens, or all by from_step."
        )
    read = [_entry(entry, kinds[0], f"{key}[{index}]") for index, entry in enumerate(entries)]
    _check_order([entry.begins for entry in read], kinds[0], tokens, key)
    _check_rates(read, rates, stage)
    return Curriculum(begins_by=kinds[0], entries=tuple(read))


def _beginning(entry: Any, place: str) -> str:
    """By what an entry with the right keys says where it begins."""
    if not isinstance(entry, dict) or not {*REQUIRED} <= {*entry} <= {*BEGINNINGS, *REQUIRED, *OPTIONAL}:
        raise ValueError(f"{place}={entry} needs {KEYS}.")
    given = [name for name in BEGINNINGS if name in entry]
    if len(given) != 1:
        raise ValueError(f"{place} has {' and '.join(given) or 'no beginning'}; give {KEYS}.")
    return given[0]


def _entry(given: dict[str, Any], begins_by: str, place: str) -> CurriculumEntry:
    numbers = {}
    for name in (name for name in LEAST if given.get(name) is not None):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise ValueError(f"{place}.{name}={value!r} must be a whole number.")
        if value < LEAST[name]:
            raise ValueError(f"{place}.{name}={value} must be at least {LEAST[name]}.")
        numbers[name] = int(value)
    attention, rates = given.get("attention") or SPARSE, given.get("learning_rate") or {}
    if attention not in ATTENTION:
        raise ValueError(f"{place}.attention={attention!r} is unknown; choose one of {', '.join(ATTENTION)}.")
    if not isinstance(rates, dict):
        raise ValueError(f"{place}.learning_rate={rates!r} must name groups; write {{mixers: {rates}}}.")
    begins = numbers.pop(begins_by, None)
    if begins is None or not {*REQUIRED} <= {*numbers}:
        raise ValueError(f"{place}={given} needs {KEYS}.")
    return CurriculumEntry(begins=begins, attention=attention, learning_rate=rates, **numbers)


def _check_order(begins: list[int], begins_by: str, tokens: float, key: str) -> None:
    for index, value in enumerate(begins):
        place = f"{key}[{index}].{begins_by}={value}"
        if index == 0 and value != 0:
            raise ValueError(f"{place} must be 0: the table begins with the stage.")
        if index > 0 and value <= begins[index - 1]:
            raise ValueError(
                f"{place} must be more than the {begins[index - 1]} of the entry before it; put the entries "
                "in order."
            )
        if begins_by == "from_tokens" and value >= tokens:
            raise ValueError(
                f"{place} is not below the stage's budget of {tokens:g} tokens; remove the entry, or raise "
                "tokens."
            )


def _check_rates(table: list[CurriculumEntry], rates: Mapping[str, float], stage: str) -> None:
    for index, entry in enumerate(table):
        place = f"{stage}.curriculum[{index}].learning_rate"
        for group, rate in entry.learning_rate.items():
            if group not in rates:
                raise ValueError(f"{place}.{group} is no group; choose from {', '.join(rates)}.")
            if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
                raise ValueError(f"{place}.{group}={rate!r} must be a number that is not negative.")
            if rate and not rates[group]:
                raise ValueError(
                    f"{place}.{group}={rate} contradicts {stage}.learning_rate.{group}=0, which freezes the "
                    f"group for the whole stage; set a rate there, and 0 in the entries where {group} is "
                    "frozen."
                )
        if not any({**rates, **entry.learning_rate}.values()):
            raise ValueError(f"{place} is 0 for every group; nothing would train in this phase.")
    for group, rate in rates.items():
        if rate and not any(entry.learning_rate.get(group, rate) for entry in table):
            raise ValueError(
                f"{stage}.curriculum freezes {group} in every entry; set {stage}.learning_rate.{group}=0 and "
                "leave it out of the table."
            )
