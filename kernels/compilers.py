"""The compilers that build kernels: where each is looked for, how it says who it is, what to do without."""

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass


class BuildError(RuntimeError):
    """A native library could not be built or loaded; the message says what was tried and how to go on."""


@dataclass(frozen=True)
class Compiler:
    """A kind of compiler.

    Attributes:
        name: as messages call it.
        variable: the environment variable in which the user may name a command.
        candidates: the commands looked for where the user named none, in this order.
        language: of the sources, whatever their suffix, as the option -x takes it.
        shared: options that make a shared library.
        macros: options that print every predefined macro instead of compiling.
        read: environment variables from which the compiler itself takes more options.
        remedy: what the user can do when there is none, or it fails.
    """

    name: str
    variable: str
    candidates: tuple[str, ...]
    language: str
    shared: tuple[str, ...]
    macros: tuple[str, ...]
    read: tuple[str, ...]
    remedy: str


REMEDY = (
    "install a C++17 compiler (g++ or clang++, or name one in the variable CXX) or choose backend=chunked"
)
CXX = Compiler(
    name="C++ compiler",
    variable="CXX",
    candidates=("g++", "clang++"),
    language="c++",
    shared=("-shared", "-fPIC"),
    macros=("-dM", "-E"),
    read=(),
    remedy=REMEDY,
)
NVCC = Compiler(
    name="CUDA compiler",
    variable="NVCC",
    candidates=("nvcc", "$CUDA_HOME/bin/nvcc", "/usr/local/cuda/bin/nvcc"),
    language="cu",
    shared=("-shared", "-Xcompiler", "-fPIC"),
    macros=("-E", "-Xcompiler", "-dM"),
    read=("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
    remedy="install the CUDA toolkit (or name its nvcc in the variable NVCC, and its C++ compiler in "
    "NVCC_CCBIN) or choose another backend (backend=triton or backend=chunked)",
)
HIPCC = Compiler(
    name="HIP compiler",
    variable="HIPCC",
    candidates=("hipcc", "$ROCM_PATH/bin/hipcc", "/opt/rocm/bin/hipcc"),
    language="hip",
    shared=("-shared", "-fPIC"),
    macros=("--cuda-host-only", "-dM", "-E"),  # the GPU's architecture is in the flags
    read=("HIPCC_COMPILE_FLAGS_APPEND", "HIPCC_LINK_FLAGS_APPEND"),
    remedy="install ROCm's hipcc (or name it in the variable HIPCC) or choose another backend "
    "(backend=triton or backend=chunked)",
)

SHOWN_LINES = 20  # of the compiler's output


def find_compiler(compiler: Compiler = CXX) -> list[str]:
    """The compiler as a command: what its variable names, else the first candidate; BuildError if none."""
    try:
        command = shlex.split(os.environ.get(compiler.variable, ""))
    except ValueError as error:
        raise BuildError(f"{compiler.variable} is no command: {error}; correct it or unset it") from None
    if command and shutil.which(command[0]) is None:
        raise BuildError(
            f"the compiler named by {compiler.variable} ({command[0]!r}) does not exist; "
            f"unset {compiler.variable}, or {compiler.remedy}"
        )
    if not command:
        candidates = [os.path.expandvars(candidate) for candidate in compiler.candidates]
        command = [candidate for candidate in candidates if shutil.which(candidate)][:1]
    if not command:
        looked = ", ".join((f"${compiler.variable}", *compiler.candidates))
        raise BuildError(f"no {compiler.name} found (looked at {looked}); {compiler.remedy}")
    return [*command, *_host_compiler()] if compiler is NVCC else command


def _host_compiler() -> list[str]:
    """Options that make nvcc call the compiler C++ is built with; none where nvcc was told directly."""
    told = " ".join(os.environ.get(name, "") for name in NVCC.read)
    if os.environ.get("NVCC_CCBIN") or "-ccbin" in told or "--compiler-bindir" in told:
        return []
    words = find_compiler(CXX)
    # Of "ccache g++ -m64", nvcc takes one program and, each behind an -Xcompiler, the options.
    program = [word for word in words if not word.startswith("-")][-1]
    options = [word for word in words if word.startswith("-")]
    return ["-ccbin", program, *(part for option in options for part in ("-Xcompiler", option))]


def identity(compiler: Compiler, command: Sequence[str], flags: Sequence[str], timeout: float) -> list[str]:
    """What, beside the sources, shapes the code that a command makes with these flags.

    The predefined macros tell the compiler's version and the target's features (-march=native means another
    thing on another processor), and with nvcc those of the C++ compiler behind it.
    """
    macros = run([*command, *flags, *compiler.macros, "-x", compiler.language, os.devnull], compiler, timeout)
    return [*command, *flags, *(os.environ.get(name, "") for name in compiler.read), macros]


def run(command: Sequence[str], compiler: Compiler, timeout: float) -> str:
    """Standard output of a compiler's command; BuildError when it fails or takes over `timeout` seconds."""
    shown = shlex.join(command)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except OSError as error:
        raise BuildError(
            f"the {compiler.name} cannot be started: {error}\n  {shown}\nfix: {compiler.remedy}"
        ) from error
    try:
        output, complaints = process.communicate(timeout=timeout)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the driver's children too, or they outlive it
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BuildError(
                f"the {compiler.name} was stopped after {timeout:g} s\n  {shown}\nfix: {compiler.remedy}"
            ) from None
        raise
    if process.returncode != 0:
        last = "\n".join(complaints.strip().splitlines()[-SHOWN_LINES:])
        raise BuildError(
            f"the {compiler.name} failed (exit status {process.returncode})\n  {shown}\n{last}\n"
            f"fix: {_disk(complaints) or compiler.remedy}"
        )
    return output


def _disk(complaints: str) -> str | None:
    """The way out of a full disk, if that is what a compiler complains of."""
    if "No space left on device" not in complaints and "Disk quota exceeded" not in complaints:
        return None
    return (
        "free some space, or set TRANSMUTE_CACHE (built libraries) and TMPDIR (the compiler's own files) to "
        "folders with space"
    )
