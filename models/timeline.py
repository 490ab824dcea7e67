"""What each optimiser step of a stage is: its curriculum, laid out as steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from models.curriculum import SPARSE, Curriculum


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive optimiser steps that are alike.

    Args:
        first_step: how many steps of the stage come before.
        steps: how many there are.
        first_token: how many tokens of the stage come before.
        tokens_per_step: of all devices.
        row_length: T, tokens.
        rows_per_device: B.
        attention, learning_rate, warmup_steps: as in CurriculumEntry.
    """

    first_step: int
    steps: int
    first_token: int
    tokens_per_step: int
    row_length: int
    rows_per_device: int
    attention: str = SPARSE
    learning_rate: Mapping[str, float] = field(default_factory=dict)
    warmup_steps: int | None = None


@dataclass(frozen=True)
class Timeline:
    """The phases of a stage, one after the other; every one of them has a step.

    All that a run needs to know of the table is a function of the step, so a resumed run has nothing to
    restore.

    Args:
        phases: in order.
        has_table: whether a table of the stage's config says them.
    """

    phases: tuple[Phase, ...]
    has_table: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return self.phases[-1].first_step + self.phases[-1].steps

    @property
    def tokens(self) -> int:
        """Tokens of the stage, over all devices."""
        return self.tokens_at(self.steps)

    def phase_at(self, step: int) -> Phase:
        """The phase that the optimiser step after `step` others belongs to; beyond the end the last one."""
        return next(phase for phase in reversed(self.phases) if step >= phase.first_step)

    def tokens_at(self, step: int) -> int:
        """Tokens of the stage, over all devices, that `step` optimiser steps have used."""
        phase = self.phase_at(step)
        return phase.first_token + (step - phase.first_step) * phase.tokens_per_step


def lay_out(curriculum: Curriculum, tokens: float, rows_factor: int, stage: str) -> tuple[Phase, ...]:
    """Turns a table into phases, which change between two optimiser steps and stay within the budget.

    Args:
        curriculum: the table, which begins with the stage.
        tokens: the stage's budget.
        rows_factor: rows of an optimiser step for each row of a device's batch (batches x devices).
        stage: its key.

    Raises:
        ValueError: where an entry gets no step.
    """
    phases: list[Phase] = []
    entries, by_steps = curriculum.entries, curriculum.begins_by == "from_step"
    first_step = first_token = 0
    for index, entry in enumerate(entries):
        size = entry.row_length * entry.rows_per_device * rows_factor
        steps = int((tokens - first_token) // size)  # that fit into the budget
        if index < len(entries) - 1:
            end = entries[index + 1].begins
            steps = end - first_step if by_steps else math.ceil((end - first_token) / size)
        if steps < 1:
            raise ValueError(_no_step(curriculum, index, size, first_token, tokens, stage))
        phases.append(
            Phase(
                first_step=first_step,
                steps=steps,
                first_token=first_token,
                tokens_per_step=size,
                row_length=entry.row_length,
                rows_per_device=entry.rows_per_device,
                attention=entry.attention,
                learning_rate=entry.learning_rate,
                warmup_steps=entry.warmup_steps,
            )
        )
        first_step, first_token = first_step + steps, first_token + steps * size
    return tuple(phases)


def _no_step(
    curriculum: Curriculum, index: int, size: int, first_token: int, tokens: float, stage: str
) -> str:
    """Why an entry gets no step, and what to do."""
    entries, begins_by = curriculum.entries, curriculum.begins_by
    if len(entries) == 1:
        return (
            f"{stage}.tokens={tokens:g} is less than one optimiser step of {size} tokens; raise it, or take "
            "fewer or shorter rows."
        )
    limit = f"{stage}.tokens={tokens:g}"
    if index < len(entries) - 1:
        limit = f"curriculum[{index + 1}].{begins_by}={entries[index + 1].begins}"
    return (
        f"{stage}.curriculum[{index}] gets no optimiser step: one has {size} tokens, and the steps before it "
        f"end at {first_token}, which leaves none up to {limit}; move {begins_by}, or take fewer "
        "rows_per_device."
    )
