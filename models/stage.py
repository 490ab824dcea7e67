"""A training stage: what it trains, for how many tokens, at which learning rates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from models.curriculum import Curriculum, CurriculumEntry, read_curriculum
from models.student import GROUPS
from models.timeline import Phase, Timeline, lay_out

DEFAULT_GROUPS = {"inserted": "mixers", "index": "mixers"}  # group -> whose rate it has where none is given
NOT_DECAYED_DIMENSIONS = 1  # vectors (norms, biases, decays) are never weight-decayed


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One entry of `stages`.

    Args:
        name: as it appears in logs, tables and checkpoints.
        objective: what is minimised (models/objectives.py).
        tokens: training budget; the last optimiser step that fits into it is the last.
        learning_rate: peak rate of each group (models/student.py): `mixers` (what replaces attention) and
            `rest` (the parent's weights) are required; `inserted` (layers that were added) and `index` (what
            chooses blocks for sparse attention) have the rate of `mixers` where they are not named. A group
            with rate 0 is frozen.
        final_learning_rate: rate of each group at the very last step, likewise.
        warmup_steps: optimiser steps of linear warm-up.
        schedule: `constant`, `linear` or `cosine`, from the peak to the final rate; see `rate_at`.
        optimizer: keyword arguments -> torch optimizer, given parameter groups.
        gradient_clip: largest gradient norm; 0 switches clipping off.
        accumulate: batches per optimiser step.
        log_every_steps: how often metrics are logged.
        validate_every_steps: optimiser steps between two looks at held-out rows; 0 means never.
        data: overrides of `data` for this stage (row_length, rows_per_device, ...).
        curriculum: entries {from_tokens or from_step, row_length, rows_per_device, attention, learning_rate,
            warmup_steps}, of which the last three may be missing (models/curriculum.py): the phases of the
            stage; none means one phase with the rows of its data, sparse attention and the stage's rates.

        segment_length: tokens of a row that are differentiated together (models/segments.py): what an earlier
            segment has left in the student's state is read, and no gradient goes there; 0 means whole rows.

    Raises:
        ValueError: for a value out of range, naming its key.
    """

    name: str
    objective: Any
    tokens: float
    learning_rate: dict[str, float]
    final_learning_rate: dict[str, float]
    warmup_steps: int
    schedule: str
    optimizer: Callable[..., Optimizer]
    gradient_clip: float
    accumulate: int
    log_every_steps: int
    validate_every_steps: int
    data: dict[str, Any] = field(default_factory=dict)
    curriculum: list[dict[str, Any]] = field(default_factory=list)
    segment_length: int = 0

    def __post_init__(self) -> None:
        key = f"stage.{self.name}"
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"{key}.schedule={self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}."
            )
        for rates in ("learning_rate", "final_learning_rate"):
            object.__setattr__(self, rates, _every_group(getattr(self, rates), f"{key}.{rates}"))
        if not any(self.learning_rate.values()):
            raise ValueError(f"{key}.learning_rate is 0 for every group; nothing would train.")
        least_values = {"tokens": 1, "warmup_steps": 0, "gradient_clip": 0, "accumulate": 1}
        least_values |= {"log_every_steps": 1, "validate_every_steps": 0, "segment_length": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be at least {least}.")
        if self.segment_length and not getattr(self.objective, "takes_segments", False):
            raise ValueError(
                f"{key}.segment_length={self.segment_length} needs an objective that reads a row on its own: "
                "cross_entropy, long_cross_entropy or distill; choose one of them, or set it to 0."
            )
        table = self._table()
        self._check_constant(key, table)
        given = [name for name in ("row_length", "rows_per_device") if name in (self.data or {})]
        if table and given:
            raise ValueError(
                f"{key}.data.{given[0]}={self.data[given[0]]} contradicts {key}.curriculum, which says the "
                f"rows of every step; leave it out, or set {key}.curriculum=[]."
            )

    def _table(self) -> Curriculum | None:
        return read_curriculum(self.curriculum, self.learning_rate, self.tokens, f"stage.{self.name}")

    def _check_constant(self, key: str, table: Curriculum | None) -> None:
        """Refuses final rates that a constant schedule never comes to."""
        last = {**self.learning_rate, **(table.entries[-1].learning_rate if table else {})}
        changing = [g for g, rate in last.items() if rate and rate != self.final_learning_rate[g]]
        if self.schedule == "constant" and changing:
            raise ValueError(
                f"{key}.schedule=constant never reaches {key}.final_learning_rate of {', '.join(changing)}; "
                "make it equal to learning_rate (of the last phase), or choose linear or cosine."
            )

    def timeline(self, *, row_length: int, rows_per_device: int, devices: int) -> Timeline:
        """The optimiser steps that fit into the budget, and the phase of each.

        Args:
            row_length: T of every step, unless the stage has a `curriculum`.
            rows_per_device: B, likewise.
            devices: processes that train together.

        Raises:
            ValueError: where not even one step fits, a phase gets none, or no more than its warm-up has.
        """
        whole = CurriculumEntry(begins=0, row_length=row_length, rows_per_device=rows_per_device)
        table = self._table()
        curriculum = table or Curriculum(begins_by="from_tokens", entries=(whole,))
        phases = lay_out(curriculum, self.tokens, self.accumulate * devices, f"stage.{self.name}")
        timeline = Timeline(phases, has_table=table is not None)
        for index, phase in enumerate(timeline.phases if len(timeline.phases) > 1 else ()):
            if self._warmup(phase) >= phase.steps:
                raise ValueError(
                    f"stage.{self.name}.curriculum[{index}] has {phase.steps} steps, and a warm-up of "
                    f"{self._warmup(phase)}; set a smaller warmup_steps there, or make the phase longer."
                )
        return timeline

    def peak_at(self, group: str, phase: Phase) -> float:
        """The peak rate of a group in a phase; 0 where it is frozen."""
        return phase.learning_rate.get(group, self.learning_rate[group])

    def trained_groups(self, phase: Phase) -> tuple[str, ...]:
        """The groups that train in a phase."""
        return tuple(group for group in GROUPS if self.peak_at(group, phase))

    def freezing_phases(self, timeline: Timeline) -> list[int]:
        """The places of the phases in which a group is frozen that trains in another one."""
        trained = [self.trained_groups(phase) for phase in timeline.phases]
        ever = {group for groups in trained for group in groups}
        return [index for index, groups in enumerate(trained) if ever - {*groups}]

    def rate_at(self, group: str, step: int, timeline: Timeline) -> float:
        """Learning rate of a group at an optimiser step; the last step has the final rate exactly.

        Every phase climbs to its peak within its warm-up. Where no phase has rates of its own, the schedule
        runs from the end of the first warm-up to the end of the stage; else each phase stays at its peak, and
        the schedule runs through the last phase alone. It runs over tokens, because steps need not have
        equally many.
        """
        phase, last = timeline.phase_at(step), timeline.steps - 1
        peak, final = self.peak_at(group, phase), self.final_learning_rate[group]
        if not peak:
            return 0.0
        if step >= last:  # also where the warm-up is longer than the stage
            return final
        climbed = min(1.0, (step - phase.first_step + 1) / (self._warmup(phase) + 1))
        own_rates = any(entry.learning_rate for entry in timeline.phases)
        falling = timeline.phases[-1 if own_rates else 0]
        begins = falling.first_step + self._warmup(falling)
        if step < begins:
            return peak * climbed
        begun = timeline.tokens_at(begins)
        progress = (timeline.tokens_at(step) - begun) / (timeline.tokens_at(last) - begun)
        return climbed * (final + (peak - final) * SCHEDULES[self.schedule](progress))

    def _warmup(self, phase: Phase) -> int:
        own = phase.warmup_steps
        return own if own is not None else 0 if phase.first_step else self.warmup_steps

    def build_optimizer(
        self, groups: dict[str, list[nn.Parameter]], timeline: Timeline
    ) -> tuple[Optimizer, LambdaLR]:
        """The optimiser over `groups` (matrices and vectors apart, for weight decay) and its schedule.

        Args:
            groups: the parameters of each learning-rate group.
            timeline: the steps of the stage.

        A group that some phase freezes is in it all the time: what has no gradient is not stepped, so neither
        weight decay nor what the optimiser remembers moves it.
        """
        entries, names = [], []
        for group, parameters in groups.items():
            if not self.learning_rate[group]:
                continue
            matrices = [p for p in parameters if p.dim() > NOT_DECAYED_DIMENSIONS]
            vectors = [p for p in parameters if p.dim() <= NOT_DECAYED_DIMENSIONS]
            for chosen, options in ((matrices, {}), (vectors, {"weight_decay": 0.0})):
                if chosen:
                    entries.append({"params": chosen, "lr": self.learning_rate[group], **options})
                    names.append(group)
        optimizer = self.optimizer(entries)
        factors = [_factor(self, group, timeline) for group in names]
        return optimizer, LambdaLR(optimizer, factors)


def _factor(stage: StageConfig, group: str, timeline: Timeline) -> Callable[[int], float]:
    peak = stage.learning_rate[group]
    return lambda step: stage.rate_at(group, step, timeline) / peak


def _every_group(given: dict[str, float], key: str) -> dict[str, float]:
    """The rate of every group, checked."""
    required = [group for group in GROUPS if group not in DEFAULT_GROUPS]
    if not {*required} <= {*given} <= {*GROUPS}:
        raise ValueError(
            f"{key} needs the groups {', '.join(required)}, and may have {', '.join(DEFAULT_GROUPS)}; got "
            f"{sorted(given)}."
        )
    if any(rate < 0 for rate in given.values()):
        raise ValueError(f"{key}={dict(given)} must not be negative.")
    return {group: given.get(group, given.get(DEFAULT_GROUPS.get(group))) for group in GROUPS}


def freeze_all_but(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Makes exactly `parameters` of the module trainable."""
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def assert_float32(parameters: list[nn.Parameter]) -> None:
    """Master weights are float32: at learning rates near 1e-5, bfloat16 ones lose their updates.

    Raises:
        ValueError: where a trainable parameter has another type.
    """
    wrong = {str(parameter.dtype) for parameter in parameters if parameter.dtype != torch.float32}
    if wrong:
        raise ValueError(
            f"trainable weights are {sorted(wrong)}; use float32 weights and trainer.precision=bf16-mixed."
        )
