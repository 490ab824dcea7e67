"""WKV-7 in Triton: chunks as matrix products on tensor cores, all chunks at once but for one product of the
state in each. The kernels are in triton_forward.py and triton_backward.py, their notation in triton_chunk.py.

Not measured on any GPU yet. On the CPU it runs in Triton's interpreter alone, which is for tests.

Beside its outputs a pass takes scratch memory for as many (row, head) units as it runs at once, N / C numbers
(C tokens in a chunk) or more for each number of an input; no more than SCRATCH bytes, unless one unit alone
needs more. For 16-bit inputs and N = C = 64 that is 10 bytes for each number of an input in the forward pass,
and 14 in the backward pass.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import custom_ops, self_check, triton_support
from kernels.case import Case
from kernels.custom_ops import register, wants_gradient
from kernels.triton_support import Precision, architecture, precision
from kernels.wkv7.signature import SIGNATURE

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
        keys, values: columns of keys and of values that a program of the parallel kernels works on at once.
        scan_block: values of a program of the scan.
        warps: of the parallel kernels.
        scan_warps: of the scan.
    """

    chunk: int
    keys: int
    values: int
    scan_block: int
    warps: int
    scan_warps: int


# By head size and kind, as `launch` says: chosen by what the compiler reports (registers, spills, shared
# memory), not by a clock.
LAUNCHES = {
    (32, "large"): Launch(64, 32, 32, 16, 4, 4),
    (64, "large"): Launch(64, 32, 64, 16, 4, 4),
    (128, "large"): Launch(64, 32, 32, 16, 8, 4),
    (32, "small"): Launch(32, 32, 32, 16, 2, 4),
    (64, "small"): Launch(32, 32, 32, 16, 2, 8),
    (128, "small"): Launch(32, 32, 32, 16, 4, 8),
    (32, "rdna"): Launch(32, 32, 32, 16, 4, 4),
    (64, "rdna"): Launch(32, 32, 32, 16, 4, 8),
    (128, "rdna"): Launch(32, 32, 32, 16, 4, 8),
    (32, "exact"): Launch(16, 32, 32, 16, 4, 4),
    (64, "exact"): Launch(16, 32, 32, 16, 4, 8),
    (128, "exact"): Launch(16, 32, 32, 16, 8, 8),
}
# Matrix units that read a factor from shared memory, or that have 512 registers a thread beside them.
LARGE = ("sm_9", "sm_10", "gfx9")
RDNA = ("gfx10", "gfx11", "gfx12")


def launch(size: int, how: Precision, device: str) -> Launch:
    """The launch for a head size, a precision and a device as triton_support.architecture names it."""
    kind = "large" if device.startswith(LARGE) else "rdna" if device.startswith(RDNA) else "small"
    if how.products != "bf16":
        kind = "exact" if how.products == "ieee" else "small"
    return LAUNCHES[size, kind]


def prepare(case: Case) -> None:
    """Compiles the kernels and checks them where they are to run; raises jit_build.BuildError if wrong."""
    how = precision(case.dtype, architecture(torch.device(case.device_type)))
    self_check.verify("wkv7", "triton", run, case, how.tolerance, native=True)


class Plan:
    """The launches of one call: sizes, constants of the kernels, and scratch tensors.

    Args:
        shape: (B, T, H, N).
        how: the precision.
        launch: of the head size.
        device: where the scratch is made.
    """

    def __init__(self, shape: Sequence[int], how: Precision, launch: Launch, device: torch.device):
        batch, self.tokens, self.heads, self.size = shape
        self.how, self.launch, self.device = how, launch, device
        self.chunks = -(-self.tokens // launch.chunk)
        self.units = batch * self.heads

    def groups(self, kept: int, exact: int) -> Iterator[tuple[int, int]]:
        """(first unit, units) of each launch, as many units as SCRATCH lets.

        Args:
            kept, exact: numbers per token that lie in the precision's dtype, and in float32.
        """
        padded = self.chunks * self.launch.chunk
        unit = padded * (kept * self.how.kept.itemsize + 4 * exact)
        most = max(1, SCRATCH // unit)
        for first in range(0, self.units, most):
            yield first, min(most, self.units - first)

    def kept(self, units: int, *shape: int) -> Tensor:
        """Scratch [units, chunks, ...] of factors."""
        return custom_ops.allocate((units, self.chunks, *shape), self.how.kept, self.device)

    def exact(self, units: int, *shape: int) -> Tensor:
        """Scratch [units, chunks, ...] in float32."""
        return custom_ops.allocate((units, self.chunks, *shape), torch.float32, self.device)

    def constants(self, sensitive: bool) -> dict:
        """Of the kernels that run over chunks."""
        chosen = {"SENSITIVE": self.how.sensitive} if sensitive else {}
        return chosen | {
            "HEADS": self.heads,
            "N": self.size,
            "C": self.launch.chunk,
            "KEYS": self.launch.keys,
            "VALUES": self.launch.values,
            "LEVELS": self.launch.chunk.bit_length() - 1,
            "PRODUCTS": self.how.products,
            "PARTS": self.how.parts,
            "num_warps": self.launch.warps,
            "num_stages": 1,
        }

    def scan_constants(self, reverse: bool) -> dict:
        """Of the scan over chunks."""
        return {
            "N": self.size,
            "BLOCK": self.launch.scan_block,
            "REVERSE": reverse,
            "PRECISION": self.how.sensitive,
            "num_warps": self.launch.scan_warps,
            "num_stages": 2,
        }


def _plan(r: Tensor) -> Plan:
    """For inputs like r [B,T,H,N]."""
    device = architecture(r.device)
    how = precision(r.dtype, device)
    return Plan(r.shape, how, launch(r.shape[3], how, device), r.device)


def decode_constants(heads: int, size: int) -> dict:
    """Of the decoding kernel."""
    return {"HEADS": heads, "N": size, "BLOCK": 32, "num_warps": 4}


def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None,
    y: Tensor, state_out: Tensor, sa: Tensor | None,
) -> None:  # fmt: skip
    """Inputs and outputs in the order of the signature."""
    from kernels.wkv7 import triton_forward  # late: Triton is optional

    plan = _plan(r)
    size, chunk = plan.size, plan.launch.chunk
    per_token = size * size // chunk
    with torch.cuda.device_of(r):
        for first, units in plan.groups(2 * size + per_token, per_token):
            solved, own = plan.kept(units, chunk, size), plan.kept(units, chunk, size)
            change, added = plan.kept(units, size, size), plan.exact(units, size, size)
            keep = plan.exact(units, size)
            grid, place = (units * plan.chunks,), (plan.tokens, plan.chunks, first)
            triton_forward.prepare[grid](
                log_w, k, v, a, b, codes, solved, own, change, added, keep, *place, **plan.constants(True)
            )
            triton_forward.scan[units, size // plan.launch.scan_block](
                state, state_out, added, keep, change, plan.chunks, first, **plan.scan_constants(False)
            )
            triton_forward.read_out[grid](
                r, log_w, k, v, b, codes, solved, own, added, y, sa, *place, **plan.constants(False)
            )


def _backward(
    dy: Tensor, dstate_out: Tensor,
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None,
    sa: Tensor,
    dr: Tensor, dlog_w: Tensor, dk: Tensor, dv: Tensor, da: Tensor, db: Tensor, dstate: Tensor,
) -> None:  # fmt: skip
    """The gradients of the outputs, inputs, sa, and the gradients, in the order of the signature."""
    from kernels.wkv7 import triton_backward, triton_forward

    plan = _plan(r)
    size, chunk = plan.size, plan.launch.chunk
    per_token = size * size // chunk
    with torch.cuda.device_of(r):
        for first, units in plan.groups(chunk + per_token + size, 2 * per_token):
            inverses, change = plan.kept(units, chunk, chunk), plan.kept(units, size, size)
            states, dstates = plan.exact(units, size, size), plan.exact(units, size, size)
            keep, h = plan.exact(units, size), plan.kept(units, chunk, size)
            grid, place = (units * plan.chunks,), (plan.tokens, plan.chunks, first)
            triton_backward.prepare_backward[grid](
                r, log_w, k, v, a, b, codes, sa, dy, inverses, change, states, dstates, keep, *place,
                **plan.constants(True),
            )  # fmt: skip
            blocks = (units, size // plan.launch.scan_block)
            triton_forward.scan[blocks](
                state, None, states, keep, None, plan.chunks, first, **plan.scan_constants(False)
            )
            triton_forward.scan[blocks](
                dstate_out, dstate, dstates, keep, change, plan.chunks, first, **plan.scan_constants(True)
            )
            triton_backward.value_gradients[grid](
                r, log_w, k, a, b, codes, dy, inverses, dstates, h, dv, *place, **plan.constants(False)
            )
            triton_backward.key_gradients[units * plan.chunks, size // plan.launch.keys](
                r, log_w, k, v, a, b, codes, sa, dy, states, dstates, h, dr, dlog_w, dk, da, db, *place,
                **plan.constants(False),
            )  # fmt: skip


def _step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None,
    y: Tensor,
) -> None:  # fmt: skip
    """Inputs and the output in the order of the signature."""
    from kernels.wkv7 import triton_forward

    batch, heads, size = r.shape
    constants = decode_constants(heads, size)
    with torch.cuda.device_of(r):
        triton_forward.decode[batch * heads, size // constants["BLOCK"]](
            r, log_w, k, v, a, b, state, codes, y, **constants
        )


OPERATORS = register("wkv7", "triton", ["cpu", "cuda"], SIGNATURE, _forward, _backward, _step)


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Triton WKV-7; arguments and results as in kernels/wkv7/reference.py.

    r, k, v, a and b may be of 16 bits (all alike), and y then is; log_w and the states are float32.
    """
    tensors = (r, log_w, k, v, a, b, state, codes)
    y, state_out, _ = OPERATORS.forward(*tensors, wants_gradient(tensors))
    return y, state_out


def step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None
) -> Tensor:
    """One token in Triton; arguments and result as in kernels/wkv7/reference.py, dtypes as in `run`."""
    return OPERATORS.take_step(r, log_w, k, v, a, b, state, codes)
