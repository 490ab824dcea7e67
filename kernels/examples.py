"""Example calls of the operators, and how far a backend's results are from float64: for self-checks,
benchmarks and tests."""

import importlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

INPUTS = {"wkv7": ("r", "log_w", "k", "v", "a", "b"), "wkv6": ("r", "log_w", "k", "v")}
# Relative RMS errors allowed against float64; the second one for the log decay's gradient, which telescopes.
TOLERANCES = {"fp32": (2e-6, 5e-5), "tf32": (2e-3, 2e-3), "16-bit": (8e-3, 2e-2)}


@dataclass
class Example:
    """Arguments of one call, and the gradients to send back.

    Attributes:
        op: operator name.
        inputs: by name, `state` and for wkv6 with a bonus `u` among them; float64, exact in float32.
        upstream: gradients of y and of the final state, likewise.
        document_ids: [B,T] int32 or None.
    """

    op: str
    inputs: dict[str, Tensor]
    upstream: tuple[Tensor, Tensor]
    document_ids: Tensor | None = None

    def to(self, device: str | torch.device) -> "Example":
        """The same call on another device."""
        ids = None if self.document_ids is None else self.document_ids.to(device)
        moved = {name: x.to(device) for name, x in self.inputs.items()}
        return Example(self.op, moved, (self.upstream[0].to(device), self.upstream[1].to(device)), ids)


def example(
    op: str,
    batch: int,
    tokens: int,
    heads: int,
    size: int,
    *,
    seed: int = 0,
    decay: tuple[float, float] = (0.545, 1.0),
    bonus: bool = False,
    documents: bool = False,
    state: bool = True,
    rounded: torch.dtype = torch.float32,
) -> Example:
    """A call as a mixer makes it: unit removed keys, small written keys, decays uniform in `decay`.

    Args:
        op: operator name.
        batch, tokens, heads, size: B, T, H, N.
        seed: of the values.
        decay: the range of the decay.
        bonus: wkv6 with u.
        documents: several documents in a row, with padding before, between and behind them.
        state: a first state other than zero.
        rounded: the values are exact in this dtype (the state always in float32).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    shape = (batch, tokens, heads, size)
    w = decay[0] + (decay[1] - decay[0]) * torch.rand(shape, generator=generator).double()
    inputs = {"r": normal(*shape), "log_w": w.log(), "k": normal(*shape) * size**-0.5, "v": normal(*shape)}
    if op == "wkv7":
        unit = torch.nn.functional.normalize(normal(*shape), dim=-1)
        rate = torch.rand(shape, generator=generator).double()
        inputs |= {"a": -unit, "b": unit * rate}
    inputs = {
        name: x.to(torch.float32 if name == "log_w" else rounded).double() for name, x in inputs.items()
    }
    if bonus:
        inputs["u"] = normal(heads, size).float().double()
    inputs["state"] = (0.3 * state * normal(batch, heads, size, size)).float().double()
    upstream = normal(*shape).to(rounded).double(), normal(batch, heads, size, size).float().double()
    ids = _document_ids(batch, tokens, generator) if documents else None
    return Example(op, inputs, upstream, ids)


def _document_ids(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """[B,T] int32: documents of random lengths; in every second row one token in eight is padding."""
    starts = torch.rand(batch, tokens, generator=generator) < 4 / max(tokens, 8)
    ids = starts.int().cumsum(1, dtype=torch.int32)
    padding = (torch.rand(batch, tokens, generator=generator) < 1 / 8) & (torch.arange(batch) % 2 == 1)[
        :, None
    ]
    return ids.masked_fill(padding, -1)


def results(
    call: Example, backend: str, dtype: torch.dtype = torch.float32, backward: bool = True
) -> dict[str, Tensor]:
    """What a backend makes of a call: y, the final state and the gradient of every input, by name.

    Args:
        call: the call.
        backend: a backend's name, or "auto".
        dtype: that r, k, v, a, b and dy are given in; the others are float32 (float64 if that is it).
        backward: also the gradients.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = {name: wide if name in ("log_w", "state", "u") else dtype for name in call.inputs}
    leaves = {name: x.detach().to(kinds[name]).requires_grad_(backward) for name, x in call.inputs.items()}
    operator = getattr(importlib.import_module(f"kernels.{call.op}"), call.op)
    y, state = operator(**leaves, document_ids=call.document_ids, backend=backend)
    found = {"y": y.detach(), "state_out": state.detach()}
    if backward:
        upstream = call.upstream[0].to(dtype), call.upstream[1].to(wide)
        gradients = torch.autograd.grad((y, state), list(leaves.values()), upstream)
        found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found


def truth(call: Example, backward: bool = True) -> dict[str, Tensor]:
    """The definition, token by token in float64."""
    return results(call, "reference", torch.float64, backward)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS error of each result; infinite for a NaN, and for anything where zero is right."""
    worst = {}
    for name, x in found.items():
        expected = exact[name].double()
        difference, size = (x.double() - expected).norm().item(), expected.norm().item()
        relative = difference / size if size else (0.0 if difference == 0 else math.inf)
        worst[name] = math.inf if math.isnan(relative) else relative
    return worst


def too_large(found: dict[str, float], tolerance: str) -> dict[str, float]:
    """Those errors that a tolerance of TOLERANCES does not allow."""
    most, most_decay = TOLERANCES[tolerance]
    return {name: e for name, e in found.items() if e > (most_decay if name == "dlog_w" else most)}
