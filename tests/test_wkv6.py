"""WKV-6: every backend against the float64 reference, forward and all gradients, with and without the bonus,
and the operator's invariances.

Errors are relative RMS. Documents, padding and continued states are judged by running the pieces apart.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from kernels import explain
from kernels.wkv6 import chunked, reference, wkv6

BACKENDS = ("chunked", "reference")
NAMES = ("y", "state", "dr", "dlog_w", "dk", "dv", "dstate", "du")
READS = pytest.mark.parametrize("bonus", [False, True], ids=["current", "bonus"])
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Each backend by name."""
    return request.param


def make(
    batch=2, tokens=20, heads=2, size=32, decay=(0.2, 1.0), bonus=False, seed=0
) -> tuple[list[Tensor], list[Tensor]]:
    """Float64 inputs [r, log_w, k, v, state] (and u) with decays uniform in `decay`, and gradients of y and
    state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    shape = (batch, tokens, heads, size)
    w = decay[0] + (decay[1] - decay[0]) * torch.rand(shape, generator=generator).double()
    inputs = [normal(*shape), w.log(), normal(*shape) * size**-0.5, normal(*shape)]
    inputs += [0.3 * normal(batch, heads, size, size), *([1 + normal(heads, size)] if bonus else [])]
    return [x.float().double() for x in inputs], [normal(*shape), normal(batch, heads, size, size)]


def apply(inputs: list[Tensor], backend: str, document_ids=None) -> tuple[Tensor, Tensor]:
    """The operator on a list as `make` gives it."""
    r, log_w, k, v, state, *rest = inputs
    u = rest[0] if rest else None
    return wkv6(r, log_w, k, v, u=u, state=state, document_ids=document_ids, backend=backend)


def run(backend, inputs, upstream, *, document_ids=None, dtype=torch.float32) -> list[Tensor]:
    """y, the final state and all gradients, in the order of NAMES."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, state = apply(inputs, backend, document_ids)
    gradients = torch.autograd.grad((y, state), inputs, [x.to(dtype) for x in upstream])
    return [y.detach(), state.detach(), *gradients]


def error(got: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Every tensor within a relative RMS error; the message names all that are not."""
    assert len(got) == len(expected)
    errors = {name: error(x, e) for name, x, e in zip(NAMES, got, expected, strict=False)}
    assert all(value <= tolerance for value in errors.values()), errors


def exact(inputs, upstream, document_ids=None) -> list[Tensor]:
    """The definition, in float64."""
    return run("reference", inputs, upstream, document_ids=document_ids, dtype=torch.float64)


@READS
def test_reference_is_the_formula(bonus):
    """One head written with plain matrices: S = diag(w) S + k v^T, and the two ways of reading it."""
    inputs, _ = make(batch=1, tokens=5, heads=1, bonus=bonus)
    r, log_w, k, v, state, *rest = inputs
    y, final = reference.run(r, log_w, k, v, rest[0] if bonus else None, state, None)
    r, log_w, k, v = (x[0, :, 0] for x in (r, log_w, k, v))
    state = state[0, 0]
    for t in range(5):
        before, added = state, torch.outer(k[t], v[t])
        state = torch.diag(log_w[t].exp()) @ before + added
        read = before + torch.diag(rest[0][0]) @ added if bonus else state
        torch.testing.assert_close(y[0, t, 0], read.T @ r[t])
    torch.testing.assert_close(final[0, 0], state)


@READS
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lengths(backend, dtype, tokens, bonus):
    """Any row length, forward and all gradients."""
    inputs, upstream = make(tokens=tokens, bonus=bonus)
    found = run(backend, inputs, upstream, dtype=dtype)
    assert found[0].dtype == found[1].dtype == dtype
    assert_close(found, exact(inputs, upstream), TOLERANCE[dtype])


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("decay", [(0.006, 0.007), (0.006, 0.9999), (0.99, 0.9999)], ids=str)
def test_decays_and_head_sizes(size, decay):
    """From decays that forget within a token to decays that hardly forget."""
    inputs, upstream = make(tokens=70, heads=1, size=size, decay=decay)
    assert_close(run("chunked", inputs, upstream), exact(inputs, upstream), TOLERANCE[torch.float32])


@READS
@pytest.mark.parametrize("lowest", [-1e4, -1e30, -math.inf], ids=str)
def test_every_decay_is_exact(backend, lowest, bonus):
    """A decay of 0 clears, a log decay of 0 keeps, however they follow each other; nothing overflows."""
    inputs, upstream = make(tokens=70, bonus=bonus)
    log_w = inputs[1]
    log_w[:, 10], log_w[:, 20:25], log_w[:, 33, :, ::2], log_w[:, 40:60] = lowest, lowest, lowest, 0.0
    results = run(backend, inputs, upstream)
    assert all(x.isfinite().all() for x in results)
    assert_close(results, exact(inputs, upstream), TOLERANCE[torch.float32])


def test_a_strong_decay_does_not_blur_the_tokens_after_it():
    """Summed from the start of the chunk, -1e4 would leave three digits of the small decays behind it."""
    inputs, upstream = make(batch=1, tokens=32, heads=1, decay=(0.9, 0.99))
    inputs[1][:, 1] = -1e4
    found, expected = run("chunked", inputs, upstream), exact(inputs, upstream)
    assert error(found[0][:, 8:], expected[0][:, 8:]) < 1e-6
    assert error(found[3][:, 8:], expected[3][:, 8:]) < 1e-6


IDS = torch.tensor(
    [
        [-1] * 3 + [0] * 10 + [1] + [2] * 40 + [-1] * 5 + [2] * 3 + [3] * 28 + [-1] * 10,
        [0] * 64 + [1] * 36,
        [4] * 16 + [5] * 16 + [-1] * 32 + [6] * 36,
        [-1] * 100,
    ],
    dtype=torch.int32,
)


@READS
def test_documents_and_padding_against_float64(backend, bonus):
    """Resets inside and at the edges of chunks, padding before, between and after documents."""
    inputs, upstream = make(batch=4, tokens=100, bonus=bonus)
    results, expected = run(backend, inputs, upstream, document_ids=IDS), exact(inputs, upstream, IDS)
    assert_close(results, expected, TOLERANCE[torch.float32])
    assert torch.equal(results[1][3], inputs[4][3].float()), "an all-padding row must hand its state through"


@READS
def test_documents_equal_separate_calls(backend, bonus):
    """A document gives what it gives alone; only the row's first real document sees the given state."""
    inputs, upstream = make(batch=4, tokens=100, bonus=bonus)
    y, final = run(backend, inputs, upstream, document_ids=IDS)[:2]
    for row, ids in enumerate(IDS):
        state = inputs[4][row : row + 1]
        for number in [i for i in ids.unique().tolist() if i >= 0]:
            alone = [x[row : row + 1, ids == number] for x in inputs[:4]]
            expected, state = apply([*alone, state, *inputs[5:]], "reference")
            assert error(y[row : row + 1, ids == number], expected) < 1e-6
            last, state = state, torch.zeros_like(state)
        if (ids >= 0).any():
            assert error(final[row : row + 1], last) < 1e-6


@READS
def test_padding_is_inert(backend, bonus):
    """NaN in padding tokens changes nothing; their outputs and gradients are exactly zero."""
    inputs, upstream = make(batch=4, tokens=100, bonus=bonus)
    padding = IDS < 0
    clean = run(backend, inputs, upstream, document_ids=IDS)
    poisoned = [x.clone() for x in inputs]
    for x in poisoned[:4]:
        x[padding] = math.nan
    dirty = run(backend, poisoned, upstream, document_ids=IDS)
    for name, before, after in zip(NAMES, clean, dirty, strict=False):
        assert torch.equal(before, after), name
        if name in ("y", "dr", "dlog_w", "dk", "dv"):
            assert (after[padding] == 0).all(), name


@READS
def test_split_call_equals_one_call(backend, bonus):
    """Carrying state and gradient across a cut gives the uncut result, at odd and even cuts, and with
    documents."""
    inputs, upstream = make(tokens=50, bonus=bonus)
    ids = torch.tensor([[0] * 20 + [1] * 30, [0] * 50], dtype=torch.int32)
    whole = run(backend, inputs, upstream, document_ids=ids, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    state, outputs = leaves[4], []
    for begin, end in itertools.pairwise((0, 1, 18, 34, 50)):  # not at 20: a cut continues the document
        part = [x[:, begin:end] for x in leaves[:4]]
        y, state = apply([*part, state, *leaves[5:]], backend, ids[:, begin:end])
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    gradients = torch.autograd.grad((y, state), leaves, upstream)
    assert_close([y.detach(), state.detach(), *gradients], whole, TOLERANCE[torch.float64])


def test_rows_do_not_know_each_other(backend):
    """Permuting the rows permutes the results."""
    inputs, upstream = make(batch=4, tokens=100)
    order = torch.tensor([2, 0, 3, 1])
    straight = run(backend, inputs, upstream, document_ids=IDS)
    permuted = run(backend, [x[order] for x in inputs], [x[order] for x in upstream], document_ids=IDS[order])
    for name, x, p in zip(NAMES, straight, permuted, strict=False):
        torch.testing.assert_close(p, x[order], rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_state_it_begins_at_zero(backend):
    inputs, _ = make(tokens=7)
    y, state = wkv6(*inputs[:4], backend=backend)
    expected = apply([*inputs[:4], torch.zeros_like(inputs[4])], backend)
    assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(backend, dtype):
    """Only the rounding of inputs and results is left."""
    inputs, upstream = make(tokens=33)
    inputs = [*(x.to(dtype).double() for x in inputs[:4]), inputs[4]]
    leaves = [x.requires_grad_() for x in (*(x.to(dtype) for x in inputs[:4]), inputs[4].float())]
    y, state = apply(leaves, backend)
    assert y.dtype == dtype and state.dtype == torch.float32
    got = [y, state, *torch.autograd.grad((y, state), leaves, [upstream[0].to(dtype), upstream[1].float()])]
    assert_close(got, exact(inputs, upstream), tolerance=4e-3)


def test_autocast_does_not_lower_the_precision(backend):
    """Under bf16 autocast float32 inputs still give float32 results."""
    inputs, upstream = make(tokens=33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply([x.float() for x in inputs], backend)
    assert_close(list(found), exact(inputs, upstream)[:2], TOLERANCE[torch.float32])


def test_auto_takes_the_chunked_backend_and_says_why(monkeypatch):
    assert explain("wkv6")["backend"] == "chunked" and "any device" in explain("wkv6")["reason"]
    inputs, _ = make(tokens=40)
    monkeypatch.setattr(chunked, "CHUNK", 8)
    small = apply(inputs, "auto")[0]
    monkeypatch.undo()
    assert error(small, apply(inputs, "auto")[0]) < 1e-14, "the chunk length must not matter"


def _spoil(**changes):
    """Arguments of wkv6 with one thing wrong."""
    inputs, _ = make(tokens=4, bonus=True)
    names = ("r", "log_w", "k", "v", "state", "u")
    arguments = dict(zip(names, (x.float() for x in inputs), strict=True))
    return {**arguments, **{name: change(arguments) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": lambda x: x["k"][:, :3]}, "wkv6: k has shape"),
        ({"r": lambda x: x["r"][0]}, r"wkv6: r must be \[B,T,H,N\]"),
        ({name: lambda x: x["r"][..., :16] for name in ("r", "log_w", "k", "v")}, "head size"),
        ({name: lambda x: x["r"][:, :0] for name in ("r", "log_w", "k", "v")}, "none empty"),
        ({"v": lambda x: x["v"].double()}, "v is torch.float64"),
        ({"log_w": lambda x: x["v"].to("meta")}, "log_w is on meta"),
        ({"u": lambda x: x["u"][:1]}, r"u must be \[H,N\] = \(2, 32\), got \(1, 32\)"),
        ({"u": lambda x: x["u"].double()}, "u is torch.float64"),
        ({"state": lambda x: x["state"].bfloat16()}, "state must be torch.float32"),
        ({"state": lambda x: x["state"][:1]}, r"state must be \[B,H,N_k,N_v\]"),
        ({"document_ids": lambda x: torch.zeros(2, 5, dtype=torch.int32)}, r"document_ids must be \[B,T\]"),
        ({"document_ids": lambda x: torch.zeros(2, 4)}, "document_ids must be int32"),
        ({"backend": lambda x: "fast"}, "choose one of: auto, chunked, reference"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    """Every refusal names the argument and what was expected."""
    with pytest.raises(ValueError, match=message):
        wkv6(**_spoil(**changes))
