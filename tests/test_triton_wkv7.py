"""WKV-7 in Triton: right in Triton's interpreter, and compiled for GPUs that are not here."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import triton_targets

from kernels import triton_support
from kernels.case import HEAD_SIZES, Case
from kernels.dispatch import explain
from kernels.examples import errors, example, results, too_large, truth
from kernels.wkv7 import triton as backend
from kernels.wkv7 import wkv7

TESTS = Path(__file__).parent
ROOT = TESTS.parent
KERNELS = {
    "triton_forward": ("prepare", "scan", "read_out", "decode"),
    "triton_backward": ("prepare_backward", "value_gradients", "key_gradients"),
}
# Compiled in `make test`; the rest, minutes of compiling, with MARKERS=slow.
QUICK = {
    "sm_90": ("prepare", "scan", "read_out", "decode", "value_gradients", "key_gradients"),
    "gfx942": ("prepare", "scan", "read_out", "decode", "key_gradients"),
}
ALWAYS = ("scan", "decode")


def child(*command: str, interpreted: bool) -> str:
    """What a Python process prints; it must end well."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@cache
def parity() -> dict[str, dict[str, float]]:
    """Errors of the checks of triton_parity.py, by name."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return json.loads(child(str(TESTS / "triton_parity.py"), "wkv7", interpreted=True))


def test_the_interpreter_agrees_with_the_definition():
    """Forward and all gradients, from memory that holds anything, at the tolerance that each check names."""
    wrong = {check: too_large(found, check.rsplit(": ", 1)[1]) for check, found in parity().items()}
    assert len(wrong) > 25
    assert not {check: found for check, found in wrong.items() if found}


def test_repeats_are_bitwise_equal():
    assert set(parity()["repeatable: fp32"].values()) == {0.0}


def arguments(name: str, kernel, device: str, dtype: torch.dtype, size: int) -> tuple[dict, dict]:
    """Argument kinds of a kernel as `triton_targets.compiled` takes them, and its options, as launched."""
    how = triton_support.precision(dtype, device)
    plan = backend.Plan((1, 1, 32, size), how, backend.launch(size, how, device), torch.device("cpu"))
    if name == "scan":
        constants = plan.scan_constants(False)
    elif name == "decode":
        constants = backend.decode_constants(32, size)
    else:
        constants = plan.constants("SENSITIVE" in kernel.arg_names)
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    kept = dict.fromkeys(("solved", "own", "change", "inverses", "h"), how.kept)
    tokens = dict.fromkeys(("r", "k", "v", "a", "b", "y", "dy", "dr", "dk", "dv", "da", "db"), dtype)
    kinds = kept | tokens | dict.fromkeys(("tokens", "chunks", "first_unit"), int) | {"codes": torch.int8}
    kinds |= {n: ("constant", x) for n, x in constants.items()}
    return {n: kinds.get(n, torch.float32) for n in kernel.arg_names}, options


def cases():
    for device in triton_targets.DEVICES:
        for module, kernels in KERNELS.items():
            for kernel in kernels:
                quick = kernel in QUICK.get(device, ALWAYS)
                yield pytest.param(device, module, kernel, marks=[] if quick else [pytest.mark.slow])


def check_compiled(device: str, module: str, name: str, dtype: torch.dtype, size: int) -> None:
    """It compiles as it would be launched, fits the device, and uses its matrix units on 16-bit inputs."""
    pytest.importorskip("triton", reason="Triton is not installed")
    kernel = getattr(importlib.import_module(f"kernels.wkv7.{module}"), name)
    kinds, options = arguments(name, kernel, device, dtype, size)
    report = triton_targets.compiled(kernel, kinds, device, options)
    print(f"{device} {name} {dtype} N={size}: {report[:4]}")
    assert report.shared <= triton_targets.SHARED[device]
    if name not in ALWAYS and dtype != torch.float32:
        assert re.search(r"\b(mma\.sync|wgmma\.mma|tcgen05\.mma|v_mfma|v_wmma)", report.assembly)
    if name in ALWAYS and size == 64:
        assert report.spilled <= 8


@pytest.mark.parametrize(("device", "module", "name"), list(cases()))
def test_kernels_compile(device, module, name):
    check_compiled(device, module, name, torch.bfloat16, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_every_launch_compiles(device, size, dtype):
    for module, kernels in KERNELS.items():
        for name in kernels:
            check_compiled(device, module, name, dtype, size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_a_gpu_gets_it_right(size, dtype):
    """Short decays and long ones, several chunks, documents, states."""
    how = triton_support.precision(dtype, triton_support.architecture(torch.device("cuda")))
    for decay in ((0.05, 0.9999), (0.6, 1.0)):
        made = example("wkv7", 2, 200, 2, size, decay=decay, documents=True, rounded=dtype)
        found = results(made.to("cuda"), "triton", dtype)
        assert not too_large(errors({n: x.cpu() for n, x in found.items()}, truth(made)), how.tolerance)


def test_where_it_would_be_wrong_it_is_refused():
    """Triton's interpreter, as it is, multiplies bfloat16 wrongly."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = (
        "import torch\n"
        "from kernels.jit_build import BuildError\n"
        "from kernels.wkv7 import wkv7\n"
        "x = torch.zeros(1, 2, 1, 32)\n"
        "try:\n    wkv7(x, x, x, x, x, x, backend='triton')\n"
        "except BuildError as error:\n    print(error)"
    )
    assert "backend triton: wrong on this device" in child("-c", code, interpreted=True)


def test_the_cpu_needs_the_interpreter(monkeypatch):
    """Named it is refused, with the reason; "auto" says the same."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 1, 32)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        wkv7(x, x, x, x, x, x, backend="triton")
    assert "TRITON_INTERPRET" in explain("wkv7", head_size=64)["rejected"]["triton"]


def test_float64_is_refused():
    assert "float64" in backend.supports(Case("cuda", torch.float64, 64))


def test_importing_needs_no_triton():
    """The backend is offered, and refused, where Triton is not installed."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from kernels.wkv7 import TABLE, triton\n"
        "import kernels.wkv6\n"
        "print(TABLE['triton'].name)"
    )
    assert child("-c", code, interpreted=False).strip() == "triton"


def test_precision_by_device_and_permission():
    """Exact unless allowed and possible; 16-bit inputs on matrix units, what spreads errors exactly."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert triton_support.precision(torch.float32, "sm_90") == triton_support.EXACT
        torch.set_float32_matmul_precision("high")
        allowed = {d: triton_support.precision(torch.float32, d).products for d in triton_targets.DEVICES}
    finally:
        torch.set_float32_matmul_precision(before)
    without = {"gfx90a", "gfx950", "gfx1100"}
    assert allowed == {d: "ieee" if d in without else "tf32" for d in triton_targets.DEVICES}
    half = {d: triton_support.precision(torch.bfloat16, d) for d in triton_targets.DEVICES}
    assert {d: x.sensitive for d, x in half.items()} == allowed
    assert {x.products for x in half.values()} == {"bf16"}
