"""What kind of call an operator gets: all that the choice of a backend may depend on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

HEAD_SIZES = (32, 64, 128)  # of the recurrences
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A GPU is filled by about so many rows times heads; below, backends are measured and chosen separately.
MANY_UNITS = 64


@dataclass(frozen=True)
class Case:
    """A kind of call.

    Attributes:
        device_type: "cpu", "cuda" (also AMD GPUs), ...
        dtype: of the operator's first input.
        head_size: N.
        many: whether rows times heads reach MANY_UNITS.
    """

    device_type: str
    dtype: torch.dtype
    head_size: int
    many: bool = True


def unsupported(case: Case, head_sizes: Sequence[int] = HEAD_SIZES) -> str | None:
    """What no backend of an operator with these head sizes can do, as a reason, else None."""
    if case.head_size not in head_sizes:
        return f"head size {case.head_size} is not one of {head_sizes}"
    known = case.dtype in DTYPES
    return None if known else f"{case.dtype} is not a floating type of float64, float32, bfloat16, float16"


def anything(_: Case) -> None:
    """What a backend supports that runs every case."""
