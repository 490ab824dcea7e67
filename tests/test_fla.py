"""The adapters of flash-linear-attention, with that package played by the reference: its argument names, its
sequences laid end to end, one state each. Its kernels need a GPU and do not run here."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from operator_calls import VARIANTS, call, check

from kernels import wkv6, wkv7
from kernels.case import Case
from kernels.examples import truth
from kernels.jit_build import BuildError
from kernels.segments import token_codes
from kernels.wkv6 import fla as fla6
from kernels.wkv6 import reference as reference6
from kernels.wkv7 import fla as fla7
from kernels.wkv7 import reference as reference7

GPU = Case("cuda", torch.bfloat16, 64)


def sequences(run, inputs, state, bounds):
    """The reference on rows, or (with bounds) on every sequence of the one row apart."""
    if bounds is None:
        return run(*inputs, state)
    assert inputs[0].shape[0] == 1 and state.shape[0] == len(bounds) - 1 and bounds.dtype == torch.int64
    parts = [
        run(*(x[:, begin:end] for x in inputs), state[i : i + 1])
        for i, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    ]
    return torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])


@pytest.fixture
def package(monkeypatch):
    """A module `fla` whose operators have the arguments and defaults of fla-core 0.6."""

    def scaled(r, scale):
        return r * (r.shape[-1] ** -0.5 if scale is None else scale)

    def chunk_rwkv7(
        r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None
    ):
        def run(r, w, k, v, a, b, state):
            return reference7.run(r, w, k, v, a, b, state, None)

        y, final = sequences(run, (scaled(r, scale), w, k, v, a, b), initial_state, cu_seqlens)
        return y, final if output_final_state else None

    def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        def run(r, k, v, w, state):
            return reference6.run(r, w, k, v, u, state, None)

        y, final = sequences(run, (scaled(r, scale), k, v, w), initial_state, cu_seqlens)
        return y, final if output_final_state else None

    def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        return chunk_rwkv6(q, k, v, g, None, scale, initial_state, output_final_state, cu_seqlens)

    operators = {"rwkv7": chunk_rwkv7, "rwkv6": chunk_rwkv6, "gla": chunk_gla}
    for name in ("fla", "fla.ops", *(f"fla.ops.{name}" for name in operators)):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for name, operator in operators.items():
        setattr(sys.modules[f"fla.ops.{name}"], f"chunk_{name}", operator)


def adapted(made):
    """What the adapter makes of an example in float64."""
    run = {"wkv7": fla7.run, "wkv6": fla6.run}[made.op]
    leaves = {name: x.clone().requires_grad_() for name, x in made.inputs.items()}
    tokens = [x for name, x in leaves.items() if name not in ("u", "state")]
    bonus = [leaves.get("u")] if made.op == "wkv6" else []
    codes = None if made.document_ids is None else token_codes(made.document_ids)
    y, state = run(*tokens, *bonus, leaves["state"], codes)
    gradients = torch.autograd.grad((y, state), list(leaves.values()), made.upstream)
    found = {"y": y.detach(), "state_out": state.detach()}
    return found | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("documents", [False, True])
def test_arguments_are_mapped(package, name, documents):
    """Scale, decay, bonus, states and documents arrive where the package expects them; padding never does."""
    made = call(VARIANTS[name], batch=5, tokens=12)
    if documents:
        rows = [
            [0] * 12,
            [0] * 5 + [1] * 7,
            [-1, 0, 0, -1, 1, -1, 2, 2, 2, 2, -1, -1],
            [-1] * 12,
            [4, 3, 2] * 4,
        ]
        made.document_ids = torch.tensor(rows, dtype=torch.int32)
    exact = truth(made)
    if documents:
        for input_name in ("r", "log_w", "k", "v"):
            made.inputs[input_name][made.document_ids < 0] = torch.nan
    check(adapted(made), exact)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_but_padding(package, name):
    """No sequence is left: the package is not called, the states pass through."""
    made = call(VARIANTS[name], batch=1, tokens=3)
    made.document_ids = torch.full((1, 3), -1, dtype=torch.int32)
    made.upstream[0].zero_()
    run = {"wkv7": fla7.run, "wkv6": fla6.run}[made.op]
    tokens = [x for n, x in made.inputs.items() if n not in ("u", "state")]
    bonus = [made.inputs.get("u")] if made.op == "wkv6" else []
    y, state = run(*tokens, *bonus, made.inputs["state"], token_codes(made.document_ids))
    assert (y == 0).all() and torch.equal(state, made.inputs["state"])


def test_refusals(package, monkeypatch):
    """Why not, in words: a CPU, a precision that it does not have, a package that is not there."""
    assert fla7.supports(GPU) is None
    assert "GPU" in fla7.supports(Case("cpu", torch.bfloat16, 64))
    assert "float32" in fla7.supports(Case("cuda", torch.float32, 64))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in fla6.supports(GPU)


def test_a_package_that_does_not_import(monkeypatch):
    """A broken installation is a build that failed: auto goes on to the next backend."""
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(BuildError, match="cannot be imported"):
        fla7.prepare(GPU)


@pytest.mark.parametrize("operator", [wkv7, wkv6], ids=["wkv7", "wkv6"])
def test_it_is_held_back(operator):
    """A peer that this project has not run: auto takes it only where it was measured to be the fastest."""
    backend = operator.TABLE["fla"]
    assert backend.native and "not run by this project" in backend.held_back
