"""Calls of the operators that several test files make, and what is right."""

from compilers import require_compiler
from torch import Tensor

from kernels.examples import Example, errors, example, too_large
from kernels.wkv6 import wkv6, wkv6_step
from kernels.wkv7 import wkv7, wkv7_step

OPERATORS = {"wkv7": wkv7, "wkv6": wkv6}
STEPS = {"wkv7": wkv7_step, "wkv6": wkv6_step}
# An operator, and whether it has its bonus.
VARIANTS = {"wkv7": ("wkv7", False), "wkv6": ("wkv6", False), "wkv6 with bonus": ("wkv6", True)}


def usable(name: str) -> str:
    """The backend's name; skips the test where it is the C++ one and nothing can compile it."""
    if name == "cpu":
        require_compiler()
    return name


def call(variant: tuple[str, bool], batch=2, tokens=20, heads=2, size=32, **options) -> Example:
    """An example call of an operator."""
    op, bonus = variant
    return example(op, batch, tokens, heads, size, bonus=bonus, **options)


def check(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance="fp32") -> None:
    """Every result is right; the message names all that are not."""
    assert list(found) == list(exact)
    assert not too_large(errors(found, exact), tolerance)


def apply(made: Example, backend: str, **changes: Tensor) -> tuple[Tensor, Tensor]:
    """The operator on an example's arguments, some of them changed."""
    arguments = {**made.inputs, "document_ids": made.document_ids, **changes}
    return OPERATORS[made.op](**arguments, backend=backend)
