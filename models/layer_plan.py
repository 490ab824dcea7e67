"""The layer plan: what each decoder layer of the student has in the place of attention, and the file that
hands a plan from one run to the next.

A resolved plan is a list of entries, one for each decoder layer of the student: the name of what stands
there, with a `+` in front where the layer is inserted, that is, where the teacher has none. Wherever the
number of a layer is read or shown, layers are counted as in the teacher; an inserted layer has no number. The
place of a layer in the student, which decoding caches are ordered by, is its place in the plan.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ATTENTION = "attention"
INSERTED = "+"  # in front of an entry
PLAN_FILE = "layer_plan.yaml"  # in a run folder
WAYS = ("keep", "every", "pattern", "layers", "file")
COUNTED = re.compile(r"(\d+)\s+(\S+)")  # as in `6 rwkv7`
PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Decoder layers to insert between those of the teacher (RWKV-X, arXiv 2504.21463). They compute nothing
    at first (models/expansion.py).

    Args:
        every: one after so many layers of the teacher: 4 inserts after layers 3, 7, 11, ...; what is left at
            the end, fewer layers than that, gets none. None inserts nothing.
        mixer: what stands in them: a mixer, or `attention`.

    Raises:
        ValueError: for a value out of range.
    """

    every: int | None = None
    mixer: str = "sparse"

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"student.layer_plan.expansion.every={self.every} must be at least 1; null inserts nothing."
            )
        _check_bare("student.layer_plan.expansion.mixer", [self.mixer])

    def apply(self, plan: Sequence[str]) -> list[str]:
        """A plan of the teacher's layers with the inserted ones.

        Raises:
            ValueError: where the plan has inserted layers of its own, or too few layers for one.
        """
        if self.every is None:
            return list(plan)
        if any(is_inserted(entry) for entry in plan):
            raise ValueError(
                f"student.layer_plan: expansion.every={self.every} and a plan that has inserted layers of "
                f"its own ({INSERTED}) contradict each other; set expansion.every=null."
            )
        if len(plan) < self.every:
            raise ValueError(
                f"student.layer_plan.expansion.every={self.every} inserts nothing into the teacher's "
                f"{len(plan)} layers; make it smaller, or null."
            )
        expanded = []
        for count, entry in enumerate(plan, start=1):
            expanded += [entry] if count % self.every else [entry, INSERTED + self.mixer]
        return expanded


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A plan as the config states it: a mixer everywhere, but for the layers that one of `keep`, `every` and
    `pattern` names; or the whole plan, by `layers` or `file`.

    Args:
        mixer: what replaces attention, for example `rwkv7`; or a list that is repeated over the depth:
            [rwkv7, rwkv7, rwkv7, sparse], or shorter [3 rwkv7, sparse], puts `sparse` in every fourth layer.
        kept: what stands in the layers that are kept, and in those that a `select` stage chooses:
            `attention`, or a mixer.
        keep: decoder layers (from 0; negative counts from the end) that are kept.
        every: the last of so many layers is kept: 4 keeps layers 3, 7, 11, ...
        pattern: `3:1` is three layers of `mixer`, then one that is kept, and again.
        layers: the whole plan, one name per layer; an entry such as `6 rwkv7` stands for six, and `+sparse`
            for a layer that is inserted there.
        file: a plan that an earlier run has written: its run folder, or the file.
        expansion: layers to insert, beside all of these.

    Raises:
        ValueError: for contradictory or empty statements.
    """

    mixer: str | Sequence[str] = "rwkv7"
    kept: str = ATTENTION
    keep: Sequence[int] = ()
    every: int | None = None
    pattern: str | None = None
    layers: Sequence[str] | None = None
    file: str | None = None
    expansion: Expansion = field(default_factory=Expansion)

    def __post_init__(self) -> None:
        given = [way for way in WAYS if getattr(self, way) not in (None, (), [])]
        if self.layers is not None and "layers" not in given:
            given.append("layers")  # an empty list is a plan, of no layer
        if len(given) > 1:
            raise ValueError(
                f"student.layer_plan: {' and '.join(given)} contradict each other; give one of them, and "
                "null ([] for keep) for the others."
            )
        if not self.mixer:
            raise ValueError("student.layer_plan.mixer is empty; name a mixer, or a list of them to repeat.")
        if not self.kept:
            raise ValueError("student.layer_plan.kept is empty; name attention or a mixer.")
        _check_bare("student.layer_plan.mixer", self._cycle())
        _check_bare("student.layer_plan.kept", [self.kept])
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"student.layer_plan.every={self.every} must be at least 1; null keeps no layer."
            )
        self._periods()

    def resolve(self, layer_count: int, known: Sequence[str]) -> list[str]:
        """One entry per layer of the student (top of this file).

        Args:
            layer_count: decoder layers of the teacher.
            known: names of the mixers there are.

        Raises:
            ValueError: for a wrong number of layers, an unknown name, an index out of range, or an inserted
                layer with none before it.
        """
        assert self.file is None, "a plan in a file is read first, by `from_file`"
        if self.layers is not None:
            plan = _expanded(self.layers)
            own = teacher_part(plan)
            if len(own) != layer_count:
                beside = f" beside those with {INSERTED}" if own != plan else ""
                raise ValueError(
                    f"student.layer_plan.layers has {len(own)} entries{beside}; the teacher has "
                    f"{layer_count} layers."
                )
            if plan and is_inserted(plan[0]):
                raise ValueError(
                    f"student.layer_plan.layers begins with {plan[0]}; an inserted layer is made from the "
                    "layer before it, so put it behind one."
                )
        else:
            kept, cycle = self._kept(layer_count), self._cycle()
            plan = [self.kept if index in kept else cycle[index % len(cycle)] for index in range(layer_count)]
        plan = self.expansion.apply(plan)
        names = list(dict.fromkeys([*known, ATTENTION]))
        unknown = sorted({*map(mixer_name, plan), self.kept} - set(names))
        if unknown:
            raise ValueError(f"student.layer_plan: {unknown} is unknown; choose from {', '.join(names)}.")
        return plan

    def _cycle(self) -> list[str]:
        """What is repeated over the depth."""
        return _expanded([self.mixer] if isinstance(self.mixer, str) else self.mixer)

    def _kept(self, layer_count: int) -> set[int]:
        """The layers that are kept, from 0."""
        outside = [index for index in self.keep if not -layer_count <= index < layer_count]
        if outside:
            raise ValueError(
                f"student.layer_plan.keep={list(self.keep)}: {outside} is outside the teacher's "
                f"{layer_count} layers."
            )
        mixed, kept = self._periods()
        repeated = {index for index in range(layer_count) if kept and index % (mixed + kept) >= mixed}
        return repeated | {index % layer_count for index in self.keep}

    def _periods(self) -> tuple[int, int]:
        """Of each group of layers, how many are mixed and how many are kept after them; (1, 0) without
        groups."""
        if self.every is not None:
            return self.every - 1, 1
        if self.pattern is None:
            return 1, 0
        found = PATTERN.fullmatch(self.pattern)
        mixed, kept = (int(count) for count in found.groups()) if found else (0, 0)
        if not mixed + kept:
            raise ValueError(
                f"student.layer_plan.pattern={self.pattern!r} must be two counts such as '3:1': layers of "
                "`mixer`, and layers of `kept` after them."
            )
        return mixed, kept


def is_inserted(entry: str) -> bool:
    """Whether an entry of a plan is a layer that the teacher does not have."""
    return entry.startswith(INSERTED)


def mixer_name(entry: str) -> str:
    """What stands in the layer of an entry."""
    return entry.removeprefix(INSERTED)


def teacher_part(plan: Sequence[str]) -> list[str]:
    """The entries of the teacher's layers, in its order and under its numbers."""
    return [entry for entry in plan if not is_inserted(entry)]


def teacher_numbers(plan: Sequence[str]) -> list[int]:
    """For each entry the teacher's layer that it is made from: its own, or for an inserted one the layer
    before it."""
    numbers, last = [], -1
    for entry in plan:
        last += not is_inserted(entry)
        numbers.append(last)
    return numbers


def with_names(plan: Sequence[str], names: Mapping[int, str]) -> list[str]:
    """The plan with other names in some of the teacher's layers, given by number; inserted ones stay."""
    numbers = teacher_numbers(plan)
    return [
        entry if is_inserted(entry) else names.get(number, entry)
        for entry, number in zip(plan, numbers, strict=True)
    ]


def from_file(plan: LayerPlan, layer_count: int) -> LayerPlan:
    """The plan with its `file` read; any other plan as it is.

    Args:
        plan: as the config states it.
        layer_count: decoder layers of the teacher.

    Raises:
        ValueError: where the file is missing or damaged, or of a model with another number of layers.
    """
    if plan.file is None:
        return plan
    layers = read_plan_file(plan.file)
    count = len(teacher_part(layers))
    if count != layer_count:
        raise ValueError(
            f"student.layer_plan.file={plan.file} is a plan for {count} layers; the teacher has "
            f"{layer_count}."
        )
    return LayerPlan(layers=layers, kept=plan.kept, expansion=plan.expansion)


def read_plan_file(path: str | Path) -> list[str]:
    """One name per layer, from what `write_plan_file` wrote or a YAML or JSON file like it.

    Args:
        path: the file, or a run folder that has one.

    Raises:
        ValueError: where there is none, or it holds no plan.
    """
    file = Path(path) / PLAN_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"student.layer_plan.file={path}: there is no {file}; name a run folder whose stages have chosen "
            "layers, or a file with a list `layers`."
        )
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"student.layer_plan.file={path} is damaged: {error}") from error
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"student.layer_plan.file={path} has no list `layers` of names, one per layer.")
    return _expanded(layers)


def write_plan_file(path: str | Path, layers: Sequence[str], **facts: Any) -> None:
    """Writes a plan for later runs (`student.layer_plan.file`), and how it was found.

    Args:
        path: the file, or a folder that gets one.
        layers: one name per layer.
        facts: plain data, for example by="kl" and scores=[...].
    """
    file = Path(path) / PLAN_FILE if Path(path).is_dir() else Path(path)
    file.write_text(yaml.safe_dump({"layers": list(layers), **facts}, sort_keys=False, width=100))


def _check_bare(key: str, names: Sequence[str]) -> None:
    """Refuses inserted layers where a plan does not count layers."""
    marked = [name for name in names if is_inserted(name)]
    if marked:
        raise ValueError(
            f"{key}: {marked[0]} would be an inserted layer; name {mixer_name(marked[0])!r} here, and say "
            "where to insert by student.layer_plan.expansion or student.layer_plan.layers."
        )


def _expanded(names: Sequence[str]) -> list[str]:
    """A list of names in which `6 rwkv7` has become six."""
    plan = []
    for name in names:
        counted = COUNTED.fullmatch(str(name))
        plan += [counted[2]] * int(counted[1]) if counted else [name]
    return plan
