"""Which rows a stage trains on: its table of row lengths by tokens, laid out as optimiser steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RowLength:
    """One entry of a stage's `row_lengths`.

    Args:
        from_tokens: of the stage; the first optimiser step that begins with so many tokens used or more is
            the first over these rows.
        row_length: T, tokens.
        rows_per_device: B.
    """

    from_tokens: int
    row_length: int
    rows_per_device: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive optimiser steps over rows of one length.

    Args:
        first_step: how many steps of the stage come before.
        steps: how many there are.
        first_token: how many tokens of the stage come before.
        tokens_per_step: of all devices.
        row_length: T, tokens.
        rows_per_device: B.
    """

    first_step: int
    steps: int
    first_token: int
    tokens_per_step: int
    row_length: int
    rows_per_device: int


@dataclass(frozen=True)
class Timeline:
    """The phases of a stage, one after the other; every one of them has a step.

    All that a run needs to know of the table is a function of the step, so a resumed run has nothing to
    restore.
    """

    phases: tuple[Phase, ...]

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


def read_table(entries: Sequence[Any], tokens: float, key: str) -> list[RowLength]:
    """A stage's `row_lengths`, checked.

    Args:
        entries: plain dictionaries, as configured.
        tokens: the stage's budget.
        key: of the table.

    Raises:
        ValueError: naming the key and the fix.
    """
    if not isinstance(entries, list):
        raise ValueError(f"{key}={entries} must be a list of {{from_tokens, row_length, rows_per_device}}.")
    names = {field.name for field in fields(RowLength)}
    table: list[RowLength] = []
    for index, entry in enumerate(entries):
        place = f"{key}[{index}]"
        if not isinstance(entry, dict) or set(entry) != names:
            raise ValueError(f"{place}={entry} needs exactly the keys {', '.join(sorted(names))}.")
        table.append(RowLength(**{name: int(value) for name, value in entry.items()}))
        for name, least in {"row_length": 2, "rows_per_device": 1}.items():
            if getattr(table[-1], name) < least:
                raise ValueError(f"{place}.{name}={entry[name]} must be at least {least}.")
        begins = table[-1].from_tokens
        if index == 0 and begins != 0:
            raise ValueError(f"{place}.from_tokens={begins} must be 0: the table begins with the stage.")
        if index > 0 and begins <= table[-2].from_tokens:
            raise ValueError(
                f"{place}.from_tokens={begins} must be more than the {table[-2].from_tokens} of the entry "
                "before it; put the entries in order."
            )
        if begins >= tokens:
            raise ValueError(
                f"{place}.from_tokens={begins} is not below the stage's budget of {tokens:g} tokens; remove "
                "the entry, or raise tokens."
            )
    return table


def lay_out(table: Sequence[RowLength], tokens: float, rows_factor: int, stage: str) -> Timeline:
    """Turns tokens into optimiser steps: rows change between two steps, and none exceeds the budget.

    Args:
        table: the row lengths, the first from 0 on.
        tokens: the stage's budget.
        rows_factor: rows of an optimiser step for each row of a device's batch (batches x devices).
        stage: its key.

    Raises:
        ValueError: where an entry gets no step.
    """
    phases: list[Phase] = []
    first_step = first_token = 0
    for index, entry in enumerate(table):
        size = entry.row_length * entry.rows_per_device * rows_factor
        last = index == len(table) - 1
        end = tokens if last else table[index + 1].from_tokens
        steps = int((end - first_token) // size) if last else math.ceil((end - first_token) / size)
        if steps < 1 and len(table) == 1:
            raise ValueError(
                f"{stage}.tokens={tokens:g} is less than one optimiser step of {size} tokens; raise it, or "
                "take fewer or shorter rows."
            )
        if steps < 1:
            limit = f"{stage}.tokens={tokens:g}" if last else f"row_lengths[{index + 1}].from_tokens={end}"
            raise ValueError(
                f"{stage}.row_lengths[{index}] gets no optimiser step: one has {size} tokens, and the steps "
                f"before it end at {first_token}, which leaves none up to {limit}; move from_tokens, or take "
                "fewer rows_per_device."
            )
        phases.append(
            Phase(
                first_step=first_step,
                steps=steps,
                first_token=first_token,
                tokens_per_step=size,
                row_length=entry.row_length,
                rows_per_device=entry.rows_per_device,
            )
        )
        first_step, first_token = first_step + steps, first_token + steps * size
    return Timeline(tuple(phases))
