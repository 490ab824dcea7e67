"""Builds a shared library from source on first use, once per machine type, and loads it with ctypes.

The library lives in a private cache folder under a name derived from everything that shaped it: the sources,
the flags, and all macros the compiler predefines for this processor (its version among them). A lock of the
operating system, which dies with its holder, lets one process build while the others wait; the finished file
appears by a rename, so a killed build leaves nothing half-written.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

REMEDY = (
    "install a C++17 compiler (g++ or clang++, or name one in the variable CXX) or choose backend=chunked"
)
SHOWN_LINES = 20  # of the compiler's output


class BuildError(RuntimeError):
    """A native library could not be built or loaded; the message says what was tried and how to go on."""


def cache_folder() -> Path:
    """The private folder of built libraries, made if need be.

    $TRANSMUTE_CACHE/kernels when that variable is set, else ~/.cache/transmute/kernels, else (a home that
    cannot be written) a folder of this user in the temporary directory.

    Raises:
        BuildError: the folder cannot be made, or belongs to somebody else (who could swap the code we load).
    """
    named = os.environ.get("TRANSMUTE_CACHE")
    if named:
        candidates = [Path(named).expanduser()]
    else:
        home = Path(os.path.expanduser("~"))
        candidates = [home / ".cache" / "transmute", Path(tempfile.gettempdir()) / f"transmute-{os.getuid()}"]
    problems = []
    for root in candidates:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _private((root if named else _private(root)) / "kernels")
        except OSError as error:
            problems.append(f"{root}: {error.strerror or error}")
    tried = "; ".join(problems)
    raise BuildError(
        f"no folder for built kernels: {tried}; set TRANSMUTE_CACHE to a folder you own and can write"
    )


def _private(folder: Path) -> Path:
    """Make `folder` if missing, check that it is ours and writable, and take away everybody else's access."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{folder} is not a plain folder")
    if status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to user {status.st_uid}, not to you ({os.getuid()})")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


def find_compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else g++, else clang++; BuildError when there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(
                f"the compiler named by CXX ({named[0]!r}) does not exist; unset CXX, or {REMEDY}"
            )
        return named
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler found (looked at $CXX, g++, clang++); {REMEDY}")


def _run(command: Sequence[str], timeout: float) -> str:
    """Standard output of a compiler command; BuildError when it fails or takes over `timeout` seconds."""
    shown = shlex.join(command)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, complaints = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # the driver's children too, or they outlive it
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BuildError(
                f"the compiler was stopped after {timeout:g} s\n  {shown}\nfix: {REMEDY}"
            ) from None
        raise
    if process.returncode != 0:
        last = "\n".join(complaints.strip().splitlines()[-SHOWN_LINES:])
        raise BuildError(
            f"the compiler failed (exit status {process.returncode})\n  {shown}\n{last}\nfix: {REMEDY}"
        )
    return output


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold an exclusive lock on `path`; BuildError when it cannot be had within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    with open(path, "w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"another process has held {path} for {timeout:g} s; end it and retry"
                    ) from None
                time.sleep(0.05)
        yield


def build(name: str, sources: Sequence[Path], flags: Sequence[str], *, timeout: float = 180.0) -> Path:
    """Compile C++ sources into a shared library, or find it in the cache.

    Args:
        name: start of the library's file name.
        sources: files to compile; only they are hashed, so they must include nothing else that is ours.
        flags: compiler flags, without the output.
        timeout: seconds allowed for the compiler, and for waiting on another process that builds the same.

    Returns:
        The path of the library.

    Raises:
        BuildError: with the command, the compiler's last lines and the way out.
    """
    compiler = find_compiler()
    macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull], timeout)
    digest = hashlib.sha256()
    for part in (
        macros.encode(),
        *(flag.encode() for flag in flags),
        *(path.read_bytes() for path in sources),
    ):
        digest.update(len(part).to_bytes(8, "big") + part)
    folder = cache_folder()
    library = folder / f"{name}-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    with _locked(library.with_suffix(".lock"), timeout + 10):
        if library.exists():
            return library
        for abandoned in folder.glob(f"{library.stem}.*.partial"):
            abandoned.unlink()
        partial = folder / f"{library.stem}.{os.getpid()}.partial"
        log.info("building %s", library)
        try:
            _run([*compiler, *flags, "-shared", "-fPIC", *map(str, sources), "-o", str(partial)], timeout)
            os.replace(partial, library)
        finally:
            partial.unlink(missing_ok=True)
    return library


def load(library: Path) -> ctypes.CDLL:
    """Load a built library; BuildError when the system refuses it (noexec folder, damaged file)."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(
            f"{library} cannot be loaded: {error}; delete it, or set TRANSMUTE_CACHE to a folder that allows "
            "execution, or choose backend=chunked"
        ) from error
