"""Builds on first use: cached, private, once among racing processes, whole after a kill, clear in failure."""

import ctypes
import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from compilers import CPP_SOURCE, require_compiler, script, wrapper

from kernels import jit_build
from kernels.jit_build import BuildError

FLAGS = ["-O1", "-std=c++17"]
# The package without its __init__, which imports torch: a process that builds then starts at once.
BUILD_SCRIPT = f"""
import pathlib, sys, types
package = sys.modules["kernels"] = types.ModuleType("kernels")
package.__path__ = [{str(Path(jit_build.__file__).parent)!r}]
from kernels import jit_build
print(jit_build.build("demo", [pathlib.Path(sys.argv[1])], {FLAGS!r}, timeout=60))
"""


@pytest.fixture
def compiler() -> str:
    """The real compiler; these tests are about running one."""
    return require_compiler()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of built libraries, this test's own."""
    monkeypatch.setenv("TRANSMUTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def source(tmp_path, cache) -> Path:
    """A C++ file."""
    path = tmp_path / "demo.cpp"
    path.write_text(CPP_SOURCE)
    return path


def wait_for(condition) -> None:
    """Until `condition()` holds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def ended(pid: str) -> bool:
    """Whether a process is gone, or dead and not yet buried by its parent."""
    try:
        return (Path("/proc") / pid.strip() / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


# What a library is named by.


def test_builds_once_and_loads(compiler, source, tmp_path, monkeypatch, caplog):
    """The second call compiles nothing. The log says how long the first one took."""
    monkeypatch.setenv("CXX", wrapper(tmp_path, f'echo x >> {tmp_path}/log; exec {{real}} "$@"'))
    with caplog.at_level(logging.INFO, "kernels.jit_build"):
        library = jit_build.build("demo", [source], FLAGS)
    assert [record.message.split()[0] for record in caplog.records] == ["building", "built"]
    assert caplog.records[-1].message.endswith(" s")
    assert jit_build.load(library).answer() == 42
    assert jit_build.build("demo", [source], FLAGS) == library
    assert (tmp_path / "log").read_text() == "x\n"


def test_name_follows_source_headers_and_flags(compiler, source, tmp_path):
    """Another source, header or flag is another library."""
    header = tmp_path / "value.h"
    header.write_text("#define VALUE 42\n")
    source.write_text('#include "value.h"\n' + CPP_SOURCE.replace("42", "VALUE"))
    first = jit_build.build("demo", [source], FLAGS, headers=[header])
    assert jit_build.build("demo", [source], [*FLAGS, "-DX"], headers=[header]) != first
    header.write_text("#define VALUE 43\n")
    second = jit_build.build("demo", [source], FLAGS, headers=[header])
    source.write_text(source.read_text().replace("VALUE", "VALUE + 1"))
    third = jit_build.build("demo", [source], FLAGS, headers=[header])
    assert [jit_build.load(path).answer() for path in (first, second, third)] == [42, 43, 44]


def test_name_follows_the_processor(compiler, source, tmp_path, monkeypatch):
    """Nodes that share a home but not the processor build a library each, and find it again."""
    macros = f'case "$*" in *-dM*) echo "#define $PROCESSOR";; esac\nexec {compiler} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "compiler.sh", macros))
    libraries = []
    for processor in ("old", "new", "old"):
        monkeypatch.setenv("PROCESSOR", processor)
        libraries.append(jit_build.build("demo", [source], FLAGS))
    assert libraries[0] == libraries[2] != libraries[1]


# The folder.


def test_cache_is_private(compiler, source, cache):
    """Mode 0700, restored if somebody opened it."""
    jit_build.build("demo", [source], FLAGS)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o777)
    assert jit_build.cache_folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_foreign_cache_is_refused(cache, monkeypatch):
    """A folder of another user, who could swap the code, is not used."""
    jit_build.cache_folder()
    monkeypatch.setattr(jit_build.os, "getuid", lambda: 4242)
    with pytest.raises(BuildError, match="belongs to user.*TRANSMUTE_CACHE"):
        jit_build.cache_folder()


def test_linked_cache_is_refused(cache, tmp_path):
    """A link in place of the folder is not followed."""
    cache.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="not a plain folder"):
        jit_build.cache_folder()


def test_named_cache_may_be_relative_or_start_at_home(tmp_path, monkeypatch):
    """A relative folder lies in the current one and is told in full; ~ is the home, or there is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSMUTE_CACHE", "near")
    assert jit_build.cache_folder() == tmp_path / "near" / "kernels"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRANSMUTE_CACHE", "~/far")
    assert jit_build.cache_folder() == tmp_path / "far" / "kernels"
    monkeypatch.setenv("TRANSMUTE_CACHE", "~nobody-of-that-name/far")
    with pytest.raises(BuildError, match="no such home.*set TRANSMUTE_CACHE"):
        jit_build.cache_folder()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "near"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home, with a temporary folder beside it and no cache named."""
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("TRANSMUTE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(jit_build.tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "home"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_home_that_cannot_be_written(home, code, monkeypatch):
    """A folder of this user in the temporary directory serves; where that fails too, both are told."""
    make_folder = os.mkdir

    def refuse(path, *arguments, **options):
        if str(path).startswith(str(home)):
            raise OSError(code, os.strerror(code), str(path))
        return make_folder(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    folder = jit_build.cache_folder()
    assert folder == home.parent / "temporary" / f"transmute-{os.getuid()}" / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr(jit_build.tempfile, "tempdir", str(home))
    with pytest.raises(BuildError, match=f"(.*{os.strerror(code)}){{2}}.*set TRANSMUTE_CACHE"):
        jit_build.cache_folder()


def test_folder_without_execution(home, monkeypatch):
    """No library loads from a noexec file system: a home there is passed over, a named folder refused."""
    flags_of = os.statvfs
    noexec = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(
        os, "statvfs", lambda path: noexec if str(path).startswith(str(home)) else flags_of(path)
    )
    assert jit_build.cache_folder().parent.parent == home.parent / "temporary"
    monkeypatch.setenv("TRANSMUTE_CACHE", str(home / "cache"))
    with pytest.raises(BuildError, match="mounted noexec.*execute"):
        jit_build.cache_folder()


# Several processes, and what is left of them.


def test_racing_processes_build_once(compiler, source, tmp_path, monkeypatch):
    """Three processes start together; one compiles, all get the same library."""
    slow = wrapper(tmp_path, f'echo x >> {tmp_path}/log; sleep 0.4; exec {{real}} "$@"')
    monkeypatch.setenv("CXX", slow)
    command = [sys.executable, "-c", BUILD_SCRIPT, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outputs) == 1 and (tmp_path / "log").read_text() == "x\n"
    assert ctypes.CDLL(outputs.pop().strip()).answer() == 42


def test_killed_build_leaves_nothing_half_written(compiler, source, cache, tmp_path, monkeypatch):
    """A killed build holds no lock; the next one is whole, whatever the orphaned compiler writes after it."""
    orphan = f"""
        for output; do :; done
        [ -e {tmp_path}/pid ] && exec {{real}} "$@"
        echo half > "$output"; echo $$ > {tmp_path}/pid
        until [ -e {tmp_path}/go ]; do sleep 0.02; done
        echo rest >> "$output"
        true > {tmp_path}/done"""
    monkeypatch.setenv("CXX", wrapper(tmp_path, orphan))
    process = subprocess.Popen([sys.executable, "-c", BUILD_SCRIPT, str(source)])
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        process.kill()
        process.wait()
        left = [path.suffix for path in cache.iterdir()]
        assert sorted(left) == [".lock", ".partial"]
        library = jit_build.build("demo", [source], FLAGS)
    finally:
        process.kill()
        (tmp_path / "go").touch()
    wait_for(lambda: (tmp_path / "done").exists() or ended((tmp_path / "pid").read_text()))
    assert not list(cache.glob("*.partial"))
    assert jit_build.build("demo", [source], FLAGS) == library and jit_build.load(library).answer() == 42


def test_library_of_a_faster_node_stays(cache, tmp_path):
    """Where locks do not reach across nodes the first library stays: its node may have mapped it."""
    library = jit_build.cache_folder() / "demo-1" / "demo.so"
    for node in ("first", "second"):
        (cache / node).mkdir()
        (cache / node / "demo.so").write_text(node)
        jit_build._publish(cache / node, library)
    assert library.read_text() == "first" and jit_build._whole(library)


@pytest.mark.parametrize("damage", ["truncated", "missing", "unsealed"])
def test_damaged_library_is_built_again(compiler, source, damage, caplog):
    """Mapping a truncated library could kill the process: it is noticed before, and built again."""
    library = jit_build.build("demo", [source], FLAGS)
    if damage == "truncated":
        os.truncate(library, library.stat().st_size // 2)
    elif damage == "missing":
        library.unlink()
    else:
        library.with_suffix(".sha256").unlink()
    assert jit_build.build("demo", [source], FLAGS) == library
    assert "is damaged and is built again" in caplog.text
    assert jit_build.load(library).answer() == 42


def test_file_that_is_no_library(tmp_path):
    """The system's refusal comes with the path and the way out."""
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    with pytest.raises(BuildError, match="damaged.so cannot be loaded.*delete it.*backend=chunked"):
        jit_build.load(damaged)


def test_lock_held_too_long(cache):
    """A lock that another process will not give up ends in an error, not in waiting for ever."""
    path = jit_build.cache_folder() / "demo.lock"
    with jit_build._locked(path, 1):
        with (
            pytest.raises(BuildError, match=rf"another process \({os.getpid()}\) has held"),
            jit_build._locked(path, 0.1),
        ):
            pass


def test_lock_is_given_back_although_a_child_has_the_file_open(cache):
    """A data loader's worker forked during the build does not keep the others waiting."""
    path = jit_build.cache_folder() / "demo.lock"
    with jit_build._locked(path, 1):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with jit_build._locked(path, 0.1):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks(compiler, source, code, monkeypatch):
    """The message names the fix."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(jit_build.fcntl, "flock", refuse)
    with pytest.raises(
        BuildError, match=f"cannot be locked: {os.strerror(code)}; set TRANSMUTE_CACHE.*local"
    ):
        jit_build.build("demo", [source], FLAGS)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk(compiler, source, code, monkeypatch):
    """Where the library's folder cannot be made, the message says what is wrong and names the fix."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(jit_build.tempfile, "mkdtemp", refuse)
    with pytest.raises(
        BuildError, match=f"cannot be made: .*{os.strerror(code)}; set TRANSMUTE_CACHE.*space"
    ):
        jit_build.build("demo", [source], FLAGS)


def test_endless_compiler_is_stopped(compiler, source, tmp_path, monkeypatch):
    """A compiler that hangs is stopped, its children included."""
    monkeypatch.setenv("CXX", wrapper(tmp_path, f"sleep 300 & echo $! > {tmp_path}/child; wait"))
    with pytest.raises(BuildError, match="stopped after 1 s"):
        jit_build.build("demo", [source], FLAGS, timeout=1)
    wait_for(lambda: ended((tmp_path / "child").read_text()))
