"""A training stage: what it trains, for how many tokens, at which learning rates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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

    def steps(self, tokens_per_step: int) -> int:
        """Optimiser steps that fit into the budget.

        Raises:
            ValueError: where not even one does.
        """
        steps = int(self.tokens // tokens_per_step)
        if steps < 1:
            raise ValueError(
                f"stage.{self.name}.tokens={self.tokens:g} is less than one optimiser step of "
                f"{tokens_per_step} tokens."
            )
        return steps

    def rate_at(self, group: str, step: int, steps: int) -> float:
        """Learning rate of a group at optimiser step `step` of `steps`; the last step has the final rate
        exactly."""
        peak, final = self.learning_rate[group], self.final_learning_rate[group]
        if step >= steps - 1:  # also where the warm-up is longer than the stage
            return final
        if step < self.warmup_steps:
            return peak * (step + 1) / (self.warmup_steps + 1)
        span = steps - 1 - self.warmup_steps
        progress = (step - self.warmup_steps) / span
        return final + (peak - final) * SCHEDULES[self.schedule](progress)

    def build_optimizer(
        self, groups: dict[str, list[nn.Parameter]], steps: int
    ) -> tuple[Optimizer, LambdaLR]:
        """The optimiser over `groups` (matrices and vectors apart, for weight decay) and its schedule.

        Args:
            groups: the parameters of each learning-rate group.
            steps: optimiser steps of the stage.
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
        factors = [_factor(self, group, steps) for group in names]
        return optimizer, LambdaLR(optimizer, factors)


def _factor(stage: StageConfig, group: str, steps: int) -> Callable[[int], float]:
    peak = stage.learning_rate[group]
    return lambda step: stage.rate_at(group, step, steps) / peak


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
