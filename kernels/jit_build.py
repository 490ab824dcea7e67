"""Builds a shared library from source on first use, once per machine type, and loads it with ctypes.

The library lives in a private cache folder under a name derived from everything that shaped it: the sources,
the flags, and all macros the compiler predefines for this processor (its version among them). Torch's
version is not: the sources see addresses and sizes, never torch's headers, so one library serves any torch.

A lock of the operating system, which dies with its holder, lets one process of a node build while the others
wait. A build happens in a folder of its own that is renamed when it is whole: a killed build leaves nothing
half-written under a library's name, and what its orphaned compiler still writes goes nowhere.
"""

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kernels.compilers import CXX, HIPCC, NVCC, REMEDY, BuildError, Compiler, find_compiler, identity, run

__all__ = ["CXX", "HIPCC", "NVCC", "REMEDY", "BuildError", "build", "cache_folder", "find_compiler", "load"]

log = logging.getLogger(__name__)

PARTIAL = ".partial"  # suffix of the folder of a build that is under way, or was killed


def cache_folder() -> Path:
    """The private folder of built libraries, made if need be.

    $TRANSMUTE_CACHE/kernels when that variable is set, else ~/.cache/transmute/kernels, else (a home that
    cannot be written, or whose files cannot be executed) a folder of this user in the temporary directory.

    Raises:
        BuildError: the folder cannot be made, or belongs to somebody else (who could swap the code we load).
    """
    named = os.environ.get("TRANSMUTE_CACHE")
    if named:
        candidates = [os.path.expanduser(named)]
    else:
        temporary = Path(tempfile.gettempdir()) / f"transmute-{os.getuid()}"
        candidates = [os.path.expanduser("~/.cache/transmute"), str(temporary)]
    problems = []
    for candidate in candidates:
        root = Path(candidate)
        if candidate.startswith("~"):
            problems.append(f"{candidate}: there is no such home")
            continue
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _private((root if named else _private(root)) / "kernels").absolute()
        except OSError as error:
            problems.append(f"{root}: {error.strerror or error}")
    tried = "; ".join(problems)
    raise BuildError(
        f"no folder for built kernels: {tried}; set TRANSMUTE_CACHE to a folder you own, can write and can "
        "execute files in"
    )


def _private(folder: Path) -> Path:
    """Make `folder` if missing, check that it is ours and usable, and take away everybody else's access."""
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
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise PermissionError(f"{folder} is on a file system mounted noexec, from which no library loads")
    return folder


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold an exclusive lock on `path`; BuildError when it cannot be had within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    waiting = False
    with open(path, "a+") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    log.info("waiting for process %s, which builds the same", _holder(path))
                waiting = True
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"another process ({_holder(path)}) has held {path} for {timeout:g} s; "
                        "end it and retry"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                raise BuildError(
                    f"{path} cannot be locked: {error.strerror}; set TRANSMUTE_CACHE to a folder on a local "
                    "disk"
                ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        try:
            yield
        finally:
            # Closing would not do where another thread has forked meanwhile: the child holds the file too.
            fcntl.flock(handle, fcntl.LOCK_UN)


def _holder(lock: Path) -> str:
    """The process that a lock file names."""
    return lock.read_text() or "unknown"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _whole(library: Path) -> bool:
    """Whether a library is there as it was built. A truncated one could kill the process that maps it."""
    try:
        return library.with_suffix(".sha256").read_text() == _digest(library.read_bytes())
    except FileNotFoundError:
        return False


def _publish(partial: Path, library: Path) -> None:
    """Seal a built library and rename its folder into place, unless another node was faster."""
    built = partial / library.name
    built.with_suffix(".sha256").write_text(_digest(built.read_bytes()))
    try:
        partial.rename(library.parent)
    except OSError as error:
        # Never replaced: locks need not reach across nodes, and the other node may have mapped its library.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def build(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    *,
    headers: Sequence[Path] = (),
    compiler: Compiler = CXX,
    timeout: float = 180.0,
) -> Path:
    """Compile sources into a shared library, or find it in the cache.

    Args:
        name: the library's name, without a suffix.
        sources: files to compile.
        flags: compiler flags (target architectures among them), without the output.
        headers: files of ours that the sources include; a change in them is a change of the library.
        compiler: CXX, NVCC or HIPCC.
        timeout: seconds allowed for the compiler, and for waiting on another process that builds the same.

    Returns:
        The path of the library.

    Raises:
        BuildError: with the command, the compiler's last lines and the way out.
    """
    command = find_compiler(compiler)
    parts = [platform.machine(), *platform.libc_ver(), *identity(compiler, command, flags, timeout)]
    digest = hashlib.sha256()
    for part in (
        *(part.encode() for part in parts),
        *(path.read_bytes() for path in sources),
        b"headers",
        *(path.read_bytes() for path in headers),
    ):
        digest.update(len(part).to_bytes(8, "big") + part)
    folder = cache_folder()
    library = folder / f"{name}-{digest.hexdigest()[:20]}" / f"{name}.so"
    options = [*compiler.shared, "-x", compiler.language, *map(str, sources), *flags]
    try:
        if not _whole(library):
            _build_once(library, command, options, compiler, timeout)
    except OSError as error:
        raise BuildError(
            f"{library} cannot be made: {error}; set TRANSMUTE_CACHE to a folder that you can write, with "
            "free space"
        ) from error
    return library


def _build_once(
    library: Path, command: Sequence[str], options: Sequence[str], compiler: Compiler, timeout: float
) -> None:
    """Build `library` unless another process of this node does; OSError when the folder cannot be written."""
    folder = library.parent.parent
    # Of this node only: where several share the folder, their locks may not reach each other.
    ours = f"{library.parent.name}.{os.uname().nodename.replace('.', '-')}."
    with _locked(folder / f"{ours}lock", timeout + 10):
        if _whole(library):
            return
        if library.parent.exists():
            log.warning("%s is damaged and is built again", library)
            shutil.rmtree(library.parent)
        for abandoned in folder.glob(f"{ours}*{PARTIAL}"):
            shutil.rmtree(abandoned, ignore_errors=True)  # an orphaned compiler may be writing there still
        partial = Path(tempfile.mkdtemp(prefix=ours, suffix=PARTIAL, dir=folder))
        start = time.monotonic()
        log.info("building %s with the %s %s", library, compiler.name, command[0])
        try:
            run([*command, *options, "-o", str(partial / library.name)], compiler, timeout)
            _publish(partial, library)
            log.info("built %s in %.1f s", library, time.monotonic() - start)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def load(library: Path) -> ctypes.CDLL:
    """Load a built library; BuildError when the system refuses it."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(
            f"{library} cannot be loaded: {error}; delete it, or set TRANSMUTE_CACHE to a folder that allows "
            "execution, or choose another backend (backend=chunked)"
        ) from error
