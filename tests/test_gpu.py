"""What must hold on a GPU, for every backend that runs there; `make gpu-check` runs these.

Wider tables of accuracy are made by kernels/bench/gpu_check.py.
"""

import math

import pytest
import tiny
import torch

from kernels import dispatch, explain
from kernels.bench.calls import BOTH, FLA, FORWARD, Contestant, Shape, contestants, make_call, run_pass
from kernels.bench.checks import RIGHT, arguments, compute
from kernels.bench.decode import decode
from kernels.bench.floors import Peaks
from kernels.bench.parity import kinds, parity
from kernels.bench.timing import memory_kept
from kernels.case import Case
from kernels.examples import Example, errors, example, too_large, truth
from kernels.wkv7 import wkv7
from models.objectives import Align, Distill

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OPERATORS = ("wkv7", "wkv6")
# All that any operator has; a test skips those that cannot run here. The definition judges, it is not judged.
NAMES = list(
    dict.fromkeys(
        b.name for op in OPERATORS for b in dispatch.backends(op) if b.name not in ("reference", FLA)
    )
)
NATIVE = [name for name in NAMES if name not in ("cpu", "chunked")]  # take 16 bits as they are
SHAPE = Shape(2, 200, 4, 64)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=OPERATORS)
def op(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def contestant(op: str, name: str, dtype: torch.dtype, size: int = 64) -> Contestant:
    """A backend, built; skips where it is not meant for this device, fails where it cannot be built."""
    found = contestants(op, Case(DEVICE, dtype, size), [name])
    if not found or (found[0].obstacle and not found[0].unbuilt):
        pytest.skip(f"{op}, {name}: {found[0].obstacle if found else 'there is none'}")
    assert not found[0].unbuilt, found[0].obstacle
    return found[0]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To the last bit; the message names what differs."""
    assert not [key for key, x in found.items() if not torch.equal(x, expected[key])]


def call(op: str, dtype: torch.dtype, tokens: int = 70) -> Example:
    return example(op, 2, tokens, 2, 64, documents=True, bonus=op == "wkv6", rounded=dtype)


def test_accuracy(op, name, dtype):
    """Forward, gradients, steps, twice the same bits: short and long, with documents and without."""
    contestant(op, name, dtype)
    wanted = kinds([op], [str(dtype).split(".")[1]], [64], (1, 17, 64, 300))
    assert not [row for row in parity(name, DEVICE, wanted) if row["check"] != RIGHT]


@pytest.mark.parametrize("lowest", [-1e30, -math.inf], ids=str)
def test_a_decay_of_zero(op, name, lowest):
    each, made = contestant(op, name, torch.float32), call(op, torch.float32)
    log_w = made.inputs["log_w"]
    log_w[:, 10], log_w[:, 20:25], log_w[:, 33, :, ::2], log_w[:, 40:60] = lowest, lowest, lowest, 0.0
    found = compute(each, made, torch.float32, DEVICE)
    assert not too_large(errors(found, truth(made)), "fp32")


def test_padding_is_inert(op, name, dtype):
    """NaN in padding changes nothing."""
    each, made = contestant(op, name, dtype), call(op, dtype)
    padding = made.document_ids < 0
    assert padding.any()
    clean = compute(each, made, dtype, DEVICE)
    for key, x in made.inputs.items():
        if key not in ("state", "u"):
            x[padding] = math.nan
    same(compute(each, made, dtype, DEVICE), clean)


def test_the_host_never_waits(op, name, dtype):
    """No synchronisation in either pass, documents included."""
    each, made = contestant(op, name, dtype), call(op, dtype)
    inputs, upstream = arguments(made, dtype, DEVICE)
    ids = made.document_ids.to(DEVICE)
    run_pass(BOTH, each, inputs, upstream, ids)  # what is built or loaded late
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_pass(BOTH, each, inputs, upstream, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_callers_stream_is_used(op, name):
    """On a stream of its own, behind work that makes the inputs: launches elsewhere would read too early."""
    each = contestant(op, name, torch.bfloat16)
    inputs, upstream = make_call(op, SHAPE, torch.bfloat16, DEVICE, seed=0)
    expected = run_pass(BOTH, each, inputs, upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {key: torch.zeros_like(x) for key, x in inputs.items()}
        torch.cuda._sleep(20_000_000)
        for key, x in late.items():
            x.copy_(inputs[key].detach())
            x.requires_grad_()
        found = run_pass(BOTH, each, late, upstream)
    stream.synchronize()
    same(found, expected)


def test_steps_in_a_cuda_graph(op, name, dtype):
    """Captured and replayed, the same bits as launched one by one."""
    if contestant(op, name, dtype).step is None:
        pytest.skip(f"{op}, {name}: it has no decoding step")
    (found,) = decode(op, SHAPE, dtype, DEVICE, [name], Peaks(1e12, 1e14))
    assert found["check"] == RIGHT and found["graph_us"] > 0, found["reason"]


@pytest.mark.parametrize("native", NATIVE)
def test_little_is_kept_for_the_backward_pass(op, native):
    """Beside the inputs, wkv7 keeps S^T a in float32, wkv6 nothing."""
    each = contestant(op, native, torch.bfloat16)
    inputs, upstream = make_call(op, SHAPE, torch.bfloat16, DEVICE, seed=0)
    assert memory_kept(each, inputs, upstream)["extra_bytes"] <= (4 * SHAPE.elements if op == "wkv7" else 0)


@pytest.mark.parametrize("native", NATIVE)
def test_more_elements_than_32_bits_count(op, native):
    """The last row of a call with 2^31 elements and more gives what it gives alone."""
    each = contestant(op, native, torch.bfloat16)
    length, heads = 4096, 64
    rows = 2**31 // (length * heads * 64) + 1
    needed = rows * length * heads * 64 * 28  # all inputs, y, and what making them takes
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    inputs, upstream = make_call(op, Shape(1, length, heads, 64), torch.bfloat16, DEVICE, seed=0)
    alone = run_pass(FORWARD, each, inputs, upstream)
    many = {key: x.detach().expand(rows, *x.shape[1:]).contiguous() for key, x in inputs.items()}
    found = run_pass(FORWARD, each, many, upstream)
    same({key: x[-1:] for key, x in found.items()}, alone)


@pytest.mark.multi_gpu
def test_tensors_on_another_gpu_than_the_current_one(op, name):
    each = contestant(op, name, torch.bfloat16)
    inputs, upstream = make_call(op, SHAPE, torch.bfloat16, "cuda:0", seed=0)
    expected = run_pass(BOTH, each, inputs, upstream)
    moved = {key: x.detach().to("cuda:1").requires_grad_() for key, x in inputs.items()}
    found = run_pass(BOTH, each, moved, [x.to("cuda:1") for x in upstream])
    same({key: x.to("cuda:0") for key, x in found.items()}, expected)


def test_auto_takes_a_backend_of_the_gpu(op, dtype):
    answer = explain(op, device=DEVICE, dtype=dtype)
    assert answer["backend"] not in ("cpu", "reference") and answer["reason"]
    assert "not cuda" in answer["rejected"]["cpu"]


def test_a_named_backend_of_the_cpu_is_refused():
    inputs, _ = make_call("wkv7", SHAPE, torch.float32, DEVICE, seed=0)
    with pytest.raises(ValueError, match="backend=cpu cannot run wkv7 here"):
        wkv7(**inputs, backend="cpu")


@pytest.mark.parametrize("objective", [Align(), Distill(chunk_tokens=64)])
def test_a_training_step_on_the_gpu_equals_that_on_the_cpu(objective: object):
    losses = {}
    for device in ("cpu", DEVICE):
        teacher = tiny.tiny_teacher().to(device)
        torch.manual_seed(0)
        student, _ = tiny.convert(tiny.tiny_teacher(), tiny.student_config(keep=[1]))
        student.to(device)
        ids = torch.arange(2 * 96, device=device).view(2, 96) % 60
        documents = (torch.arange(96, device=device) // 50).int().expand(2, 96)
        batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "document_ids": documents}
        total = objective(student, teacher, batch).total
        total.backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
        losses[device] = total.item()
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=1e-4)
