"""A training stage: what it trains, for how many tokens, at which learning rates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from models.timeline import RowLength, Timeline, lay_out, read_table

GROUPS = ("mixers", "rest")
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
        learning_rate: peak rate of each group: `mixers` (what replaces attention) and `rest` (the parent's
            weights).
            A group with rate 0 is frozen.
        final_learning_rate: rate of each group at the very last step.
        warmup_steps: optimiser steps of linear warm-up.
        schedule: `constant`, `linear` or `cosine`, from the peak to the final rate.
        optimizer: keyword arguments -> torch optimizer, given parameter groups.
        gradient_clip: largest gradient norm; 0 switches clipping off.
        accumulate: batches per optimiser step.
        log_every_steps: how often metrics are logged.
        validate_every_steps: optimiser steps between two looks at held-out rows; 0 means never.
        data: overrides of `data` for this stage (row_length, rows_per_device, ...).
        row_lengths: entries {from_tokens, row_length, rows_per_device}: the rows from so many tokens of the
            stage on; none means data.row_length throughout.

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
    row_lengths: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        key = f"stage.{self.name}"
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"{key}.schedule={self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}."
            )
        for rates in ("learning_rate", "final_learning_rate"):
            given = getattr(self, rates)
            if set(given) != set(GROUPS):
                raise ValueError(
                    f"{key}.{rates} needs exactly the groups {', '.join(GROUPS)}; got {sorted(given)}."
                )
            if any(rate < 0 for rate in given.values()):
                raise ValueError(f"{key}.{rates}={dict(given)} must not be negative.")
        if not any(self.learning_rate.values()):
            raise ValueError(f"{key}.learning_rate is 0 for every group; nothing would train.")
        changing = [
            g for g, rate in self.learning_rate.items() if rate and rate != self.final_learning_rate[g]
        ]
        if self.schedule == "constant" and changing:
            raise ValueError(
                f"{key}.schedule=constant never reaches {key}.final_learning_rate of {', '.join(changing)}; "
                "make it equal to learning_rate, or choose linear or cosine."
            )
        least_values = {"tokens": 1, "warmup_steps": 0, "gradient_clip": 0, "accumulate": 1}
        least_values |= {"log_every_steps": 1, "validate_every_steps": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be at least {least}.")
        self._check_row_lengths(key)

    def _check_row_lengths(self, key: str) -> None:
        given = [name for name in ("row_length", "rows_per_device") if name in (self.data or {})]
        if read_table(self.row_lengths, self.tokens, f"{key}.row_lengths") and given:
            raise ValueError(
                f"{key}.data.{given[0]}={self.data[given[0]]} contradicts {key}.row_lengths, which says the "
                f"rows of every step; leave it out, or set {key}.row_lengths=[]."
            )

    def timeline(self, *, row_length: int, rows_per_device: int, devices: int) -> Timeline:
        """The optimiser steps that fit into the budget, and the rows of each.

        Args:
            row_length: T of every step, unless the stage has `row_lengths`.
            rows_per_device: B, likewise.
            devices: processes that train together.

        Raises:
            ValueError: where not even one step fits, or a row length gets none.
        """
        key = f"stage.{self.name}"
        table = read_table(self.row_lengths, self.tokens, f"{key}.row_lengths")
        table = table or [RowLength(from_tokens=0, row_length=row_length, rows_per_device=rows_per_device)]
        return lay_out(table, self.tokens, self.accumulate * devices, key)

    def rate_at(self, group: str, step: int, timeline: Timeline) -> float:
        """Learning rate of a group at an optimiser step; the last step has the final rate exactly.

        The schedule runs over tokens, because steps need not have equally many.
        """
        peak, final = self.learning_rate[group], self.final_learning_rate[group]
        last = timeline.steps - 1
        if step >= last:  # also where the warm-up is longer than the stage
            return final
        if step < self.warmup_steps:
            return peak * (step + 1) / (self.warmup_steps + 1)
        begun = timeline.tokens_at(self.warmup_steps)
        progress = (timeline.tokens_at(step) - begun) / (timeline.tokens_at(last) - begun)
        return final + (peak - final) * SCHEDULES[self.schedule](progress)

    def build_optimizer(
        self, groups: dict[str, list[nn.Parameter]], timeline: Timeline
    ) -> tuple[Optimizer, LambdaLR]:
        """The optimiser over `groups` (matrices and vectors apart, for weight decay) and its schedule.

        Args:
            groups: the parameters of each learning-rate group.
            timeline: the steps of the stage.
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
