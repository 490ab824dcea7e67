"""Whether this machine can compile: what tests of native backends ask first; compilers that are scripts."""

from pathlib import Path

import pytest

from kernels import jit_build
from kernels.compilers import Compiler
from kernels.jit_build import BuildError

CPP_SOURCE = 'extern "C" int answer() { return 42; }\n'


def require_compiler(compiler: Compiler = jit_build.CXX) -> str:
    """The compiler's program; skips the test where none is installed. A failing build fails the test."""
    try:
        return jit_build.find_compiler(compiler)[0]
    except BuildError as error:
        pytest.skip(f"no {compiler.name} here: {error}")


def script(path: Path, body: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def wrapper(tmp_path: Path, body: str) -> str:
    """A compiler made of a shell script; questions about macros go to the real g++ or clang++."""
    real = jit_build.find_compiler()[0]
    macros = f'case "$*" in *-dM*) exec {real} "$@";; esac'
    return script(tmp_path / "compiler.sh", f"{macros}\n{body.format(real=real)}")
