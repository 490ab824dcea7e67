"""Compilers: found where they are, told apart, and clear when they fail, with the way out."""

import re
from pathlib import Path

import pytest
from compilers import CPP_SOURCE, require_compiler, script, wrapper

from kernels import jit_build
from kernels.jit_build import BuildError

FLAGS = ["-O1", "-std=c++17"]
COMPILERS = [jit_build.CXX, jit_build.NVCC, jit_build.HIPCC]


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


@pytest.fixture
def compiler() -> str:
    """The real compiler; these tests are about running one."""
    return require_compiler()


def test_full_disk_under_the_compiler(compiler, source, cache, tmp_path, monkeypatch):
    """A compiler out of space is not a compiler to replace."""
    monkeypatch.setenv("CXX", wrapper(tmp_path, f"[ $LC_ALL = C ] && cat {tmp_path}/demo.cpp > /dev/full"))
    with pytest.raises(
        BuildError, match="(?s)No space left.*fix: free some space.*TRANSMUTE_CACHE.*TMPDIR"
    ) as caught:
        jit_build.build("demo", [source], FLAGS)
    assert "install" not in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_bad_source(compiler, source, cache):
    """A compile error shows the command, the compiler's own words and the way out, and leaves no file."""
    source.write_text("int answer( { return unknown_name; }\n")
    with pytest.raises(BuildError) as caught:
        jit_build.build("demo", [source], FLAGS)
    message = str(caught.value)
    assert "-shared" in message and str(source) in message and "error:" in message
    assert "choose backend=chunked" in message
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.fixture
def no_tools(tmp_path, monkeypatch) -> Path:
    """A machine without compilers: an empty folder as PATH, and nothing in the usual places."""
    for name in ("CUDA_HOME", "ROCM_PATH", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for kind in COMPILERS:
        monkeypatch.delenv(kind.variable, raising=False)
        usual = tuple(place for place in kind.candidates if not place.startswith("/"))
        monkeypatch.setitem(kind.__dict__, "candidates", usual)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", COMPILERS, ids=lambda kind: kind.variable)
def test_no_compiler(kind, no_tools, source, monkeypatch):
    """Nothing to compile with: the message says what was looked for and what to do."""
    looked = rf"looked at \${kind.variable}, {kind.candidates[0]}.*install.*backend=chunked"
    with pytest.raises(BuildError, match=rf"no {kind.name.replace('+', '.')} found \({looked}"):
        jit_build.build("demo", [source], FLAGS, compiler=kind)
    monkeypatch.setenv(kind.variable, "no-such-compiler -m64")
    with pytest.raises(
        BuildError, match=f"named by {kind.variable}.*no-such-compiler.*does not exist.*unset"
    ):
        jit_build.build("demo", [source], FLAGS, compiler=kind)
    monkeypatch.setenv(kind.variable, "compiler 'half a quote")
    with pytest.raises(BuildError, match=f"{kind.variable} is no command: No closing quotation"):
        jit_build.build("demo", [source], FLAGS, compiler=kind)


def test_program_that_cannot_start(source, tmp_path, monkeypatch):
    """A file of another machine type in the compiler's place."""
    foreign = tmp_path / "compiler"
    foreign.write_bytes(b"\x7fELF of another machine")
    foreign.chmod(0o755)
    monkeypatch.setenv("CXX", str(foreign))
    with pytest.raises(BuildError, match="(?s)cannot be started: .*Exec format error.*fix: install"):
        jit_build.build("demo", [source], FLAGS)


@pytest.mark.parametrize(
    ("kind", "complaint", "fix"),
    [
        (
            jit_build.CXX,
            "g++: error: unrecognized command line option '-std=c++17'",
            "install a C..17 compiler",
        ),
        (
            jit_build.NVCC,
            "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 15",
            "its C.. compiler in NVCC_CCBIN",
        ),
        (jit_build.HIPCC, "clang: error: cannot find ROCm device library", "install ROCm's hipcc"),
    ],
    ids=["old", "new", "incomplete"],
)
def test_unfit_compiler(kind, complaint, fix, no_tools, source, monkeypatch):
    """Its own words are shown, and the way out."""
    failing = script(no_tools / "failing", f'echo "{complaint}" >&2; exit 1')
    monkeypatch.setenv("CXX", failing)
    monkeypatch.setenv(kind.variable, failing)
    with pytest.raises(BuildError) as caught:
        jit_build.build("demo", [source], FLAGS, compiler=kind)
    assert complaint in str(caught.value)
    assert re.search(f"fix: .*{fix}", str(caught.value))


def test_toolkits_are_found_in_their_folders(no_tools, monkeypatch):
    """nvcc and hipcc are often not on PATH."""
    for variable, program, kind in (
        ("CUDA_HOME", "nvcc", COMPILERS[1]),
        ("ROCM_PATH", "hipcc", COMPILERS[2]),
    ):
        (no_tools / variable / "bin").mkdir(parents=True)
        path = script(no_tools / variable / "bin" / program, "exit 0")
        script(no_tools / "g++", "exit 0")
        monkeypatch.setenv(variable, str(no_tools / variable))
        assert jit_build.find_compiler(kind)[0] == path


def test_nvcc_calls_the_compiler_of_cxx(no_tools, monkeypatch):
    """Programs before it and options are told apart; what the user told nvcc itself stays."""
    for name in ("nvcc", "ccache", "g++-13", "clang++"):
        script(no_tools / name, "exit 0")
    assert jit_build.find_compiler(jit_build.NVCC) == ["nvcc", "-ccbin", "clang++"]
    monkeypatch.setenv("CXX", "ccache g++-13 -m64")
    found = ["nvcc", "-ccbin", "g++-13", "-Xcompiler", "-m64"]
    assert jit_build.find_compiler(jit_build.NVCC) == found
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-ccbin=g++-13")
    assert jit_build.find_compiler(jit_build.NVCC) == ["nvcc"]
    monkeypatch.delenv("NVCC_PREPEND_FLAGS")
    monkeypatch.setenv("NVCC_CCBIN", "g++-13")
    assert jit_build.find_compiler(jit_build.NVCC) == ["nvcc"]


@pytest.mark.parametrize("kind", COMPILERS[1:], ids=lambda kind: kind.variable)
def test_variables_that_the_compiler_reads_are_in_the_name(kind, no_tools, source, monkeypatch):
    """Options from the environment shape the code as well as ours do."""
    log = no_tools / "log"
    monkeypatch.setenv("CXX", "/bin/true")
    monkeypatch.setenv(
        kind.variable, script(no_tools / "fake", f'for o; do :; done; echo "$@" >> {log}; : > $o')
    )
    plain = jit_build.build("demo", [source], ["-O3"], compiler=kind)
    asked, built = log.read_text().splitlines()
    assert f"-x {kind.language} /dev/null" in asked and "-dM" in asked
    assert f"-x {kind.language} {source} -O3 -o " in built and "-shared" in built and "-fPIC" in built
    for name in kind.read:
        monkeypatch.setenv(name, "-O0")
        assert jit_build.build("demo", [source], ["-O3"], compiler=kind) != plain
        monkeypatch.delenv(name)
    assert jit_build.build("demo", [source], ["-O3"], compiler=kind) == plain


def test_real_cuda_compiler(cache, tmp_path):
    """A library with a kernel in it builds, and loads without a GPU."""
    require_compiler(jit_build.NVCC)
    source = tmp_path / "demo.cu"
    source.write_text(f"__global__ void kernel(float *x) {{ x[threadIdx.x] *= 2; }}\n{CPP_SOURCE}")
    flags = ["-gencode=arch=compute_90a,code=sm_90a"]
    library = jit_build.build("demo", [source], flags, compiler=jit_build.NVCC)
    assert jit_build.load(library).answer() == 42
    assert (
        jit_build.build("demo", [source], [*flags, "-Xcompiler", "-DX"], compiler=jit_build.NVCC) != library
    )
