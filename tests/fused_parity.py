"""Errors of the fused Triton kernels against their definitions in float64, as JSON; run by test_fused.py in a
process of its own, because Triton's interpreter is chosen when Triton is imported."""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from kernels import custom_ops, fused
from kernels.examples import errors

SIZES = (32, 64, 128)
LENGTHS = (1, 17)  # of two rows: a part of a program's tokens, and three programs of them at N = 64
ROWS, HEADS, GROUPS = 2, 4, 2


def prepare_inputs(tokens: int, size: int, raw: bool) -> dict[str, Tensor]:
    """Projections of all magnitudes, one key of which is zero."""
    shape = ROWS, tokens, HEADS, size
    inputs = {"decay": 3 * torch.randn(shape) - 3, "rate": 2 * torch.randn(shape)}
    inputs["key"] = torch.randn(ROWS, tokens, GROUPS if tokens > 1 else HEADS, size)
    inputs["key"][0, 0, 0] = 0.0
    if raw:
        inputs |= {"removed_scale": torch.rand(HEADS, size) + 0.5, "written_mix": torch.rand(HEADS, size)}
    return inputs


def finish_inputs(tokens: int, size: int, norm: bool, bonus: bool, gate: bool) -> dict[str, Tensor]:
    """An output, and what stands behind it."""
    shape, inner = (ROWS, tokens, HEADS, size), HEADS * size
    inputs = {"y": torch.randn(shape) + 1}
    if norm:
        inputs |= {"norm_weight": torch.rand(inner) + 0.5, "norm_bias": torch.randn(inner)}
    if bonus:
        inputs |= {name: torch.randn(shape) for name in "rkv"} | {"bonus": torch.randn(HEADS, size)}
    return inputs | ({"gate": torch.rand(ROWS, tokens, inner)} if gate else {})


def shift_inputs(tokens: int, width: int) -> dict[str, Tensor]:
    """Hidden states whose width is no multiple of a block."""
    shape = ROWS, tokens, width + 7
    return {"hidden": torch.randn(shape), "previous": torch.randn(shape), "mixes": torch.rand(6, width + 7)}


def results(part: str, inputs: dict, numbers: dict, backend: str, dtype: torch.dtype, device: str) -> list:
    """Outputs and the gradients of all inputs."""
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    made = getattr(fused, part)(**leaves, **numbers, backend=backend)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(device, dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return [x.detach() for x in (*outputs, *gradients)]


def cases(sizes=SIZES, lengths=LENGTHS) -> dict[str, tuple[str, dict, dict]]:
    """Name -> part, inputs, numbers; at head size 64 with every combination of what a part may be given."""
    torch.manual_seed(0)
    found = {}
    for size, tokens in itertools.product(sizes, lengths):
        shape = f"N={size} T={tokens}"
        for raw in (False, True):
            found[f"prepare {shape} raw={raw}"] = (
                "prepare", prepare_inputs(tokens, size, raw), {"rate_range": 1.5}
            )  # fmt: skip
        every = list(itertools.product((False, True), repeat=3))
        for norm, bonus, gate in every if size == 64 else (every[0], every[-1]):
            found[f"finish {shape} norm={norm} bonus={bonus} gate={gate}"] = (
                "finish", finish_inputs(tokens, size, norm, bonus, gate), {"norm_eps": 64e-5}
            )  # fmt: skip
        found[f"shift {shape}"] = ("shift", shift_inputs(tokens, size), {})
    return found


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative RMS error; infinite for a NaN, and for anything where zero is right."""
    named = ({str(i): x for i, x in enumerate(tensors)} for tensors in (found, exact))
    return max(errors(*named).values())


def parity(device: str = "cpu", **which) -> dict[str, float]:
    """Case -> worst error in float32; outputs start as NaN, so that nothing may be left out."""
    plain = custom_ops.allocate
    found = {}
    for name, (part, inputs, numbers) in cases(**which).items():
        exact = results(part, inputs, numbers, "reference", torch.float64, device)
        custom_ops.allocate = lambda *a: plain(*a).fill_(float("nan"))
        first = results(part, inputs, numbers, "triton", torch.float32, device)
        again = results(part, inputs, numbers, "triton", torch.float32, device)
        custom_ops.allocate = plain
        same = all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        found[name] = worst(first, exact) if same else float("inf")
    return found


def operators() -> dict[str, float]:
    """Checks of the custom operators themselves, and a compiled graph; 0 where all is well."""
    found = {}
    every = cases((64,), (5,))
    for name in [name for name in every if "finish" not in name or "bonus=True" in name]:
        part, inputs, numbers = every[name]
        torch._dynamo.reset()
        operator = getattr(fused.triton, part)
        names = [argument.name for argument in operator._opoverload._schema.arguments]
        leaves = {n: x.requires_grad_() for n, x in inputs.items()}
        torch.library.opcheck(operator, tuple((leaves | numbers).get(n) for n in names))
        compiled = torch.compile(
            lambda part=part, numbers=numbers, **x: getattr(fused, part)(**x, **numbers, backend="triton"),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        made, plain = compiled(**leaves), getattr(fused, part)(**leaves, **numbers, backend="triton")
        pairs = [(made, plain)] if isinstance(made, Tensor) else list(zip(made, plain, strict=True))
        found[f"operator {name}"] = float(not all(torch.equal(x, y) for x, y in pairs))
    return found


def narrow() -> float:
    """Worst error of `prepare` for a key in bfloat16, which takes part in float32, and gets its gradient in
    bfloat16."""
    inputs = prepare_inputs(17, 64, True)
    key = inputs.pop("key").bfloat16()
    wide, given = key.double().requires_grad_(), key.clone().requires_grad_()
    doubles = {name: x.double() for name, x in inputs.items()}
    exact = fused.prepare(key=wide, **doubles)
    found = fused.prepare(key=given, **inputs, backend="triton")
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in found), given)
    (expected,) = torch.autograd.grad(sum(x.sum() for x in exact), wide)
    rounding = float((gradient.double() - expected).norm() / expected.norm())
    return worst([x.detach() for x in found], [x.detach() for x in exact]) if rounding < 4e-3 else rounding


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({"parity": parity(), "operators": operators(), "narrow": narrow()}))
