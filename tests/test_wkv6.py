"""WKV-6: the definition is the published formula, and what is hard for this operator alone. What holds for
every operator is in test_operators.py."""

import pytest
import torch
from compilers import require_compiler

from kernels.examples import errors, example, results, truth
from kernels.wkv6 import chunked, reference, wkv6


@pytest.mark.parametrize("bonus", [False, True], ids=["current", "bonus"])
def test_reference_is_the_formula(bonus):
    """One head written with plain matrices: S = diag(w) S + k v^T, and the two ways of reading it."""
    inputs = example("wkv6", 1, 5, 1, 32, bonus=bonus).inputs
    state, u = inputs["state"], inputs.get("u")
    y, final = reference.run(*(inputs[name] for name in ("r", "log_w", "k", "v")), u, state, None)
    r, log_w, k, v = (inputs[name][0, :, 0] for name in ("r", "log_w", "k", "v"))
    state = state[0, 0]
    for t in range(5):
        before, added = state, torch.outer(k[t], v[t])
        state = torch.diag(log_w[t].exp()) @ before + added
        read = before + torch.diag(u[0]) @ added if bonus else state
        torch.testing.assert_close(y[0, t, 0], read.T @ r[t])
    torch.testing.assert_close(final[0, 0], state)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_a_strong_decay_does_not_blur_the_tokens_after_it(backend):
    """Summed from the start of the chunk, -1e4 would leave three digits of the small decays behind it."""
    if backend == "cpu":
        require_compiler()
    call = example("wkv6", 1, 32, 1, 32, decay=(0.9, 0.99))
    call.inputs["log_w"][:, 1] = -1e4
    found, exact = results(call, backend), truth(call)
    later = {name: found[name][:, 8:] for name in ("y", "dlog_w")}
    assert max(errors(later, {name: exact[name][:, 8:] for name in later}).values()) < 1e-6


def test_the_chunk_length_does_not_matter(monkeypatch):
    call = example("wkv6", 2, 40, 2, 32)
    usual = results(call, "chunked", torch.float64)
    monkeypatch.setattr(chunked, "CHUNK", 8)
    assert max(errors(results(call, "chunked", torch.float64), usual).values()) < 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u[:1], r"u must be \[H,N\] = \(2, 32\), got \(1, 32\)"),
        (lambda u: u.double(), "u is torch.float64"),
    ],
)
def test_a_bad_bonus_is_named(change, message):
    inputs = {name: x.float() for name, x in example("wkv6", 2, 4, 2, 32, bonus=True).inputs.items()}
    with pytest.raises(ValueError, match=message):
        wkv6(**inputs | {"u": change(inputs["u"])})
