"""What is measured: the shape of a call, its inputs on the device, and who computes it."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels import dispatch
from kernels.case import MANY_UNITS, Case, unsupported
from kernels.examples import INPUTS
from kernels.jit_build import BuildError

FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
PASSES = (FORWARD, BOTH, STEP)
FLA = "fla"  # the backend that is not ours, but flash-linear-attention's


@dataclass(frozen=True)
class Shape:
    """B, T, H, N of a call."""

    batch_size: int
    sequence_length: int
    heads: int
    head_size: int

    def __str__(self) -> str:
        return f"B{self.batch_size} T{self.sequence_length} H{self.heads} N{self.head_size}"

    @property
    def units(self) -> int:
        """Rows times heads."""
        return self.batch_size * self.heads

    @property
    def elements(self) -> int:
        """Of one input [B,T,H,N]."""
        return self.units * self.sequence_length * self.head_size

    def case(self, device: str, dtype: torch.dtype) -> Case:
        """The kind of call, as the choice of a backend sees it."""
        return Case(torch.device(device).type, dtype, self.head_size, self.units >= MANY_UNITS)


@dataclass(frozen=True)
class Contestant:
    """One implementation of an operator.

    Attributes:
        name: of the backend or the peer.
        run: (the operator's inputs by name, document_ids=None) -> (y, final state).
        step: (one token's inputs by name, state) -> y, the state changed in place; None where there is none.
        obstacle: why it cannot run here, else None.
        unbuilt: whether the obstacle is that it could run, but its build or its self-check failed.
        peer: somebody else's code, measured for comparison.
    """

    name: str
    run: Callable[..., tuple[Tensor, Tensor]] | None
    step: Callable[..., Tensor] | None = None
    obstacle: str | None = None
    unbuilt: bool = False
    peer: bool = False


def contestants(
    op: str, case: Case, names: Sequence[str] | None = None, peers: Mapping[str, str] | None = None
) -> list[Contestant]:
    """The backends of an operator, built and checked as their own first use does it, and the peers.

    Args:
        op: operator name.
        case: what they shall run.
        names: of the backends; None for all. Those that no operator has are an error; one that this operator
            lacks is left out.
        peers: name -> package.module.function, taken as WKV-7: (r, log_w, k, v, a, b, state) -> (y, state).

    Raises:
        ValueError: a backend that no operator has.
    """
    known = {backend.name for each in dispatch.RECURRENCES for backend in dispatch.backends(each)}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"backend {unknown[0]!r} is unknown; choose from {', '.join(sorted(known))}")
    module = importlib.import_module(f"kernels.{op}")
    found = []
    for backend in dispatch.backends(op):
        if names is None or backend.name in names:
            run = partial(getattr(module, op), backend=backend.name)
            step = partial(getattr(module, f"{op}_step"), backend=backend.name) if backend.step else None
            found.append(Contestant(backend.name, run, step, *unable(op, backend, case), backend.name == FLA))
    return found + [_peer(*entry) for entry in (peers or {}).items() if op == "wkv7"]


def unable(op: str, backend: dispatch.Backend, case: Case) -> tuple[str | None, bool]:
    """Why a backend of an operator cannot run a case, and whether that is for want of a right build."""
    sizes = importlib.import_module(f"kernels.{op}").HEAD_SIZES
    reason = unsupported(case, sizes) or backend.supports(case)
    if reason is None and backend.prepare is not None:
        try:
            backend.prepare(case)
        except BuildError as error:
            return str(error), True
        except Exception as error:  # a kernel that a driver or a compiler trips over may raise anything
            return f"{type(error).__name__}: {str(error)[:400]}", True
    return reason, False


def _peer(name: str, target: str) -> Contestant:
    """A function somewhere in an installed package, under the signature of a backend."""
    path, _, attribute = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        return Contestant(name, None, None, f"{target} cannot be imported: {error}", peer=True)

    def run(*, state: Tensor, document_ids: None = None, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        return function(*(inputs[key] for key in INPUTS["wkv7"]), state)

    return Contestant(name, run, peer=True)


def make_call(
    op: str, shape: Shape, dtype: torch.dtype, device: str, seed: int
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """RWKV-7-like inputs made on the device itself, and the gradients to send back.

    Returns:
        The inputs by name, `state` the last, requiring gradients; gradients of y and of the final state.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    size = (shape.batch_size, shape.sequence_length, shape.heads, shape.head_size)
    square = (shape.batch_size, shape.heads, shape.head_size, shape.head_size)
    inputs = {"r": normal(*size).to(dtype), "log_w": normal(*size).sigmoid_().mul_(-math.exp(-0.5))}
    inputs |= {"k": normal(*size).mul_(shape.head_size**-0.5).to(dtype), "v": normal(*size).to(dtype)}
    if op == "wkv7":
        unit = torch.nn.functional.normalize(normal(*size), dim=-1)
        inputs |= {"a": (-unit).to(dtype), "b": unit.mul_(normal(*size).sigmoid_()).to(dtype)}
    inputs["state"] = normal(*square)
    upstream = normal(*size).to(dtype), normal(*square)
    return {name: x.requires_grad_() for name, x in inputs.items()}, upstream


def run_pass(
    what: str,
    contestant: Contestant,
    inputs: dict[str, Tensor],
    upstream: Sequence[Tensor],
    document_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """FORWARD (without keeping anything) or BOTH: y, the final state and, if computed, every gradient."""
    with torch.set_grad_enabled(what == BOTH):
        y, state = contestant.run(**inputs, document_ids=document_ids)
    found = {"y": y.detach(), "state_out": state.detach()}
    if what == BOTH:
        gradients = torch.autograd.grad((y, state), list(inputs.values()), upstream)
        found |= {f"d{name}": x for name, x in zip(inputs, gradients, strict=True)}
    return found


def first_token(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments of a decoding step: one token's inputs [B,H,N], and a state of its own."""
    token = {
        name: x.detach() if name == "u" else x.detach()[:, 0].contiguous()
        for name, x in inputs.items()
        if name != "state"
    }
    return token, inputs["state"].detach().clone()
