"""The elementwise parts around WKV-7: their definitions, and the Triton kernels interpreted and compiled."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import fused_parity
import pytest
import torch
from triton_targets import DEVICES, SHARED, compiled

from kernels import fused
from kernels.examples import TOLERANCES
from kernels.fused import measure

LARGEST = TOLERANCES["fp32"][0]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
CASES = list(fused_parity.cases())


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What the child process found."""
    command = [sys.executable, Path(__file__).with_name("fused_parity.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_definitions(interpreted, case):
    assert interpreted["parity"][case] <= LARGEST


@needs_triton
def test_a_narrow_key_is_computed_with_in_float32(interpreted):
    assert interpreted["narrow"] <= LARGEST


@needs_triton
def test_custom_operators(interpreted):
    assert interpreted["operators"] and not any(interpreted["operators"].values())


@pytest.mark.gpu
@needs_triton
def test_kernels_agree_with_the_definitions_on_a_gpu():
    wrong = {name: error for name, error in fused_parity.parity("cuda").items() if error > LARGEST}
    assert not wrong


def arguments(kernel, kind: torch.dtype, width: int, absent: tuple[str, ...] = (), **constants) -> dict:
    """What a launch gives a kernel, as `compiled` takes it: 16-bit values, parameters in float32."""
    tile = fused.triton.TILE // (fused.triton.CHANNELS if "WIDTH" in constants else width)
    constants |= {"TOKENS": tile, "eps": 1e-6, "rate_range": 1.0, "decay_scale": fused.reference.DECAY_SCALE}
    exact = ("decay", "rate", "log_w", "removed_scale", "written_mix", "mixes", "bonus", "norm_", "parts")
    given = {}
    for name in kernel.arg_names:
        if name in constants:
            given[name] = ("constant", constants[name])
        elif name == "tokens":
            given[name] = int
        else:
            given[name] = torch.float32 if any(word in name for word in exact) else kind
            given[name] = None if name in absent else given[name]
    return given


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_compile_for_every_gpu(device):
    from kernels.fused import triton_kernels as kernels

    heads = {"HEADS": 32, "N": 64}
    scales = ("removed_scale", "written_mix", "dscale_parts", "dmix_parts")
    whole = heads | {"NORM": True, "BONUS": True, "GATE": True}
    launches = [
        (kernels.prepare_forward, heads | {"GROUP": 4, "RAW": False}, scales),
        (kernels.prepare_backward, heads | {"GROUP": 4, "RAW": False}, scales),
        (kernels.prepare_backward, heads | {"GROUP": 1, "RAW": True}, ()),
        (kernels.finish_forward, whole, ()),
        (kernels.finish_backward, whole, ()),
        (kernels.shift_forward, {"WIDTH": 2560, "CHANNELS": fused.triton.CHANNELS}, ()),
        (kernels.shift_backward, {"WIDTH": 2560, "CHANNELS": fused.triton.CHANNELS}, ()),
    ]
    lanes = 64 if device in ("gfx90a", "gfx942", "gfx950") else 32
    for kernel, constants, absent in launches:
        given = arguments(kernel, torch.bfloat16, 64, absent, **constants)
        report = compiled(kernel, given, device, {"num_warps": fused.triton.TILE // (4 * lanes)})
        assert report.spilled == 0 and report.registers <= 128, (kernel.__name__, report[:3])
        assert report.shared <= SHARED[device]


def test_the_measurement_runs_every_part():
    found = measure.measure((1, 4, 2, 1, 32), "cpu", ("reference",), repeats=1)
    assert set(found) == {"prepare", "finish", "shift"} and all(t["reference"] > 0 for t in found.values())
    assert "| shift | 3.000 | 1.500 | 2.00 |" in measure.report({"shift": {"reference": 3.0, "triton": 1.5}})


def test_the_definition_of_the_operator_inputs():
    decay, rate, key = torch.randn(3, 1, 1, 1, 32, dtype=torch.float64)
    log_w, k, a, b = fused.prepare(decay, rate, key, rate_range=2.0)
    w = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-decay)))
    eta, kappa = 2 / (1 + torch.exp(-rate)), key / key.pow(2).sum().sqrt()
    expected = w.log(), kappa * (1 - w + eta), -kappa, kappa * eta
    for found, right in zip((log_w, k, a, b), expected, strict=True):
        torch.testing.assert_close(found, right)
    scale, mix = torch.rand(2, 1, 32, dtype=torch.float64)
    _, k, a, _ = fused.prepare(decay, rate, key, removed_scale=scale, written_mix=mix)
    torch.testing.assert_close(k, key * (1 + (eta / 2 - 1) * mix))
    torch.testing.assert_close(a, -key * scale / (key * scale).norm())


def test_neighbouring_heads_share_a_key():
    decay, rate = torch.randn(2, 1, 3, 4, 32)
    key = torch.randn(1, 3, 2, 32)
    _, _, a, _ = fused.prepare(decay, rate, key)
    assert torch.equal(a[:, :, 0], a[:, :, 1]) and torch.equal(a[:, :, 2], a[:, :, 3])
    assert not torch.equal(a[:, :, 1], a[:, :, 2])


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [
        ("fast", torch.float32, "unknown backend 'fast'"),
        ("triton", torch.float64, "not float64"),
        ("triton", torch.float32, "TRITON_INTERPRET=1"),
    ],
)
def test_a_backend_is_used_or_refused(monkeypatch, backend, dtype, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(1, 2, 2, 32, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        fused.prepare(x, x, x, backend=backend)
