"""The GPU kernels, run from their source on the CPU through the shim, against the float64 definition.

No GPU is asked for. The whole glue is in play: the entries, custom operators, the library's calls; only the
compiler differs.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache

import gpu_sources
import pytest
import torch
from operator_calls import STEPS, VARIANTS, call, check
from torch import Tensor

from kernels import custom_ops
from kernels.examples import INPUTS, Example, errors, results, truth
from kernels.gpu import library

SIZES = (32, 64, 128)
ANY_DECAY = (0.05, 0.9999)
IDS = torch.tensor(
    [
        [-1] * 3 + [0] * 10 + [1] + [2] * 30 + [-1] * 5 + [2] * 3 + [3] * 15 + [-1] * 5,
        [0] * 64 + [1] * 8,  # a reset at an anchor of the log decay's gradient
        [4] * 16 + [5] * 16 + [-1] * 34 + [6] * 6,  # padding at one
        [-1] * 72,
    ],
    dtype=torch.int32,
)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> tuple[str, bool]:
    """An operator, and whether it has its bonus."""
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def shim(request, variant) -> Iterator[str]:
    """The backend's name; heads are computed as where there are many, or split as where there are few."""
    with gpu_sources.shim(variant[0], request.param) as name:
        yield name


@cache
def known(variant, **options) -> tuple[Example, dict[str, Tensor]]:
    """A call and what is right, found once for heads whole and split; neither may be changed."""
    made = call(variant, **options)
    return made, truth(made)


def documents(variant, **options) -> Example:
    """Four rows with the documents of IDS, one head."""
    made = call(variant, batch=4, tokens=72, heads=1, **options)
    made.document_ids = IDS
    return made


@pytest.mark.parametrize("size", SIZES)
def test_any_length(shim, variant, size):
    """Lengths around those of chunks (2, 4 or 8 tokens) and anchors (64), any decay, documents, states."""
    for tokens in (1, 2, 7, 9, 15, 16, 17, 63, 64, 65):
        heads = 2 if tokens < 10 else 1
        made, exact = known(variant, tokens=tokens, heads=heads, size=size, decay=ANY_DECAY, documents=True)
        check(results(made, shim), exact)


@pytest.mark.parametrize("seed", range(5))
def test_seeds(shim, variant, seed):
    made, exact = known(variant, tokens=35, size=64, seed=seed, decay=ANY_DECAY)
    check(results(made, shim), exact)


def test_long_rows(shim, variant):
    """Rounding does not pile up in the log decay's gradient, nor in the bonus's."""
    made, exact = known(variant, batch=1, tokens=1000, decay=ANY_DECAY)
    check(results(made, shim), exact)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decay", [(0.05, 0.06), (0.9, 0.9999), (0.99, 0.9999), (1.0, 1.0)], ids=str)
def test_decays(shim, variant, size, decay):
    """From decays that forget within two tokens to none."""
    made, exact = known(variant, batch=1, tokens=70, heads=1, size=size, decay=decay)
    check(results(made, shim), exact)


@pytest.mark.parametrize("lowest", [-300.0, -1e30, -math.inf], ids=str)
def test_a_decay_of_zero_clears_the_state(shim, variant, lowest):
    """However decays of 0 and of 1 follow each other, nothing overflows."""
    made = call(variant, tokens=70, heads=1)
    log_w = made.inputs["log_w"]
    log_w[:, 10], log_w[:, 20:25], log_w[:, 33, :, ::2], log_w[:, 40:66] = lowest, lowest, lowest, 0.0
    found = results(made, shim)
    assert all(x.isfinite().all() for x in found.values())
    check(found, truth(made))


@pytest.mark.parametrize("size", SIZES)
def test_documents_and_padding(shim, variant, size):
    """Resets and padding anywhere; NaN in padding changes nothing; an all-padding row keeps its state."""
    made = documents(variant, size=size)
    clean = results(made, shim)
    check(clean, truth(made))
    assert torch.equal(clean["state_out"][3], made.inputs["state"][3].float())
    padding = IDS < 0
    for name in INPUTS[made.op]:
        made.inputs[name][padding] = math.nan
    made.upstream[0][padding] = math.nan
    dirty = results(made, shim)
    for name, x in dirty.items():
        assert torch.equal(clean[name], x), name
        if x.dim() == 4 and x.shape[:2] == padding.shape:
            assert (x[padding] == 0).all(), name


def test_a_spoilt_document_spoils_no_other(shim, variant):
    """Infinity in one document's state does not pass a reset, in either direction."""
    made = call(variant, batch=1, tokens=30, heads=1)
    made.document_ids = torch.tensor([[0] * 10 + [1] * 10 + [2] * 10], dtype=torch.int32)
    clean = results(made, shim)
    made.inputs["v"][:, 12] = math.inf
    dirty = results(made, shim)
    for name in ("y", *(f"d{name}" for name in INPUTS[made.op])):
        assert torch.equal(clean[name][:, :10], dirty[name][:, :10]), name
        assert torch.equal(clean[name][:, 20:], dirty[name][:, 20:]), name
    assert torch.equal(clean["state_out"], dirty["state_out"])
    assert torch.equal(clean["dstate"], dirty["dstate"])


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 64), (torch.float16, 32)], ids=str)
def test_half_precision(shim, variant, dtype, size):
    """16-bit inputs are taken as they are and computed in float32: only the rounding of results is left."""
    made = documents(variant, size=size, rounded=dtype)
    found = results(made, shim, dtype)
    assert found["y"].dtype == found["dv"].dtype == dtype
    found_errors = errors(found, truth(made))
    assert max(found_errors.values()) < 4e-3
    float32 = ["state_out", "dstate", *(["du"] if variant[1] else [])]
    assert max(found_errors[name] for name in float32) < 2e-6
    assert found_errors["dlog_w"] < 5e-5


def test_every_output_is_written(shim, variant, monkeypatch):
    """Outputs and scratch are allocated without being filled: what is left out would show as NaN."""
    made, allocated = documents(variant), []
    clean = results(made, shim)

    def poisoned(shape, dtype, device):
        allocated.append(shape)
        return torch.full(tuple(shape), math.nan, dtype=dtype, device=device)

    monkeypatch.setattr(custom_ops, "allocate", poisoned)
    dirty = results(made, shim)
    saved = {"wkv7": 1, "wkv6": 0}[made.op]
    assert len(allocated) == 2 + saved + len(made.inputs) + 1, "y, state; what is saved; gradients; scratch"
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_repeats_are_bitwise_equal(shim, variant):
    made = documents(variant)
    first, second = results(made, shim), results(made, shim)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inference_is_the_same(shim, variant):
    made = documents(variant)
    trained, plain = results(made, shim), results(made, shim, backward=False)
    assert all(torch.equal(trained[name], x) for name, x in plain.items())


def misaligned(x: Tensor) -> Tensor:
    """A contiguous copy that begins where the kernels cannot read it."""
    copy = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert copy.data_ptr() % library.ALIGNMENT
    return copy


def steps(variant, shim: str, dtype: torch.dtype, size: int, place: Callable = torch.clone) -> None:
    """Twelve steps against one call, every tensor and the state where `place` puts them."""
    made = call(variant, batch=3, tokens=12, size=size, rounded=dtype)
    made.document_ids = torch.tensor([[0] * 5 + [1] * 7, [-1] * 4 + [0] * 8, [3] * 12], dtype=torch.int32)
    exact = truth(made, backward=False)
    codes = torch.tensor([[0] * 5 + [1] + [0] * 6, [2] * 4 + [0] * 8, [0] * 12], dtype=torch.int8)
    kinds = {name: torch.float32 if name in ("log_w", "state", "u") else dtype for name in made.inputs}
    inputs = {name: x.to(kinds[name]) for name, x in made.inputs.items()}
    state = place(inputs.pop("state"))
    where, outputs = state.data_ptr(), []
    for t in range(12):
        token = {name: place(x if name == "u" else x[:, t]) for name, x in inputs.items()}
        outputs.append(STEPS[made.op](**token, state=state, codes=codes[:, t].contiguous(), backend=shim))
    assert state.data_ptr() == where
    check({"state_out": state}, {"state_out": exact["state_out"]})
    y = torch.stack(outputs, dim=1)
    check({"y": y}, {"y": exact["y"]}, "fp32" if dtype == torch.float32 else "16-bit")


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 32), (torch.float32, 128), (torch.bfloat16, 64)])
def test_steps_equal_one_call(shim, variant, dtype, size):
    """Token by token, the state changed in place, resets and padding by code."""
    steps(variant, shim, dtype, size)


def test_memory_may_begin_anywhere(shim, variant, monkeypatch):
    """Kernels read 16 bytes at once; views that begin in between give the same, states in place included."""
    steps(variant, shim, torch.float32, 32, misaligned)
    made = call(variant, tokens=9)
    expected, aligned, seen = results(made, shim), library.aligned, []

    def watched(x):
        seen.append(x.data_ptr() % library.ALIGNMENT)
        return aligned(x)

    monkeypatch.setattr(library, "aligned", watched)
    made.inputs = {name: misaligned(x.float()) for name, x in made.inputs.items()}
    found = results(made, shim)
    assert sum(place > 0 for place in seen) >= 2 * len(made.inputs), "copied before the library saw them"
    assert all(torch.equal(expected[name], x) for name, x in found.items())
