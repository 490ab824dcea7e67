"""Every operator and every backend that a CPU runs, against the float64 definition: forward and all
gradients, and the operators' invariances. GPU kernels are held to the same in their own files, through a shim
and an interpreter.

Errors are relative RMS. Documents, padding and continued states are also judged by running the pieces apart.
"""

import itertools
import math
from functools import cache

import pytest
import torch
from operator_calls import STEPS, VARIANTS, apply, call, check, usable
from torch import Tensor

from kernels import custom_ops
from kernels.examples import INPUTS, Example, errors, results, truth

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 1000)
DECAYS = ((0.05, 0.06), (0.05, 0.9999), (0.99, 0.9999))
IDS = torch.tensor(
    [
        [-1] * 3 + [0] * 10 + [1] + [2] * 40 + [-1] * 5 + [2] * 3 + [3] * 28 + [-1] * 10,
        [0] * 64 + [1] * 36,
        [4] * 16 + [5] * 16 + [-1] * 32 + [6] * 36,
        [-1] * 100,
    ],
    dtype=torch.int32,
)


@pytest.fixture(params=VARIANTS)
def variant(request) -> tuple[str, bool]:
    """An operator, and whether it has its bonus."""
    return VARIANTS[request.param]


@pytest.fixture(params=["cpu", "chunked", "reference"])
def backend(request) -> str:
    """Each backend by name; the C++ ones are skipped only where nothing can compile them."""
    return usable(request.param)


@pytest.fixture(params=["cpu", "chunked"])
def fast(request) -> str:
    """The backends other than the definition."""
    return usable(request.param)


def documents(variant: tuple[str, bool]) -> Example:
    """Four rows with the documents of IDS."""
    made = call(variant, batch=4, tokens=100)
    made.document_ids = IDS
    return made


@cache
def bar(variant: tuple[str, bool], tokens: int, size: int, seed: int) -> tuple[Example, dict[str, Tensor]]:
    """A call with states, documents and any decay, and what is right."""
    batch, heads = (2, 2) if tokens < 100 else (1, 1)
    made = call(variant, batch, tokens, heads, size, seed=seed, decay=(0.05, 0.9999), documents=True)
    return made, truth(made)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_any_length(variant, fast, tokens, size):
    """The accuracy that is promised: 2e-6, and 5e-5 for the log decay's gradient."""
    made, exact = bar(variant, tokens, size, 0)
    check(results(made, fast), exact)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(("tokens", "size"), [(17, 32), (64, 64), (63, 128), (1000, 64)])
def test_other_seeds(variant, fast, tokens, size, seed):
    made, exact = bar(variant, tokens, size, seed)
    check(results(made, fast), exact)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("decay", DECAYS, ids=str)
def test_decays(variant, fast, size, decay):
    """From decays that forget within two tokens to decays that hardly forget."""
    made = call(variant, tokens=70, heads=1, size=size, decay=decay)
    check(results(made, fast), truth(made))


def test_the_definition_in_float32(variant):
    made = call(variant, tokens=33)
    check(results(made, "reference"), truth(made))


@pytest.mark.parametrize("lowest", [-300.0, -1e4, -1e30, -math.inf], ids=str)
def test_a_decay_of_zero_clears_the_state(variant, fast, lowest):
    """However decays of 0 and of 1 follow each other, nothing overflows."""
    made = call(variant, tokens=70)
    log_w = made.inputs["log_w"]
    log_w[:, 10], log_w[:, 20:25], log_w[:, 33, :, ::2], log_w[:, 40:60] = lowest, lowest, lowest, 0.0
    found = results(made, fast)
    assert all(x.isfinite().all() for x in found.values())
    check(found, truth(made))


def test_documents_and_padding(variant, fast):
    """Resets inside and at the edges of chunks, padding before, between and after documents."""
    made = documents(variant)
    found = results(made, fast)
    check(found, truth(made))
    kept = made.inputs["state"][3].float()
    assert torch.equal(found["state_out"][3], kept), "an all-padding row must hand its state through"


def test_documents_equal_separate_calls(variant, backend):
    """A document gives what it gives alone; only the row's first real document sees the given state."""
    made = documents(variant)
    found = results(made, backend, backward=False)
    shared = {name: x for name, x in made.inputs.items() if name == "u"}
    for row, ids in enumerate(IDS):
        state = made.inputs["state"][row : row + 1]
        for number in [i for i in ids.unique().tolist() if i >= 0]:
            alone = {name: made.inputs[name][row : row + 1, ids == number] for name in INPUTS[made.op]}
            expected, last = apply(made, "reference", **alone, **shared, state=state, document_ids=None)
            check({"y": found["y"][row : row + 1, ids == number]}, {"y": expected})
            state = torch.zeros_like(state)
        if (ids >= 0).any():
            check({"state": found["state_out"][row : row + 1]}, {"state": last})


def test_padding_is_inert(variant, backend):
    """NaN in padding tokens changes nothing; their outputs and gradients are exactly zero."""
    made, padding = documents(variant), IDS < 0
    clean = results(made, backend)
    for name in INPUTS[made.op]:
        made.inputs[name][padding] = math.nan
    dirty = results(made, backend)
    for name, x in dirty.items():
        assert torch.equal(clean[name], x), name
        if x.dim() == 4 and x.shape[:2] == padding.shape:
            assert (x[padding] == 0).all(), name


def test_split_call_equals_one_call(variant, backend):
    """Carrying state and gradient across a cut gives the uncut result, at any cut, and with documents."""
    made = call(variant, tokens=50)
    made.document_ids = torch.tensor([[0] * 20 + [1] * 30, [0] * 50], dtype=torch.int32)
    leaves = {name: x.float().requires_grad_() for name, x in made.inputs.items()}
    state, outputs = leaves["state"], []
    for begin, end in itertools.pairwise((0, 1, 18, 34, 50)):  # not at 20: a cut continues the document
        part = {name: leaves[name][:, begin:end] for name in INPUTS[made.op]}
        rest = {name: x for name, x in leaves.items() if name == "u"}
        ids = made.document_ids[:, begin:end]
        y, state = apply(made, backend, **part, **rest, state=state, document_ids=ids)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    upstream = [x.float() for x in made.upstream]
    gradients = torch.autograd.grad((y, state), list(leaves.values()), upstream)
    names = ("y", "state_out", *(f"d{name}" for name in leaves))
    check(dict(zip(names, (y.detach(), state.detach(), *gradients), strict=True)), truth(made))


def test_rows_do_not_know_each_other(variant, backend):
    """A row gives, to the last bit or nearly, what it gives among other rows."""
    made, order = documents(variant), torch.tensor([2, 0, 3, 1])
    straight = results(made, backend)
    inputs = {name: x if name == "u" else x[order] for name, x in made.inputs.items()}
    upstream = (made.upstream[0][order], made.upstream[1][order])
    permuted = results(Example(made.op, inputs, upstream, IDS[order]), backend)
    for name, x in straight.items():
        expected = x if name == "du" else x[order]
        torch.testing.assert_close(permuted[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_repeats_are_bitwise_equal(variant, backend):
    made = documents(variant)
    first, second = results(made, backend), results(made, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tokens", [1, 100])
def test_every_output_is_written(variant, monkeypatch, tokens):
    """Outputs are allocated without being filled: what a backend leaves out shows as NaN."""
    usable("cpu")
    made = documents(variant) if tokens == 100 else call(variant, tokens=1)
    clean, allocated = results(made, "cpu"), []

    def poisoned(shape, dtype, device) -> Tensor:
        allocated.append(shape)
        return torch.full(tuple(shape), math.nan, dtype=dtype, device=device)

    monkeypatch.setattr(custom_ops, "allocate", poisoned)
    dirty = results(made, "cpu")
    assert len(allocated) >= 2 + len(made.inputs), "the outputs are not allocated where this test looks"
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_without_a_state_it_begins_at_zero(variant, backend):
    made = call(variant, tokens=7)
    zero = apply(made, backend, **{n: x.float() for n, x in made.inputs.items()} | {"state": None})
    given = {n: x.float() for n, x in made.inputs.items()} | {"state": made.inputs["state"].float() * 0}
    assert all(torch.equal(a, b) for a, b in zip(zero, apply(made, backend, **given), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(variant, backend, dtype):
    """16-bit inputs are computed in float32: only their rounding, and that of the results, is left."""
    made = call(variant, tokens=33, rounded=dtype)
    found = results(made, backend, dtype)
    assert found["y"].dtype == dtype and found["state_out"].dtype == torch.float32
    assert max(errors(found, truth(made)).values()) < 4e-3
    assert errors(found, truth(made))["state_out"] < 2e-6


def test_mixed_dtypes(variant, backend):
    """r in 16 bits beside float32 keys: nothing but r is rounded."""
    made = call(variant, tokens=33)
    made.inputs["r"] = made.inputs["r"].bfloat16().double()
    exact, inputs = truth(made, backward=False), {n: x.float() for n, x in made.inputs.items()}
    y, state = apply(made, backend, **inputs | {"r": inputs["r"].bfloat16()})
    assert y.dtype == torch.bfloat16
    check({"state_out": state}, {"state_out": exact["state_out"]})
    check({"y": y}, {"y": exact["y"]}, "16-bit")


def test_autocast_does_not_lower_the_precision(variant, backend):
    """Under bf16 autocast float32 inputs still give float32 results."""
    made = call(variant, tokens=33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(made, backend, backward=False)
    check(found, truth(made, backward=False))


def test_strided_inputs(variant, backend):
    """Views (heads before tokens) give what their copies give."""
    made = call(variant, tokens=21)
    expected = results(made, backend)
    for name in INPUTS[made.op]:
        made.inputs[name] = made.inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    found = results(made, backend)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_one_call(variant, backend, dtype, coded):
    """Token by token, the state changed in place, resets and padding by code."""
    made = call(variant, batch=3, tokens=12, size=64, rounded=dtype)
    if coded:
        made.document_ids = torch.tensor([[0] * 5 + [1] * 7, [-1] * 4 + [0] * 8, [3] * 12], dtype=torch.int32)
    exact = truth(made, backward=False)
    kinds = {name: torch.float32 if name in ("log_w", "state", "u") else dtype for name in made.inputs}
    inputs = {name: x.to(kinds[name]) for name, x in made.inputs.items()}
    state = inputs.pop("state").clone()
    where, outputs = state.data_ptr(), []
    codes = torch.tensor([[0] * 5 + [1] + [0] * 6, [2] * 4 + [0] * 8, [0] * 12], dtype=torch.int8)
    for t in range(12):
        token = {name: x if name == "u" else x[:, t] for name, x in inputs.items()}
        now = codes[:, t].contiguous() if coded else None
        outputs.append(STEPS[made.op](**token, state=state, codes=now, backend=backend))
    y = torch.stack(outputs, dim=1)
    assert state.data_ptr() == where and y.dtype == dtype
    check({"state_out": state}, {"state_out": exact["state_out"]})
    check({"y": y}, {"y": exact["y"]}, "fp32" if dtype == torch.float32 else "16-bit")
