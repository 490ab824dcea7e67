"""Whether this machine can compile: what tests of the C++ backend ask first."""

import pytest

from kernels import jit_build
from kernels.jit_build import BuildError


def require_compiler() -> str:
    """The C++ compiler; skips the test where none is installed. A failing build fails the test."""
    try:
        return jit_build.find_compiler()[0]
    except BuildError as error:
        pytest.skip(f"no C++ compiler here: {error}")
