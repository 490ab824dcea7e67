"""WKV-6 in Triton: right in Triton's interpreter, and compiled for GPUs that are not here.

What every Triton operator must do is computed by triton_parity.py, what is particular to WKV-6 by
`particular`, each in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import explain
from kernels.examples import Example, errors, example, results, too_large, truth
from kernels.jit_build import BuildError
from kernels.triton_support import precision
from kernels.wkv6 import triton as backend
from kernels.wkv6 import wkv6

TESTS = Path(__file__).parent
VARIANTS = {"plain": (), "bonus": ("bonus",)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STRONG = (0.006, 0.9999)  # decays; RAD-RWKV6 clamps at e^-5 = 0.0067
CLAMPED = -5.0


def process(*arguments: str) -> dict:
    """What a program run with Triton's interpreter prints; its paths begin in this folder."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        cwd=TESTS, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@cache
def parity(*options: str) -> dict[str, dict[str, float]]:
    """Errors by check; a check's name ends in the tolerance that holds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return process("triton_parity.py", "wkv6", *options)


@cache
def own_report() -> dict:
    """What `particular` finds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return process("-c", "import test_triton_wkv6; test_triton_wkv6.particular()")


def clamped(made: Example, share: float, value: float = CLAMPED) -> Example:
    """The same call with that share of the log decays, chosen at random, at a value."""
    log_w = made.inputs["log_w"]
    log_w[torch.rand(log_w.shape, generator=torch.Generator().manual_seed(1)) < share] = value
    return made


def strong_decays() -> dict[str, tuple[Example, torch.dtype]]:
    """Calls as strongly decayed as RAD-RWKV6 makes them, by a name that ends in the tolerance."""
    made = {}
    for kind, tolerance in (("fp32", "fp32"), ("bf16", "16-bit")):
        for bonus in (False, True):
            for share in (0.0, 0.3, 1.0):
                call = example("wkv6", 1, 70, 1, 32, bonus=bonus, decay=STRONG, rounded=DTYPES[kind])
                name = f"{kind}, {'bonus' if bonus else 'plain'}, {share} at -5: {tolerance}"
                made[name] = clamped(call, share), DTYPES[kind]
    padded = clamped(example("wkv6", 2, 70, 1, 32, bonus=True, documents=True, rounded=torch.bfloat16), 1.0)
    made["bf16, padding between, all at -5: 16-bit"] = padded, torch.bfloat16
    tiny = clamped(example("wkv6", 1, 20, 1, 32), 1.0, -70.0)  # e^-70 is still a number in float32
    made["fp32, all at -70: fp32"] = tiny, torch.float32
    made["fp32, some channels suddenly fast: fp32"] = sudden(), torch.float32
    return made


def sudden() -> Example:
    """Slow decays whose key channels become fast one after another in the second half."""
    made = example("wkv6", 1, 64, 1, 32, bonus=True, decay=(0.95, 1.0))
    for channel in range(32):
        made.inputs["log_w"][:, 32 + channel, :, : channel + 1] = -30.0
    return made


def padding_only() -> dict[str, bool]:
    """What becomes of a row of padding that holds NaN."""
    made = example("wkv6", 2, 37, 1, 32, bonus=True)
    made.document_ids = torch.tensor([[0], [-1]], dtype=torch.int32).expand(2, 37).contiguous()
    for name in ("r", "log_w", "k", "v"):
        made.inputs[name][1] = torch.nan
    found = results(made, "triton")
    zeros = ("y", "dr", "dlog_w", "dk", "dv")
    return {
        "zeros": not any(found[name][1].any() for name in zeros),
        "the state stays": torch.equal(found["state_out"][1], made.inputs["state"][1].float()),
        "its gradient too": torch.equal(found["dstate"][1], made.upstream[1][1].float()),
        "the other row is computed": all(found[name][0].any().item() for name in zeros),
    }


def particular() -> None:
    """Print what is found of WKV-6 alone; runs with TRITON_INTERPRET=1."""
    from dataclasses import replace

    import numpy as np
    import triton_parity

    from kernels import custom_ops
    from kernels import wkv6 as package

    np.seterr(all="ignore")
    torch.set_num_threads(1)
    report = {"broken interpreter": refused()}
    dispatch.forget()
    triton_parity.repair_interpreter()
    custom_ops.allocate = triton_parity.poisoned
    backend.prepare(dispatch.Case("cpu", torch.float32, 32))
    package.TABLE["triton"] = replace(package.TABLE["triton"], prepare=None)
    package.BACKENDS = tuple(package.TABLE.values())
    report["strong"] = {
        name: errors(results(call, "triton", dtype), truth(call))
        for name, (call, dtype) in strong_decays().items()
    }
    report["padding"] = padding_only()
    json.dump(report, sys.stdout)


def refused() -> str:
    """What the check before the first use says of the interpreter, which takes bfloat16 for integers."""
    try:
        results(example("wkv6", 1, 2, 1, 32), "triton")
    except BuildError as error:
        return str(error)
    return ""


def judged(report: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The checks that fail, and by what."""
    wrong = {name: too_large(found, name.rsplit(": ", 1)[1]) for name, found in report.items()}
    return {name: found for name, found in wrong.items() if found}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_does_what_every_triton_operator_must(variant):
    report = parity(*VARIANTS[variant])
    assert len(report) > 20
    assert not judged(report)


def test_strong_decays_are_right():
    assert not judged(own_report()["strong"])


def test_a_row_of_padding_keeps_its_state():
    assert all(own_report()["padding"].values()), own_report()["padding"]


def test_where_it_would_be_wrong_it_is_refused():
    assert "wrong on this device" in own_report()["broken interpreter"]


def test_it_says_why_it_is_not_taken_on_a_cpu():
    assert "TRITON_INTERPRET" in explain("wkv6")["rejected"]["triton"]
    made = example("wkv6", 1, 2, 1, 32)
    with pytest.raises(ValueError, match="on GPUs"):
        wkv6(**{name: x.float() for name, x in made.inputs.items()}, backend="triton")


def kernels_of(dtype: torch.dtype, device: str, size: int, bonus: bool):
    """(name, kernel, arguments, options) of every launch, as kernels/wkv6/triton.py makes it."""
    from kernels.wkv6 import triton_kernels
    from kernels.wkv7.triton_forward import scan

    exact, how = torch.float32, precision(dtype, device)
    u = exact if bonus else None
    tokens = {"r": dtype, "log_w": exact, "k": dtype, "v": dtype}
    where = {"tokens": int, "chunks": int, "first_unit": int}
    chunked = backend.constants(32, size, how)
    paired = chunked | backend.pair_constants(size, how)
    codes, summed = {"codes": torch.int8}, {"added": exact, "dadded": exact, "keep": exact}
    keys = {"r": dtype, "log_w": exact, "k": dtype, "u": u} | codes | {"dy": dtype}
    both = tokens | {"u": u} | codes
    table = {
        "add_up": (tokens | codes | {"dy": dtype} | summed | where, chunked | {"BONUS": bonus}),
        "read_out": (both | {"states": exact, "y": dtype} | where, paired),
        "value_gradients": (keys | {"dstates": exact, "dv": dtype} | where, paired),
        "key_gradients": (
            both | {"dy": dtype, "states": exact, "dstates": exact}
            | {"dr": dtype, "dlog_w": exact, "dk": dtype, "du": u} | where,
            paired,
        ),
        "decode": (
            tokens | {"u": u, "state": exact} | codes | {"y": dtype}, backend.decode_constants(32, size)
        ),
    }  # fmt: skip
    scanned = {"begin": exact, "end": exact, "added": exact, "keep": exact, "change": None}
    for name, (arguments, constants) in table.items():
        yield name, getattr(triton_kernels, name), arguments, constants
    yield "scan", scan, scanned | {"chunks": int, "first_unit": int}, backend.scan_constants(size, how, True)


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100")
QUICK = (("sm_90", "bf16", 64), ("gfx942", "bf16", 64))
TARGETED = [
    pytest.param(device, kind, size, marks=[] if (device, kind, size) in QUICK else pytest.mark.slow)
    for device in TARGETS
    for kind in ("bf16", "fp32")
    for size in (64, 128)
]


@pytest.mark.parametrize("device, kind, size", TARGETED)
def test_it_compiles_for_a_gpu_and_fits_it(device, kind, size):
    """Every kernel, with the constants that the launches use there."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton_targets import SHARED, compiled

    for name, kernel, arguments, constants in kernels_of(DTYPES[kind], device, size, bonus=True):
        options = {key: constants[key] for key in ("num_warps", "num_stages")}
        fixed = {key: ("constant", value) for key, value in constants.items() if key not in options}
        made = compiled(kernel, arguments | fixed, device, options)
        assert made.shared <= SHARED[device], name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_gpu_gets_it_right(kind, size):
    made = example("wkv6", 2, 300, 2, size, bonus=True, documents=True, decay=STRONG, rounded=DTYPES[kind])
    found = results(made.to("cuda"), "triton", DTYPES[kind])
    tolerance = precision(DTYPES[kind], "sm_90").tolerance
    assert not too_large(errors({name: x.cpu() for name, x in found.items()}, truth(made)), tolerance)
