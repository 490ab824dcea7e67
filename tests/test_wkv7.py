"""WKV-7: the definition is the published formula, and what is hard for this operator alone. What holds for
every operator is in test_operators.py."""

import pytest
import torch
from compilers import require_compiler

from kernels.examples import errors, example, results, too_large, truth
from kernels.wkv7 import reference


def test_reference_is_the_formula():
    """One head written with plain matrices: S = (diag(w) + b a^T) S + k v^T, y = S^T r."""
    inputs = list(example("wkv7", 1, 5, 1, 32).inputs.values())
    y, final = reference.run(*inputs, None)
    r, log_w, k, v, a, b = (x[0, :, 0] for x in inputs[:6])
    state = inputs[6][0, 0]
    for t in range(5):
        state = (torch.diag(log_w[t].exp()) + torch.outer(b[t], a[t])) @ state + torch.outer(k[t], v[t])
        torch.testing.assert_close(y[0, t, 0], state.T @ r[t])
    torch.testing.assert_close(final[0, 0], state)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_repeated_keys(backend):
    """One key, written again and again without decay: the triangular system at its worst conditioned."""
    if backend == "cpu":
        require_compiler()
    call = example("wkv7", 2, 96, 2, 32, decay=(1.0, 1.0))
    call.inputs["a"] = call.inputs["a"][:, :1].expand_as(call.inputs["a"]).contiguous()
    call.inputs["b"] = -call.inputs["a"]
    assert not too_large(errors(results(call, backend), truth(call)), "fp32")
