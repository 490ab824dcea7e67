"""WKV-6 in Triton (triton_kernels.py): chunks as matrix products on tensor cores, all chunks at once but for
a multiplication and an addition of the state in each.

Not measured on any GPU yet. On the CPU it runs in Triton's interpreter alone, which is for tests.

The forward pass keeps nothing for the backward pass. Beside its outputs, a pass takes scratch memory for the
state before each chunk, the backward pass also for the gradient of the state behind it: N / C numbers of 4
bytes per input number for each. It goes through as many (row, head) units at once as SCRATCH bytes let, at
least one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import custom_ops, self_check, triton_support
from kernels.case import Case
from kernels.custom_ops import register, wants_gradient
from kernels.triton_support import Precision, architecture, precision
from kernels.wkv6.signature import SIGNATURE

__all__ = ["HELD_BACK", "OPERATORS", "launch", "prepare", "run", "step", "supports"]

HELD_BACK = (
    "a tensor-core kernel that has not been measured on a GPU yet; name it, or measure it with "
    "benchmark.py suite=kernels suite.remember=true"
)
SCRATCH = 1 << 30
supports = triton_support.unusable


class Launch(NamedTuple):
    """How the kernels of a head size and precision are launched.

    Attributes:
        chunk: tokens of a chunk.
        block: key channels at a time.
        warps: of the kernels that run over chunks.
    """

    chunk: int
    block: int
    warps: int


# (head size, exact products): chosen by what the compiler reports (registers, shared memory), not by a clock.
LAUNCHES = {
    (32, False): Launch(64, 16, 4),
    (64, False): Launch(64, 16, 4),
    (128, False): Launch(64, 16, 8),
    (32, True): Launch(32, 16, 8),
    (64, True): Launch(32, 16, 8),
    (128, True): Launch(32, 16, 8),
}
SCAN_BLOCK, SCAN_WARPS = 16, 4
DECODE_BLOCK, DECODE_WARPS = 32, 4


def launch(size: int, how: Precision) -> Launch:
    """The launch for a head size and a precision."""
    return LAUNCHES[size, how.products != "bf16"]


def prepare(case: Case) -> None:
    """Compiles the kernels and checks them where they are to run; raises jit_build.BuildError if wrong."""
    how = precision(case.dtype, architecture(torch.device(case.device_type)))
    self_check.verify("wkv6", "triton", run, case, how.tolerance, native=True)


def _kernels():
    """The kernels; imported late, because Triton is optional."""
    from kernels.wkv6 import triton_kernels

    return triton_kernels


def _scan():
    """The scan over chunks, which the two operators share."""
    from kernels.wkv7.triton_forward import scan

    return scan


def constants(heads: int, size: int, how: Precision) -> dict:
    """Of the kernels that run over chunks; LEVELS, LOWEST and BONUS not all of them take."""
    shape = launch(size, how)
    return {
        "HEADS": heads, "N": size, "C": shape.chunk, "BLOCK": shape.block,
        "PRODUCTS": how.products, "PARTS": how.parts, "num_warps": shape.warps, "num_stages": 1,
    }  # fmt: skip


def pair_constants(size: int, how: Precision) -> dict:
    """Of the kernels that make pairs. LOWEST: e^20 is known to 2e-6 in float32; 41 is 8 decays of e^-5."""
    lowest = -20.0 if how.tolerance == "fp32" else -41.0
    return {"LEVELS": launch(size, how).chunk.bit_length() - 1, "LOWEST": lowest}


def scan_constants(size: int, how: Precision, reverse: bool) -> dict:
    """Of the scan over chunks."""
    return {
        "N": size, "BLOCK": SCAN_BLOCK, "REVERSE": reverse, "PRECISION": how.sensitive,
        "num_warps": SCAN_WARPS, "num_stages": 2,
    }  # fmt: skip


def decode_constants(heads: int, size: int) -> dict:
    """Of the decoding step."""
    return {
        "HEADS": heads, "N": size, "BLOCK": DECODE_BLOCK, "num_warps": DECODE_WARPS, "num_stages": 1,
    }  # fmt: skip


class _Plan:
    """The launches of one call: sizes, constants and scratch.

    Args:
        like: r [B,T,H,N].
    """

    def __init__(self, like: Tensor):
        batch, self.tokens, heads, self.size = like.shape
        self.device, self.units = like.device, batch * heads
        self.how = precision(like.dtype, architecture(like.device))
        self.chunks = -(-self.tokens // launch(self.size, self.how).chunk)
        self.constants = constants(heads, self.size, self.how)
        self.pairs = self.constants | pair_constants(self.size, self.how)

    def groups(self, matrices: int) -> Iterator[tuple[int, int]]:
        """(first unit, units) of each round, as many units as SCRATCH lets with so many [N,N] per chunk."""
        most = max(1, SCRATCH // (4 * matrices * self.chunks * self.size**2))
        for first in range(0, self.units, most):
            yield first, min(most, self.units - first)

    def scratch(self, units: int, *shape: int) -> Tensor:
        """[units, chunks, ...] in float32."""
        return custom_ops.allocate((units, self.chunks, *shape), torch.float32, self.device)

    def key_grid(self, units: int) -> tuple[int]:
        """Programs of the kernel that takes key channels apart."""
        return (units * self.chunks * (self.size // self.constants["BLOCK"]),)

    def scan(self, begin: Tensor, end: Tensor | None, added: Tensor, keep: Tensor, first: int, reverse: bool):
        """Turns what chunks add into what they meet."""
        blocks = (len(added), self.size // SCAN_BLOCK)
        _scan()[blocks](
            begin, end, added, keep, None, self.chunks, first, **scan_constants(self.size, self.how, reverse)
        )


def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None,
    y: Tensor, state_out: Tensor, _: None,
) -> None:  # fmt: skip
    """Inputs and outputs in the order of the signature."""
    kernels, plan = _kernels(), _Plan(r)
    size = plan.size
    with torch.cuda.device_of(r):
        for first, units in plan.groups(1):
            states, keep = plan.scratch(units, size, size), plan.scratch(units, size)
            grid, where = (units * plan.chunks,), (plan.tokens, plan.chunks, first)
            kernels.add_up[grid](
                r, log_w, k, v, codes, None, states, None, keep, *where,
                BONUS=u is not None, **plan.constants,
            )  # fmt: skip
            plan.scan(state, state_out, states, keep, first, False)
            kernels.read_out[grid](r, log_w, k, v, u, codes, states, y, *where, **plan.pairs)


def _backward(
    dy: Tensor, dstate_out: Tensor,
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None,
    dr: Tensor, dlog_w: Tensor, dk: Tensor, dv: Tensor, du: Tensor | None, dstate: Tensor,
) -> None:  # fmt: skip
    """The gradients of the outputs, inputs, and the gradients, in the order of the signature."""
    kernels, plan = _kernels(), _Plan(r)
    size = plan.size
    parts = None if u is None else plan.scratch(plan.units, size)
    with torch.cuda.device_of(r):
        for first, units in plan.groups(2):
            states, dstates = plan.scratch(units, size, size), plan.scratch(units, size, size)
            keep = plan.scratch(units, size)
            grid, where = (units * plan.chunks,), (plan.tokens, plan.chunks, first)
            kernels.add_up[grid](
                r, log_w, k, v, codes, dy, states, dstates, keep, *where,
                BONUS=u is not None, **plan.constants,
            )  # fmt: skip
            plan.scan(state, None, states, keep, first, False)
            plan.scan(dstate_out, dstate, dstates, keep, first, True)
            kernels.value_gradients[grid](r, log_w, k, u, codes, dy, dstates, dv, *where, **plan.pairs)
            kernels.key_gradients[plan.key_grid(units)](
                r, log_w, k, v, u, codes, dy, states, dstates, dr, dlog_w, dk, parts, *where, **plan.pairs
            )
    if parts is not None:
        torch.sum(parts.unflatten(0, (-1, *u.shape[:1])), dim=(0, 2), out=du)


def _step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None,
    y: Tensor,
) -> None:  # fmt: skip
    """Inputs and the output in the order of the signature."""
    batch, heads, size = r.shape
    with torch.cuda.device_of(r):
        _kernels().decode[batch * heads, size // DECODE_BLOCK](
            r, log_w, k, v, u, state, codes, y, **decode_constants(heads, size)
        )


OPERATORS = register("wkv6", "triton", ["cpu", "cuda"], SIGNATURE, _forward, _backward, _step)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Triton WKV-6; arguments and results as in kernels/wkv6/reference.py.

    r, k and v may be of 16 bits (all alike), and y then is; log_w, u and the states are float32.
    """
    tensors = (r, log_w, k, v, u, state, codes)
    y, state_out, _ = OPERATORS.forward(*tensors, wants_gradient(tensors))
    return y, state_out


def step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> Tensor:
    """One token in Triton; arguments and result as in kernels/wkv6/reference.py, dtypes as in `run`."""
    return OPERATORS.take_step(r, log_w, k, v, u, state, codes)
