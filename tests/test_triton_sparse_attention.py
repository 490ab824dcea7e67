"""Sparse attention in Triton: right in Triton's interpreter, and compiled for GPUs that are not here."""

import importlib
import json
import math
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
from kernels.case import Case
from kernels.dispatch import explain
from kernels.examples import errors, too_large
from kernels.sparse_attention import NONE, watched
from kernels.sparse_attention import triton as backend
from kernels.sparse_attention.examples import example, results, truth
from kernels.sparse_attention.walks import readers, walks

TESTS = Path(__file__).parent
KERNELS = {
    "attend": "triton_forward", "combine": "triton_forward", "shares": "triton_forward",
    "query_gradients": "triton_backward", "key_gradients": "triton_backward",
}  # fmt: skip
PRODUCTS = ("attend", "query_gradients", "key_gradients")
# Compiled in `make test`; the rest, minutes of compiling, with MARKERS=slow.
QUICK = {"sm_90": PRODUCTS, "gfx942": ("attend", "key_gradients")}
# Bytes (NVIDIA) or registers (AMD) of a thread that went to memory, bf16, N = 64, at most: elsewhere none.
SPILLED = {
    ("sm_120", "query_gradients"): 64, ("gfx1100", "key_gradients"): 128,
}  # fmt: skip


def child(*command: str, interpreted: bool) -> str:
    """What a Python process prints; it must end well."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@cache
def parity() -> dict[str, dict[str, float]]:
    """Errors of the checks of sparse_parity.py, by name."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return json.loads(child(str(TESTS / "sparse_parity.py"), interpreted=True))


def test_the_interpreter_agrees_with_the_definition():
    """y, share and all gradients, from memory that holds NaN, at the tolerance that each check names."""
    wrong = {check: too_large(found, check.rsplit(": ", 1)[1]) for check, found in parity().items()}
    assert len(wrong) > 18
    assert not {check: found for check, found in wrong.items() if found}


def test_repeats_are_bitwise_equal():
    assert set(parity()["repeatable: fp32"].values()) == {0.0}


def plan_of(kernel: str, device: str, dtype: torch.dtype, size: int, tokens: int) -> backend.Plan:
    """The plan of a call with 16 heads, 4 lists of 42 blocks of 64 keys."""
    q = torch.empty(1, tokens, 16, size, dtype=dtype, device="meta")
    k = torch.empty(1, tokens // 64 + 1, 64, 4, size, device="meta")
    blocks = torch.empty(1, tokens, 4, 42, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "architecture", lambda _: device)
        return backend.Plan(q, k, blocks, kernel if kernel in PRODUCTS else "attend")


def arguments(
    name: str, kernel, device: str, dtype: torch.dtype, size: int, tokens: int
) -> tuple[dict, dict]:
    """Argument kinds of a kernel as `triton_targets.compiled` takes them, and its options, as launched."""
    plan = plan_of(name, device, dtype, size, tokens)
    constants = {
        "attend": lambda: plan.tile_constants() | {"PARTS": plan.parts},
        "query_gradients": lambda: plan.tile_constants() | {"SLOPES": plan.how.products},
        "key_gradients": lambda: plan.reader_constants() | {"SLOPES": plan.how.products},
        "combine": lambda: backend.combine_constants(plan),
        "shares": lambda: backend.share_constants(plan),
    }[name]()
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    kinds = dict.fromkeys(("dy", "q", "k", "v", "y", "dq", "dk", "dv"), dtype)
    kinds |= dict.fromkeys(("order", "list_", "starts", "positions"), torch.int32)
    kinds |= dict.fromkeys(("begins", "counts"), torch.int32 if plan.span > 1 or "key" in name else None)
    kinds |= dict.fromkeys(("batch", "tokens", "blocks", "first", "tiles", "units", "rows"), int)
    kinds |= {n: ("constant", x) for n, x in constants.items()}
    return {n: kinds.get(n, torch.float32) for n in kernel.arg_names}, options


def check_compiled(device: str, name: str, dtype: torch.dtype, size: int, tokens: int = 4096):
    """It compiles as it would be launched, fits the device, and uses its matrix units on 16-bit inputs."""
    pytest.importorskip("triton", reason="Triton is not installed")
    kernel = getattr(importlib.import_module(f"kernels.sparse_attention.{KERNELS[name]}"), name)
    kinds, options = arguments(name, kernel, device, dtype, size, tokens)
    report = triton_targets.compiled(kernel, kinds, device, options)
    print(f"{device} {name} {dtype} N={size}: {report[:4]}")
    assert report.shared <= triton_targets.SHARED[device]
    if name in PRODUCTS and dtype != torch.float32:
        assert re.search(r"\b(mma\.sync|wgmma\.mma|tcgen05\.mma|v_mfma|v_wmma)", report.assembly)
    return report


def cases():
    for device in triton_targets.DEVICES:
        for name in KERNELS:
            quick = name not in PRODUCTS or name in QUICK.get(device, ())
            yield pytest.param(device, name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("device", "name"), list(cases()))
def test_kernels_compile(device, name):
    report = check_compiled(device, name, torch.bfloat16, 64)
    assert report.spilled <= SPILLED.get((device, name), 0)


@pytest.mark.parametrize("device", ["sm_90", "gfx1100"])
def test_the_kernel_of_decoding_compiles(device):
    """One token: sixteen rows, the list shared out."""
    assert plan_of("attend", device, torch.bfloat16, 64, tokens=1).parts == 32
    assert check_compiled(device, "attend", torch.bfloat16, 64, tokens=1).spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 80, 128, 256])
@pytest.mark.parametrize("device", ["sm_80", "sm_90", "gfx942", "gfx1100"])
def test_every_launch_compiles(device, size, dtype):
    for name in KERNELS:
        check_compiled(device, name, dtype, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("device", ["sm_90", "sm_120"])
def test_tf32_fits(device, size):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for name in PRODUCTS:
            check_compiled(device, name, torch.float32, size)
    finally:
        torch.set_float32_matmul_precision(before)


def listed(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)[None, :, None]


def test_walks():
    """Tiles of two tokens: each block once, rising; later ones and none are not visited."""
    blocks = listed([[1, 0, NONE], [0, 2, -2 - 1], [2, NONE, NONE]])
    starts, positions = (
        torch.tensor([[0, 4, 8]], dtype=torch.int32),
        torch.tensor([[4, 7, 9]], dtype=torch.int32),
    )
    found = walks(blocks, starts, positions, 2, also_watched=True)
    # (block * 2 + token) * 6 + 2 * column, 1 more where only watched; 36 is none.
    assert found.order[0, :, 0].tolist() == [[2, 6, 12, 23, 36, 36], [24, 36, 36, 36, 36, 36]]
    assert found.counts[0, :, 0].tolist() == [2, 1]
    assert found.begins[0, :, 0].tolist() == [[0, 2, 4, 4, 4, 4], [0, 1, 1, 1, 1, 1]]
    attended = walks(blocks, starts, positions, 2, also_watched=False)
    assert attended.order[0, 0, 0].tolist() == [2, 6, 12, 36, 36, 36]


def test_readers():
    blocks = listed([[1, 0, NONE], [0, 2, -2 - 1], [2, NONE, NONE]])
    starts, positions = (
        torch.tensor([[0, 4, 8]], dtype=torch.int32),
        torch.tensor([[4, 7, 9]], dtype=torch.int32),
    )
    found = readers(blocks, starts, positions)
    assert found.order[0, 0].tolist() == [0, 1, 3, 8, *[9] * 5]  # block * 3 + token
    assert found.begins[0, 0].tolist() == [0, 2, 3, 4]


def test_many_blocks_and_tokens_take_64_bits():
    blocks = torch.full((1, 2, 1, 1), 2**30, dtype=torch.int32)
    starts = torch.zeros(1, 1, dtype=torch.int32).expand(1, 2**30 + 1)
    positions = torch.zeros(1, 2, dtype=torch.int32)
    found = walks(blocks, starts, positions, 2, also_watched=True)
    assert found.order.tolist() == [[[[2**30 * 4, 2**30 * 4 + 2]]]]


def test_plans():
    """Tiles of neighbours where there are many; single tokens, their lists in parts, where there are few."""
    many = plan_of("attend", "sm_90", torch.bfloat16, 64, tokens=4096)
    assert (many.span, many.rows, many.strips, many.tiles, many.parts) == (16, 64, 1, 256, 1)
    one = plan_of("attend", "sm_90", torch.bfloat16, 64, tokens=1)
    assert (one.span, one.rows, one.tiles, one.parts) == (1, 16, 1, 32)
    assert sum(tiles for _, tiles in many.ranges()) == 256
    assert len(list(plan_of("attend", "sm_90", torch.bfloat16, 64, tokens=2**18).ranges())) > 1


def test_where_it_would_be_wrong_it_is_refused():
    """Triton's interpreter, as it is, multiplies bfloat16 wrongly; float32 it gets right."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = (
        "import torch\n"
        "from kernels.jit_build import BuildError\n"
        "from kernels.sparse_attention import sparse_attention\n"
        "i = torch.zeros(1, 1, 1, 1, dtype=torch.int32)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x = torch.ones(1, 1, 1, 16, dtype=dtype)\n"
        "    try:\n"
        "        y, _ = sparse_attention(x, x[:, None], x[:, None], i, i[0, 0], i[0, 0], backend='triton')\n"
        "        print(y.sum().item())\n"
        "    except BuildError as error:\n"
        "        print(error)"
    )
    right, wrong = child("-c", code, interpreted=True).strip().splitlines()
    assert float(right) == 16
    assert "sparse_attention, backend triton: wrong on this device" in wrong


def test_what_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "float64" in backend.supports(Case("cuda", torch.float64, 64))
    assert "up to 256" in backend.supports(Case("cuda", torch.bfloat16, 257))
    assert "TRITON_INTERPRET" in explain("sparse_attention", head_size=64)["rejected"]["triton"]


def test_importing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from kernels.sparse_attention import TABLE\n"
        "print(TABLE['triton'].name)"
    )
    assert child("-c", code, interpreted=False).strip() == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
def test_a_gpu_gets_it_right(size, dtype):
    """Tiles, single tokens, documents, watched entries, NaN where nothing is filled; twice the same bits."""
    how = triton_support.precision(dtype, triton_support.architecture(torch.device("cuda")))
    for tokens, context in ((300, 0), (1, 400)):
        call = example(
            2, tokens, 8, 2, size, length=64, listed=5, documents=2, watches=1, context=context,
            unfilled=math.nan, rounded=dtype,
        )  # fmt: skip
        there = call.to("cuda")
        found, again = (results(there, backend.run, dtype) for _ in range(2))
        assert not too_large(errors({n: x.cpu() for n, x in found.items()}, truth(call)), how.tolerance)
        assert all(torch.equal(x, again[n]) for n, x in found.items())


@pytest.mark.gpu
def test_the_host_never_waits():
    call = example(1, 600, 8, 2, 64, length=64, rounded=torch.bfloat16).to("cuda")
    results(call, backend.run, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(call, backend.run, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_decoding_in_a_cuda_graph():
    """Captured and replayed, the same bits as launched one by one."""
    call = example(2, 1, 8, 2, 64, length=64, listed=5, context=400, rounded=torch.bfloat16).to("cuda")
    inputs = [x.bfloat16() for x in (call.q, call.k, call.v)]
    with torch.no_grad():
        expected = backend.run(*inputs, *call.lists)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = backend.run(*inputs, *call.lists)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_watched_entries_are_told_apart():
    """The code of an entry is even where the block is attended, odd where it is watched."""
    blocks = listed([[3, 1], [1, 3]])
    mixed = torch.cat([blocks[:, :1], watched(blocks[:, 1:])], 1)
    zero = torch.zeros(1, 4, dtype=torch.int32)
    order = walks(mixed, zero, zero[:, :2], 2, also_watched=True).order[0, 0, 0]
    assert (order % 4 % 2).tolist() == [0, 1, 0, 1] and (order // 8).tolist() == [1, 1, 3, 3]
