"""Builds on first use: cached, private, once among racing processes, whole after a kill, clear in failure."""

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compilers import require_compiler

from kernels import jit_build
from kernels.jit_build import BuildError

SOURCE = 'extern "C" int answer() { return 42; }\n'
FLAGS = ["-O1", "-std=c++17"]
# Loads jit_build.py alone: a process that builds then starts in a fraction of a second.
BUILD_SCRIPT = f"""
import importlib.util, sys, pathlib
spec = importlib.util.spec_from_file_location("jit_build", {str(Path(jit_build.__file__))!r})
jit_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jit_build)
print(jit_build.build("demo", [pathlib.Path(sys.argv[1])], {FLAGS!r}, timeout=60))
"""


@pytest.fixture
def compiler() -> str:
    """The real compiler; these tests are about running one."""
    return require_compiler()


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A C++ file, and a cache of this test's own."""
    monkeypatch.setenv("TRANSMUTE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "demo.cpp"
    path.write_text(SOURCE)
    return path


def wrapper(tmp_path: Path, body: str) -> Path:
    """A compiler made of a shell script; questions about macros go to the real g++ or clang++."""
    script = tmp_path / "compiler.sh"
    real = jit_build.find_compiler()[0]
    script.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) exec {real} "$@";; esac\n{body.format(real=real)}\n')
    script.chmod(0o755)
    return script


def test_builds_once_and_loads(compiler, source, tmp_path, monkeypatch):
    """The second call compiles nothing."""
    monkeypatch.setenv("CXX", str(wrapper(tmp_path, f'echo x >> {tmp_path}/log; exec {{real}} "$@"')))
    library = jit_build.build("demo", [source], FLAGS)
    assert jit_build.load(library).answer() == 42
    assert jit_build.build("demo", [source], FLAGS) == library
    assert (tmp_path / "log").read_text() == "x\n"


def test_name_follows_source_and_flags(compiler, source):
    """Another source or flag is another library."""
    first = jit_build.build("demo", [source], FLAGS)
    assert jit_build.build("demo", [source], [*FLAGS, "-DX"]) != first
    source.write_text(SOURCE.replace("42", "43"))
    second = jit_build.build("demo", [source], FLAGS)
    assert second != first and jit_build.load(second).answer() == 43


def test_cache_is_private(compiler, source):
    """Mode 0700, restored if somebody opened it."""
    folder = jit_build.build("demo", [source], FLAGS).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert jit_build.cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_foreign_cache_is_refused(source, monkeypatch):
    """A folder of another user, who could swap the code, is not used."""
    jit_build.cache_folder()
    monkeypatch.setattr(jit_build.os, "getuid", lambda: 4242)
    with pytest.raises(BuildError, match="belongs to user.*TRANSMUTE_CACHE"):
        jit_build.cache_folder()


def test_linked_cache_is_refused(source, tmp_path):
    """A link in place of the folder is not followed."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="not a plain folder"):
        jit_build.cache_folder()


def test_read_only_home_falls_back_to_temporary_folder(tmp_path, monkeypatch):
    """Where the home cannot be written, a folder of this user in the temporary directory serves."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.delenv("TRANSMUTE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(jit_build.tempfile, "tempdir", str(temporary))
    make_folder = os.mkdir

    def read_only(path, *arguments, **options):
        if str(path).startswith(str(home)):
            raise OSError(30, "Read-only file system", str(path))
        return make_folder(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", read_only)
    folder = jit_build.cache_folder()
    assert folder == temporary / f"transmute-{os.getuid()}" / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr(jit_build.tempfile, "tempdir", str(home))
    with pytest.raises(BuildError, match="Read-only file system.*set TRANSMUTE_CACHE"):
        jit_build.cache_folder()


def test_racing_processes_build_once(compiler, source, tmp_path, monkeypatch):
    """Three processes start together; one compiles, all get the same library."""
    slow = wrapper(tmp_path, f'echo x >> {tmp_path}/log; sleep 0.4; exec {{real}} "$@"')
    monkeypatch.setenv("CXX", str(slow))
    command = [sys.executable, "-c", BUILD_SCRIPT, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outputs) == 1 and (tmp_path / "log").read_text() == "x\n"
    assert ctypes.CDLL(outputs.pop().strip()).answer() == 42


def test_killed_build_leaves_nothing_half_written(compiler, source, tmp_path, monkeypatch):
    """A build killed while writing its output holds no lock; the next one builds a whole library."""
    half = f'for last; do :; done; echo half > "$last"; echo $$ > {tmp_path}/pid; exec sleep 30'
    monkeypatch.setenv("CXX", str(wrapper(tmp_path, half)))
    process = subprocess.Popen([sys.executable, "-c", BUILD_SCRIPT, str(source)])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline, "the build never started"
        time.sleep(0.02)
    process.kill()
    process.wait()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    folder = tmp_path / "cache" / "kernels"
    assert list(folder.glob("*.partial")) and not list(folder.glob("*.so"))
    monkeypatch.setenv("CXX", compiler)
    assert jit_build.load(jit_build.build("demo", [source], FLAGS)).answer() == 42
    assert not list(folder.glob("*.partial"))


def test_no_compiler(source, tmp_path, monkeypatch):
    """Nothing to compile with: the message says what was looked for and what to do."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found.*install.*backend=chunked"):
        jit_build.build("demo", [source], FLAGS)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(BuildError, match="CXX.*no-such-compiler.*does not exist"):
        jit_build.build("demo", [source], FLAGS)


def test_bad_source(compiler, source, tmp_path):
    """A compile error shows the command, the compiler's own words and the way out, and leaves no file."""
    source.write_text("int answer( { return unknown_name; }\n")
    with pytest.raises(BuildError) as caught:
        jit_build.build("demo", [source], FLAGS)
    message = str(caught.value)
    assert "-shared" in message and str(source) in message and "error:" in message
    assert "choose backend=chunked" in message
    assert {path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()} <= {".lock"}


def test_endless_compiler_is_stopped(compiler, source, tmp_path, monkeypatch):
    """A compiler that hangs is stopped, its children included."""
    monkeypatch.setenv("CXX", str(wrapper(tmp_path, f"sleep 30 & echo $! > {tmp_path}/child; wait")))
    with pytest.raises(BuildError, match="stopped after 1 s"):
        jit_build.build("demo", [source], FLAGS, timeout=1)
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the compiler's child outlived it"
        time.sleep(0.02)


def test_lock_held_too_long(compiler, source, monkeypatch):
    """A lock that another process will not give up ends in an error, not in waiting for ever."""
    path = jit_build.cache_folder() / "demo.lock"
    with jit_build._locked(path, 1):
        with pytest.raises(BuildError, match="another process has held"), jit_build._locked(path, 0.1):
            pass


def test_damaged_library(source, tmp_path):
    """A file that is no library is reported with its path."""
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    with pytest.raises(BuildError, match="damaged.so cannot be loaded.*delete it"):
        jit_build.load(damaged)
