"""The choice of a backend: explained, cached, refused when named and impossible, and never made at import."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compilers import require_compiler

import kernels.wkv7 as wkv7_package
from kernels import dispatch, explain, measured, native
from kernels.case import Case
from kernels.dispatch import Backend
from kernels.jit_build import BuildError
from kernels.wkv7 import wkv7

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh():
    """No decision survives from one test to the next."""
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """A machine without a compiler or a built library."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TRANSMUTE_CACHE", str(tmp_path))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def inputs(dtype=torch.float32) -> list[torch.Tensor]:
    """r, log_w, k, v, a, b of one small call."""
    generator = torch.Generator().manual_seed(0)
    return [-torch.rand(1, 3, 1, 32, generator=generator).to(dtype) for _ in range(6)]


def test_explain_takes_the_compiled_backend_on_cpu():
    """Where a compiler is, auto is the C++ backend, and every other one has a reason against it."""
    require_compiler()
    answer = explain("wkv7")
    assert (answer["backend"], answer["reason"]) == ("cpu", "compiled C++, the fastest on CPU")
    assert answer["rejected"].keys() == {b.name for b in wkv7_package.BACKENDS} - {"cpu"}
    assert answer["rejected"]["chunked"] == "could run, but comes after cpu"
    assert explain("wkv7", dtype=torch.bfloat16, head_size=128)["backend"] == "cpu"


@pytest.mark.parametrize(
    ("device", "dtype", "why"), [("cpu", torch.float64, "float64"), ("cuda:1", torch.float32, "not cuda")]
)
def test_explain_says_why_not(device, dtype, why):
    """float64 and CUDA go to the chunked form, and the C++ backend's reason is given."""
    answer = explain("wkv7", device=device, dtype=dtype)
    assert answer["backend"] == "chunked" and answer["reason"]
    assert why in answer["rejected"]["cpu"]


def test_explain_refuses_what_no_backend_can_do():
    """An impossible head size, or an operator that does not exist."""
    with pytest.raises(ValueError, match="no backend of wkv7.*head size 48"):
        explain("wkv7", head_size=48)
    with pytest.raises(ValueError, match="unknown operator 'wkv9'; known: wkv7"):
        explain("wkv9")


def test_failed_build_is_a_reason_under_auto(no_compiler, caplog):
    """Auto falls back, says so once in the log, and explains it; the result is right."""
    x = inputs()
    y, _ = wkv7(*x)
    wkv7(*x)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    answer = explain("wkv7", head_size=32)
    assert answer["backend"] == "chunked" and "no-such-compiler" in answer["rejected"]["cpu"]
    torch.testing.assert_close(y, wkv7(*x, backend="reference")[0])


def test_failed_build_is_an_error_when_named(no_compiler):
    """A named backend never falls back; a repaired machine is believed on the next call."""
    with pytest.raises(BuildError, match="no-such-compiler"):
        wkv7(*inputs(), backend="cpu")
    with pytest.raises(BuildError, match="no-such-compiler"):
        wkv7(*inputs(), backend="cpu")


def test_named_backend_is_refused_with_its_reason():
    """The C++ backend cannot run float64: an error, not another backend."""
    with pytest.raises(ValueError, match="backend=cpu cannot run wkv7 here: .*float64"):
        wkv7(*inputs(torch.float64), backend="cpu")
    with pytest.raises(ValueError, match="unknown backend 'fast' .* auto, .*cpu, chunked, reference"):
        wkv7(*inputs(), backend="fast")


def test_named_backend_is_the_one_that_runs(monkeypatch):
    """Each name reaches its own implementation."""
    ran = []
    for name, backend in dict(wkv7_package.TABLE).items():
        spy = lambda *x, n=name, r=backend.run: (ran.append(n), r(*x))[1]  # noqa: E731
        monkeypatch.setitem(wkv7_package.TABLE, name, replace(backend, run=spy))
    for name in ("reference", "chunked"):
        wkv7(*inputs(), backend=name)
    assert ran == ["reference", "chunked"]


CASE = Case("cpu", torch.float32, 64)


def table(monkeypatch, *rows: Backend) -> None:
    """WKV-7 with other backends."""
    monkeypatch.setattr(wkv7_package, "BACKENDS", rows)


def backend(name: str, **options) -> Backend:
    """A backend that can run everything."""
    return Backend(name, lambda case: None, print, f"merit of {name}", **options)


def fails(_: Case) -> None:
    raise BuildError("no compiler today")


def test_decision_is_made_once(monkeypatch):
    """The table is asked once per kind of call."""
    asked = []
    table(monkeypatch, Backend("only", asked.append, print, "it is alone"))
    for head_size in (32, 64, 32, 64):
        choice = dispatch.choose("wkv7", "auto", replace(CASE, head_size=head_size))
    assert choice.backend.name == "only" and len(asked) == 2


def test_every_other_backend_has_its_reason(monkeypatch):
    table(
        monkeypatch,
        Backend("elsewhere", lambda case: f"not on {case.device_type}", print, ""),
        backend("unbuilt", prepare=fails),
        backend("unmeasured", held_back="nobody has measured it"),
        backend("taken"),
        backend("later", prepare=fails),
        backend("also unmeasured", held_back="nobody has measured it either"),
    )
    assert explain("wkv7") == {
        "backend": "taken",
        "reason": "merit of taken",
        "rejected": {
            "elsewhere": "not on cpu",
            "unbuilt": "no compiler today",
            "unmeasured": "nobody has measured it",
            "later": "could run, but comes after taken",
            "also unmeasured": "nobody has measured it either",
        },
    }
    assert dispatch.choose("wkv7", "unmeasured", CASE).backend.name == "unmeasured"
    with pytest.raises(BuildError, match="no compiler today"):
        dispatch.choose("wkv7", "unbuilt", CASE)


def test_a_backend_without_a_step_is_passed_over_when_decoding(monkeypatch):
    table(monkeypatch, backend("rows"), backend("tokens", step=print))
    assert dispatch.choose("wkv7", "auto", CASE).backend.name == "rows"
    assert dispatch.choose("wkv7", "auto", CASE, step=True).backend.name == "tokens"
    with pytest.raises(ValueError, match="backend=rows cannot run wkv7 here: it has no decoding step"):
        dispatch.choose("wkv7", "rows", CASE, step=True)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("TRANSMUTE_CACHE", str(tmp_path))
    return tmp_path


def test_a_measurement_decides(own_cache, monkeypatch):
    """The fastest measured one is taken, also one that is otherwise held back; other cases are as before."""
    table(monkeypatch, backend("first"), backend("second", held_back="not measured"), backend("third"))
    measured.remember("wkv7", CASE, {"first": 3.0, "second": 1.5})
    answer = explain("wkv7")
    assert answer["backend"] == "second"
    assert answer["reason"] == "the fastest measured on this device, 1.5 ms"
    assert answer["rejected"] == {
        "first": "measured slower on this device, 3 ms",
        "third": "could run, but comes after second",
    }
    assert explain("wkv7", head_size=32)["backend"] == explain("wkv7", units=1)["backend"] == "first"
    assert explain("wkv7", dtype=torch.bfloat16)["backend"] == "first"


def test_a_measured_backend_that_cannot_be_built_is_passed_over(own_cache, monkeypatch):
    table(monkeypatch, backend("fast", prepare=fails), backend("slow"))
    measured.remember("wkv7", CASE, {"fast": 1.0, "slow": 9.0})
    assert explain("wkv7")["backend"] == "slow"


@pytest.mark.parametrize("what", ["_sources", "device_name"])
def test_a_measurement_of_something_else_counts_for_nothing(own_cache, monkeypatch, what):
    """Other sources, or another device."""
    table(monkeypatch, backend("first"), backend("second"))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(measured, what, lambda _: "another")
        measured.remember("wkv7", CASE, {"second": 1.0})
    assert explain("wkv7")["backend"] == "first"


def test_measurements_are_added_up_and_a_damaged_file_is_ignored(own_cache, monkeypatch, caplog):
    table(monkeypatch, backend("first"), backend("second"))
    measured.remember("wkv7", replace(CASE, head_size=32), {"second": 1.0})
    path = measured.remember("wkv7", CASE, {"second": 1.0})
    assert explain("wkv7", head_size=32)["backend"] == explain("wkv7")["backend"] == "second"
    dispatch.forget()
    path.write_text("{")
    assert explain("wkv7")["backend"] == "first"
    assert "cannot be read and are ignored" in caplog.text


def test_importing_builds_nothing(tmp_path):
    """No compiler, no cache folder, no output: importing the package has no effect."""
    environment = {**os.environ, "TRANSMUTE_CACHE": str(tmp_path / "cache"), "CXX": "no-such-compiler"}
    command = [sys.executable, "-c", "import kernels.wkv7, kernels.bench.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "cache").exists()
