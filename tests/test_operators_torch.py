"""The operators as torch sees them: custom operators, compiled graphs, activation checkpointing."""

import importlib
from functools import partial

import pytest
import torch
from operator_calls import OPERATORS, VARIANTS, apply, call, check, usable
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import custom_ops
from kernels.examples import INPUTS, Example, truth


@pytest.fixture(params=VARIANTS)
def variant(request) -> tuple[str, bool]:
    """An operator, and whether it has its bonus."""
    return VARIANTS[request.param]


def cpu_operators(op: str) -> custom_ops.Operators:
    """The custom operators of the C++ backend."""
    usable("cpu")
    return importlib.import_module(f"kernels.{op}.cpu").OPERATORS


def plain(made: Example) -> list[Tensor | None]:
    """An example's arguments as a custom operator takes them, without codes."""
    tensors = [made.inputs[name].float() for name in INPUTS[made.op]]
    return [*tensors, *([made.inputs.get("u")] if made.op == "wkv6" else []), made.inputs["state"].float()]


@pytest.mark.parametrize("with_codes", [False, True])
def test_custom_operators(variant, with_codes):
    """Schema, fake and autograd registrations of all three operators hold."""
    made = call(variant, batch=1, tokens=9)
    operators, tensors = cpu_operators(made.op), [x if x is None else x.float() for x in plain(made)]
    codes = torch.tensor([[0, 0, 1, 2, 0, 1, 0, 2, 0]], dtype=torch.int8) if with_codes else None
    *_, saved = operators.forward(*tensors, codes, True)
    leaves = [x if x is None else x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(operators.forward, (*leaves, codes, True))
    torch.library.opcheck(operators.forward, (*tensors, codes, False))
    upstream = [x.float() for x in made.upstream]
    torch.library.opcheck(operators.backward, (*upstream, *tensors, codes, saved))
    if operators.step is not None:
        one = [x if x is None or x.dim() == 2 else x[:, 0].contiguous() for x in tensors[:-1]]
        inputs = (*one, tensors[-1].clone(), None if codes is None else codes[:, 0].contiguous())
        torch.library.opcheck(operators.step, inputs)


def test_nothing_is_kept_without_gradients(variant):
    """What the backward pass needs is made only where one can follow."""
    made = call(variant, tokens=9)
    operators = cpu_operators(made.op)
    tensors = [x if x is None else x.float() for x in plain(made)]
    outputs = [operators.forward(*tensors, None, keep) for keep in (False, True)]
    assert outputs[0][2].numel() == 0
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_compiles_without_graph_breaks(variant, backend):
    """torch.compile sees one plain operator, documents and gradients included."""
    usable(backend)
    made = call(variant, tokens=9)
    made.document_ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2], dtype=torch.int32)
    operator = torch.compile(
        partial(OPERATORS[made.op], backend=backend), fullgraph=True, backend="aot_eager"
    )
    leaves = {name: x.float().requires_grad_() for name, x in made.inputs.items()}
    y, state = operator(**leaves, document_ids=made.document_ids)
    gradients = torch.autograd.grad((y, state), list(leaves.values()), [x.float() for x in made.upstream])
    names = ("y", "state_out", *(f"d{name}" for name in leaves))
    check(dict(zip(names, (y.detach(), state.detach(), *gradients), strict=True)), truth(made))


def test_selective_activation_checkpointing(variant):
    """A policy can keep the operator's outputs: it then runs once, and with plain checkpointing twice."""
    made, ran = call(variant, tokens=9), []
    operator = getattr(torch.ops.transmute, f"{made.op}_cpu").default
    cpu_operators(made.op)
    leaves = {name: x.float().requires_grad_() for name, x in made.inputs.items()}

    def policy(_, function, *args, **kwargs) -> CheckpointPolicy:
        if function is operator:
            ran.append(function)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def block(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, state = apply(made, "cpu", **inputs)
        return y.sin(), state

    contexts = partial(create_selective_checkpoint_contexts, policy)
    found = checkpoint(block, **leaves, use_reentrant=False, context_fn=contexts)
    gradients = torch.autograd.grad(found[0].sum(), list(leaves.values()), allow_unused=True)
    plainly = torch.autograd.grad(block(**leaves)[0].sum(), list(leaves.values()), allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plainly, strict=True))
    assert ran, "the policy must meet the operator by its name"
