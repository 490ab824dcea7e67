"""What an exported file has in the place of kernels/dispatch.py: backends in plain torch, and no choice to
explain."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.case import Case


class Backend(NamedTuple):
    """One implementation of an operator; the fields are those of kernels/dispatch.py."""

    name: str
    supports: Callable[[Case], str | None]
    run: Callable
    merit: str
    native: bool = False
    step: Callable | None = None


def chosen_name(
    op: str, name: str, device_type: str, dtype: torch.dtype, head_size: int, many: bool, step: bool = False
) -> str:
    """The backend named, or `chunked` for `auto`."""
    return "chunked" if name == "auto" else name
