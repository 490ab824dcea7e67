"""The choice of a backend: explained, cached, refused when named and impossible, and never made at import."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compilers import require_compiler

import kernels.wkv7 as wkv7_package
from kernels import dispatch, explain, measure
from kernels.jit_build import BuildError
from kernels.wkv7 import cpu, wkv7

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
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


def inputs(dtype=torch.float32) -> list[torch.Tensor]:
    """r, log_w, k, v, a, b of one small call."""
    generator = torch.Generator().manual_seed(0)
    return [-torch.rand(1, 3, 1, 32, generator=generator).to(dtype) for _ in range(6)]


def test_explain_takes_the_compiled_backend_on_cpu():
    """Where a compiler is, auto is the C++ backend, and nothing was tried before it."""
    require_compiler()
    assert explain("wkv7") == {"backend": "cpu", "reason": "compiled C++, the fastest on CPU", "rejected": {}}
    assert explain("wkv7", dtype=torch.bfloat16, head_size=128)["backend"] == "cpu"


@pytest.mark.parametrize(
    ("device", "dtype", "why"), [("cpu", torch.float64, "float64"), ("cuda:1", torch.float32, "not cuda")]
)
def test_explain_says_why_not(device, dtype, why):
    """float64 and CUDA go to the chunked form, and the C++ backend's reason is given."""
    answer = explain("wkv7", device=device, dtype=dtype)
    assert answer["backend"] == "chunked" and answer["reason"]
    assert list(answer["rejected"]) == ["cpu"] and why in answer["rejected"]["cpu"]


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
    with pytest.raises(ValueError, match="unknown backend 'cuda' .* auto, cpu, chunked, reference"):
        wkv7(*inputs(), backend="cuda")


def test_named_backend_is_the_one_that_runs(monkeypatch):
    """Each name reaches its own implementation."""
    ran = []
    for name, run in dict(wkv7_package.RUN).items():
        monkeypatch.setitem(wkv7_package.RUN, name, lambda *x, n=name, r=run: (ran.append(n), r(*x))[1])
    for name in ("reference", "chunked"):
        wkv7(*inputs(), backend=name)
    assert ran == ["reference", "chunked"]


def test_decision_is_made_once(monkeypatch):
    """The table is asked once per (operator, device type, dtype, head size)."""
    asked = []

    def supports(*what):
        asked.append(what)

    monkeypatch.setattr(wkv7_package, "BACKENDS", (dispatch.Backend("only", supports, print, "it is alone"),))
    for head_size in (32, 64, 32, 64):
        choice = dispatch.choose("wkv7", "auto", "cpu", torch.float32, head_size)
    assert choice.backend.name == "only" and len(asked) == 2


def test_importing_builds_nothing(tmp_path):
    """No compiler, no cache folder, no output: importing the package has no effect."""
    environment = {**os.environ, "TRANSMUTE_CACHE": str(tmp_path / "cache"), "CXX": "no-such-compiler"}
    command = [sys.executable, "-c", "import kernels.wkv7, kernels.measure"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "cache").exists()


def test_a_wrong_or_missing_backend_gets_no_speed(no_compiler):
    """The benchmark times only what it has found right."""
    tensors, upstream = measure.make_inputs(1, 5, 1, 32, seed=0)
    rows = measure.check_and_time({"cpu": 1, "chunked": 1, "reference": 1}, 1e-5, tensors, upstream)
    assert [row["check"].split(":")[0] for row in rows] == ["unavailable", "right", "right"]
    assert [row["forward ms"] is None for row in rows] == [True, False, False]
    rows = measure.check_and_time({"chunked": 1}, 0.0, tensors, upstream)
    assert rows[0]["check"] == "WRONG" and rows[0]["forward+backward ms"] is None
    truth = [torch.ones(3)]
    assert measure.worst_error([torch.tensor([1.0, math.nan, 1.0])], truth) == math.inf
