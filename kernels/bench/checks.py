"""Holds a backend against the definition in float64: what is wrong gets no speed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import custom_ops
from kernels.bench.calls import BOTH, FORWARD, Contestant, Shape, run_pass
from kernels.examples import Example, errors, example, too_large, truth
from kernels.segments import token_codes

RIGHT, WRONG, UNABLE, UNBUILT, MEMORY = "right", "WRONG", "unavailable", "not built", "out of memory"
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
SMALL_TOKENS = 67  # of the call that every backend is checked on: some whole chunks and a piece
# Heads times tokens up to which float64 on the whole call takes no more than seconds.
EXACT_UP_TO = 2**13


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        check: RIGHT, WRONG, UNABLE, UNBUILT or MEMORY.
        error: the worst relative RMS error, None where nothing was computed.
        reason: why it is not right.
    """

    check: str
    error: float | None = None
    reason: str | None = None


def obstacle(contestant: Contestant) -> Verdict | None:
    """UNABLE or UNBUILT where a contestant cannot run at all, else None."""
    if contestant.obstacle is None:
        return None
    return Verdict(UNBUILT if contestant.unbuilt else UNABLE, reason=contestant.obstacle)


def tolerance_of(contestant: Contestant, dtype: torch.dtype) -> str:
    """The key of kernels.examples.TOLERANCES: in float32, peers may round products to TF32, ours may not."""
    if dtype.itemsize < 4:
        return "16-bit"
    return "tf32" if contestant.peer else "fp32"


def judge(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: str) -> Verdict:
    """RIGHT, or WRONG with the results that are off."""
    relative = errors(found, exact)
    wrong = too_large(relative, tolerance)
    if not wrong:
        return Verdict(RIGHT, max(relative.values()))
    shown = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
    return Verdict(WRONG, max(relative.values()), f"relative errors too large: {shown}")


def arguments(
    call: Example, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """An example's inputs, requiring gradients, and upstream gradients, as a backend takes them."""
    wide = ("log_w", "state", "u")
    inputs = {
        name: x.to(device, torch.float32 if name in wide else dtype).requires_grad_()
        for name, x in call.inputs.items()
    }
    return inputs, (call.upstream[0].to(device, dtype), call.upstream[1].to(device, torch.float32))


def compute(contestant: Contestant, call: Example, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Every result and gradient of an example on a device; outputs that a backend leaves out are NaN."""
    inputs, upstream = arguments(call, dtype, device)
    ids = None if call.document_ids is None else call.document_ids.to(device)
    with poisoned():
        return {n: x.cpu() for n, x in run_pass(BOTH, contestant, inputs, upstream, ids).items()}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, the memory handed to backends for their outputs is full of NaN."""
    allocate = custom_ops.allocate

    def filled(shape, dtype, device) -> Tensor:
        return allocate(shape, dtype, device).fill_(math.nan)

    custom_ops.allocate = filled
    try:
        yield
    finally:
        custom_ops.allocate = allocate


def steps(contestant: Contestant, call: Example, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """y and the final state of an example, computed by one decoding step after the other."""
    inputs, _ = arguments(call, dtype, device)
    inputs = {name: x.detach() for name, x in inputs.items()}
    state, outputs = inputs.pop("state").clone(), []
    codes = None if call.document_ids is None else token_codes(call.document_ids).to(device)
    with poisoned():
        for t in range(call.inputs["r"].shape[1]):
            token = {name: x if name == "u" else x[:, t].contiguous() for name, x in inputs.items()}
            now = None if codes is None else codes[:, t].contiguous()
            outputs.append(contestant.step(**token, state=state, codes=now))
    return {"y": torch.stack(outputs, dim=1).cpu(), "state_out": state.cpu()}


def guarded(function, *arguments) -> Verdict:
    """A verdict also where a contestant raises: somebody else's kernel may do so in any way."""
    try:
        return function(*arguments)
    except OUT_OF_MEMORY:
        return Verdict(MEMORY, reason="out of memory")
    except Exception as error:
        return Verdict(WRONG, reason=f"{type(error).__name__}: {str(error)[:400]}")


def check_small(
    op: str, contestant: Contestant, size: int, dtype: torch.dtype, device: str, tolerance: str | None = None
) -> Verdict:
    """Forward, every gradient and decoding steps of small calls, with a first state, documents and padding
    (not for peers, which need not know them), for wkv6 with its bonus too.

    Args:
        op: operator name.
        contestant: without an obstacle.
        size: N.
        dtype: of r, k, v, a, b.
        device: to run on.
        tolerance: instead of what `tolerance_of` says.
    """
    tolerance = tolerance or tolerance_of(contestant, dtype)
    worst = 0.0
    for bonus in (False, True) if op == "wkv6" else (False,):
        options = {"bonus": bonus, "documents": not contestant.peer, "rounded": dtype}
        call = example(op, 2, SMALL_TOKENS, 2, size, **options)
        verdict = judge(compute(contestant, call, dtype, device), truth(call), tolerance)
        if verdict.check == RIGHT and contestant.step is not None:
            call = example(op, 2, 6, 2, size, **options)
            verdict = judge(steps(contestant, call, dtype, device), truth(call, False), tolerance)
        if verdict.check != RIGHT:
            return verdict
        worst = max(worst, verdict.error)
    return Verdict(RIGHT, worst)


def check_whole(
    op: str,
    contestant: Contestant,
    shape: Shape,
    inputs: dict[str, Tensor],
    upstream: tuple[Tensor, Tensor],
    known: dict[str, dict[str, Tensor]],
    tolerance: str | None = None,
) -> Verdict:
    """The very call that is going to be timed: finite, and right.

    Args:
        op, contestant, shape: whose call.
        inputs, upstream: the call.
        known: what is right, by who says so; empty at first and filled here: float64 where that is fast, else
            the first contestant that is right in itself.
        tolerance: instead of what `tolerance_of` says.
    """
    tolerance = tolerance or tolerance_of(contestant, inputs["r"].dtype)
    if not known and shape.units * shape.sequence_length <= EXACT_UP_TO:
        call = Example(op, {n: x.detach().cpu().double() for n, x in inputs.items()}, tuple(upstream))
        call.upstream = tuple(x.cpu().double() for x in upstream)
        known["float64"] = {name: x.to(inputs["r"].device) for name, x in truth(call).items()}
    found = run_pass(BOTH, contestant, inputs, upstream)
    broken = [name for name, x in found.items() if not x.isfinite().all()]
    if broken:
        return Verdict(WRONG, math.inf, f"not finite at the full shape: {', '.join(broken)}")
    if not known:
        if not contestant.peer:
            known[contestant.name] = found
        return Verdict(RIGHT)
    (name, exact), *_ = known.items()
    verdict = judge(found, exact, tolerance)
    if verdict.check == RIGHT:
        forward = judge(run_pass(FORWARD, contestant, inputs, upstream), exact, tolerance)
        verdict = verdict if forward.check == RIGHT else forward
    reason = verdict.reason and f"{verdict.reason}, against {name} at the full shape"
    return Verdict(verdict.check, verdict.error, reason)
