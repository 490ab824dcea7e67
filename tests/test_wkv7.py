"""WKV-7: every backend against the float64 reference, forward and all gradients, and the operator's
invariances.

Errors are relative RMS. Documents, padding and continued states are judged by running the pieces apart.
"""

import math

import pytest
import torch
from compilers import require_compiler
from torch import Tensor

from kernels.wkv7 import cpu, reference, wkv7

BACKENDS = ("cpu", "chunked", "reference")
NAMES = ("y", "state", "dr", "dlog_w", "dk", "dv", "da", "db", "dstate")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Each backend by name; the C++ one is skipped only where nothing can compile it."""
    if request.param == "cpu":
        require_compiler()
    return request.param


def make(
    batch=2, tokens=20, heads=2, size=32, decay=(0.545, 1.0), seed=0
) -> tuple[list[Tensor], list[Tensor]]:
    """Float64 inputs [r, log_w, k, v, a, b, state] with decays uniform in `decay`, and gradients of y and
    state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    shape = (batch, tokens, heads, size)
    key = torch.nn.functional.normalize(normal(*shape), dim=-1)
    rate = torch.rand(shape, generator=generator).double()
    w = decay[0] + (decay[1] - decay[0]) * torch.rand(shape, generator=generator).double()
    inputs = [normal(*shape), w.log(), normal(*shape) * size**-0.5, normal(*shape), -key, key * rate]
    state, dstate = 0.3 * normal(batch, heads, size, size), normal(batch, heads, size, size)
    return [x.float().double() for x in (*inputs, state)], [normal(*shape), dstate]


def run(backend, inputs, upstream, *, document_ids=None, dtype=torch.float32) -> list[Tensor]:
    """y, the final state and the seven gradients, in the order of NAMES."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, state = wkv7(*inputs[:6], state=inputs[6], document_ids=document_ids, backend=backend)
    gradients = torch.autograd.grad((y, state), inputs, [x.to(dtype) for x in upstream])
    return [y.detach(), state.detach(), *gradients]


def error(got: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance=1e-5) -> None:
    """Every tensor within a relative RMS error; the message names all that are not."""
    errors = {name: error(x, e) for name, x, e in zip(NAMES, got, expected, strict=True)}
    assert all(value <= tolerance for value in errors.values()), errors


def exact(inputs, upstream, document_ids=None) -> list[Tensor]:
    """The definition, in float64."""
    return run("reference", inputs, upstream, document_ids=document_ids, dtype=torch.float64)


def test_reference_is_the_formula():
    """One head written with plain matrices: S = (diag(w) + b a^T) S + k v^T, y = S^T r."""
    inputs, _ = make(batch=1, tokens=5, heads=1, size=32)
    y, final = reference.run(*inputs, None)
    r, log_w, k, v, a, b = (x[0, :, 0] for x in inputs[:6])
    state = inputs[6][0, 0]
    for t in range(5):
        state = (torch.diag(log_w[t].exp()) + torch.outer(b[t], a[t])) @ state + torch.outer(k[t], v[t])
        torch.testing.assert_close(y[0, t, 0], state.T @ r[t])
    torch.testing.assert_close(final[0, 0], state)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 1000])
def test_lengths(backend, tokens):
    """Any row length, forward and all seven gradients."""
    inputs, upstream = make(batch=1 if tokens == 1000 else 2, tokens=tokens, heads=1 if tokens == 1000 else 2)
    assert_close(run(backend, inputs, upstream), exact(inputs, upstream))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("decay", [(0.05, 0.06), (0.05, 0.9999), (0.99, 0.9999)], ids=str)
def test_decays_and_head_sizes(backend, size, decay):
    """From decays that forget within two tokens to decays that hardly forget."""
    inputs, upstream = make(tokens=70, heads=1, size=size, decay=decay)
    # Where every decay is tiny so is its gradient, the small difference of large sums.
    tolerance = 2e-5 if decay[1] < 0.1 else 1e-5
    assert_close(run(backend, inputs, upstream), exact(inputs, upstream), tolerance)


def test_a_decay_of_zero_clears_the_state(backend):
    """log_w far below what exp can represent, minus infinity included, is a decay of 0 and nothing
    overflows."""
    inputs, upstream = make(tokens=40)
    inputs[1][:, 10], inputs[1][:, 20:25], inputs[1][:, 33, :, ::2] = -math.inf, -300.0, -1e30
    results = run(backend, inputs, upstream)
    assert all(x.isfinite().all() for x in results)
    assert_close(results, exact(inputs, upstream))


def test_repeated_keys(backend):
    """One key, written again and again without decay: the triangular system at its worst conditioned."""
    inputs, upstream = make(tokens=96, decay=(1.0, 1.0))
    inputs[4] = inputs[4][:, :1].expand_as(inputs[4]).contiguous()
    inputs[5] = -inputs[4]
    assert_close(run(backend, inputs, upstream), exact(inputs, upstream))


IDS = torch.tensor(
    [
        [-1] * 3 + [0] * 10 + [1] + [2] * 40 + [-1] * 5 + [2] * 3 + [3] * 28 + [-1] * 10,
        [0] * 64 + [1] * 36,
        [4] * 16 + [5] * 16 + [-1] * 32 + [6] * 36,
        [-1] * 100,
    ],
    dtype=torch.int32,
)


def test_documents_and_padding_against_float64(backend):
    """Resets inside and at the edges of chunks, padding before, between and after documents."""
    inputs, upstream = make(batch=4, tokens=100)
    results, expected = run(backend, inputs, upstream, document_ids=IDS), exact(inputs, upstream, IDS)
    assert_close(results, expected)
    assert torch.equal(results[1][3], inputs[6][3].float()), "an all-padding row must hand its state through"


def test_documents_equal_separate_calls(backend):
    """A document gives what it gives alone; only the row's first real document sees the given state."""
    inputs, upstream = make(batch=4, tokens=100)
    y, final = run(backend, inputs, upstream, document_ids=IDS)[:2]
    for row, ids in enumerate(IDS):
        state = inputs[6][row : row + 1]
        for number in [i for i in ids.unique().tolist() if i >= 0]:
            alone = [x[row : row + 1, ids == number] for x in inputs[:6]]
            expected, state = wkv7(*alone, state=state, backend="reference")
            assert error(y[row : row + 1, ids == number], expected) < 1e-5
            last, state = state, torch.zeros_like(state)
        if (ids >= 0).any():
            assert error(final[row : row + 1], last) < 1e-5


def test_padding_is_inert(backend):
    """NaN in padding tokens changes nothing; their outputs and gradients are exactly zero."""
    inputs, upstream = make(batch=4, tokens=100)
    padding = IDS < 0
    clean = run(backend, inputs, upstream, document_ids=IDS)
    poisoned = [x.clone() for x in inputs]
    for x in poisoned[:6]:
        x[padding] = math.nan
    dirty = run(backend, poisoned, upstream, document_ids=IDS)
    for name, before, after in zip(NAMES, clean, dirty, strict=True):
        assert torch.equal(before, after), name
        if name not in ("state", "dstate"):
            assert (after[padding] == 0).all(), name


def test_split_call_equals_one_call(backend):
    """Carrying state and gradient across a cut gives the uncut result, at odd and even cuts, and with
    documents."""
    inputs, upstream = make(tokens=50)
    ids = torch.tensor([[0] * 20 + [1] * 30, [0] * 50], dtype=torch.int32)
    whole = run(backend, inputs, upstream, document_ids=ids)
    leaves = [x.float().requires_grad_() for x in inputs]
    state, outputs, begin = leaves[6], [], 0
    for end in (1, 18, 34, 50):  # not at 20: a cut continues the document on both sides of it
        part = [x[:, begin:end] for x in leaves[:6]]
        y, state = wkv7(*part, state=state, document_ids=ids[:, begin:end], backend=backend)
        outputs.append(y)
        begin = end
    y = torch.cat(outputs, dim=1)
    gradients = torch.autograd.grad((y, state), leaves, [x.float() for x in upstream])
    assert_close([y.detach(), state.detach(), *gradients], [x.double() for x in whole])


def test_rows_do_not_know_each_other(backend):
    """Permuting the rows permutes the results."""
    inputs, upstream = make(batch=4, tokens=100)
    order = torch.tensor([2, 0, 3, 1])
    straight = run(backend, inputs, upstream, document_ids=IDS)
    permuted = run(backend, [x[order] for x in inputs], [x[order] for x in upstream], document_ids=IDS[order])
    for name, x, p in zip(NAMES, straight, permuted, strict=True):
        torch.testing.assert_close(p, x[order], rtol=1e-5, atol=1e-6, msg=name)


def test_repeats_are_bitwise_equal(backend):
    """Two runs, and for the C++ backend two thread counts, agree bit for bit."""
    inputs, upstream = make(batch=4, tokens=100, size=64)
    first = run(backend, inputs, upstream, document_ids=IDS)
    torch.set_num_threads(2 if backend == "cpu" else 1)
    second = run(backend, inputs, upstream, document_ids=IDS)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_output_is_written(monkeypatch):
    """The C++ wrapper allocates without filling: poisoned allocations must not show."""
    inputs, upstream = make(batch=4, tokens=100)
    clean = run("cpu", inputs, upstream, document_ids=IDS)
    allocated = []

    def poisoned(x: Tensor) -> Tensor:
        allocated.append(x.shape)
        return torch.full_like(x, math.nan)

    monkeypatch.setattr(cpu.torch, "empty_like", poisoned)
    dirty = run("cpu", inputs, upstream, document_ids=IDS)
    assert len(allocated) == 10, "the outputs are not allocated where this test looks"
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    """16-bit inputs are computed in float32: only their rounding, and that of the results, is left."""
    inputs, upstream = make(tokens=33)
    inputs = [*(x.to(dtype).double() for x in inputs[:6]), inputs[6]]
    leaves = [*(x.to(dtype) for x in inputs[:6]), inputs[6].float()]
    leaves = [x.requires_grad_() for x in leaves]
    y, state = wkv7(*leaves[:6], state=leaves[6], backend=backend)
    assert y.dtype == dtype and state.dtype == torch.float32
    got = [y, state, *torch.autograd.grad((y, state), leaves, [upstream[0].to(dtype), upstream[1].float()])]
    assert_close(got, exact(inputs, upstream), tolerance=4e-3)


def test_autocast_does_not_lower_the_precision(backend):
    """Under bf16 autocast float32 inputs still give float32 results."""
    inputs, upstream = make(tokens=33)
    leaves = [x.float().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = wkv7(*leaves[:6], state=leaves[6], backend=backend)
    gradients = torch.autograd.grad((y, state), leaves, [x.float() for x in upstream])
    assert_close([y.detach(), state.detach(), *gradients], exact(inputs, upstream))


def test_strided_inputs(backend):
    """Views (heads before tokens, sliced features) give what their copies give."""
    inputs, upstream = make(tokens=21)
    expected = run(backend, inputs, upstream)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:6]]
    views[0] = torch.cat((views[0], views[0]), dim=-1)[..., : views[0].shape[-1]]
    assert_close(run(backend, [*views, inputs[6]], upstream), [x.double() for x in expected], tolerance=1e-6)


@pytest.mark.parametrize("with_codes", [False, True])
def test_custom_operators(with_codes):
    """Schema, fake and autograd registrations of both operators hold."""
    inputs, upstream = make(batch=1, tokens=9)
    codes = torch.tensor([[0, 0, 1, 2, 0, 1, 0, 2, 0]], dtype=torch.int8) if with_codes else None
    plain = [x.float() for x in inputs]
    _, _, sa = cpu.wkv7_cpu(*plain, codes)
    torch.library.opcheck(cpu.wkv7_cpu, (*(x.clone().requires_grad_() for x in plain), codes))
    torch.library.opcheck(cpu.wkv7_cpu_backward, (*(x.float() for x in upstream), *plain, codes, sa))


def test_compiles_without_graph_breaks():
    """torch.compile sees one plain operator, documents and gradients included."""
    inputs, upstream = make(tokens=9)
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2], dtype=torch.int32)
    leaves = [x.float().requires_grad_() for x in inputs]
    compiled = torch.compile(wkv7, fullgraph=True, backend="aot_eager")
    y, state = compiled(*leaves[:6], state=leaves[6], document_ids=ids)
    gradients = torch.autograd.grad((y, state), leaves, [x.float() for x in upstream])
    assert_close([y.detach(), state.detach(), *gradients], exact(inputs, upstream, ids))


def test_narrow_vectors(monkeypatch):
    """The eight-lane code of machines without AVX-512 is right too."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("needs an x86 processor with AVX2 to run code built for one")
    narrow = [flag for flag in cpu.compiler_flags() if "march" not in flag] + ["-march=haswell"]
    monkeypatch.setattr(cpu, "compiler_flags", lambda: narrow)
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    for size in (32, 64, 128):
        inputs, upstream = make(batch=4, tokens=100, heads=1, size=size)
        results = run("cpu", inputs, upstream, document_ids=IDS)
        assert_close(results, exact(inputs, upstream, IDS))


def _spoil(**changes):
    """Arguments of wkv7 with one thing wrong."""
    inputs, _ = make(tokens=4)
    arguments = dict(
        zip(("r", "log_w", "k", "v", "a", "b", "state"), (x.float() for x in inputs), strict=True)
    )
    return {**arguments, **{name: change(arguments) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": lambda x: x["k"][:, :3]}, "k has shape"),
        ({"r": lambda x: x["r"][0]}, r"r must be \[B,T,H,N\]"),
        ({name: lambda x: x["r"][..., :16] for name in ("r", "log_w", "k", "v", "a", "b")}, "head size"),
        ({name: lambda x: x["r"][:, :0] for name in ("r", "log_w", "k", "v", "a", "b")}, "none empty"),
        ({"v": lambda x: x["v"].double()}, "v is torch.float64"),
        ({"a": lambda x: x["a"].int()}, "a is torch.int32"),
        ({"b": lambda x: x["b"].to("meta")}, "b is on meta"),
        ({"state": lambda x: x["state"].bfloat16()}, "state must be torch.float32"),
        ({"state": lambda x: x["state"][:1]}, r"state must be \[B,H,N_k,N_v\]"),
        ({"document_ids": lambda x: torch.zeros(2, 5, dtype=torch.int32)}, r"document_ids must be \[B,T\]"),
        ({"document_ids": lambda x: torch.zeros(2, 4)}, "document_ids must be int32"),
        ({"backend": lambda x: "fast"}, "choose one of: auto, cpu, chunked, reference"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    """Every refusal names the argument and what was expected."""
    with pytest.raises(ValueError, match=message):
        wkv7(**_spoil(**changes))
