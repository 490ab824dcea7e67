"""Sparse attention in Triton. The kernels are in triton_forward.py and triton_backward.py; walks.py prepares
their lists.

Not measured on any GPU yet. On the CPU it runs in Triton's interpreter alone, which is for tests.

A program of the forward pass has a tile of neighbouring tokens, all heads of one list, and walks the union
of their lists. One program for each token would fill a matrix product of 16 rows with the 4 or so heads that
share a list, and read 42 blocks of 64 keys anew for every token. Neighbours share the first block and the
window, and choose most of the others alike, so a tile reads a block once for up to ROWS / heads of them; and
where they share nothing it reads no more than single tokens would, in products of 64 rows, the least that the
matrix units of sm_90 take. Decoding has no neighbours: there a list is shared out among several programs.

Beside its outputs a pass takes no more than about SCRATCH bytes at once, unless one tile (backward: the lists
of one key/value head) needs more.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import custom_ops, triton_support
from kernels.case import Case
from kernels.custom_ops import register, wants_gradient
from kernels.sparse_attention.examples import verify
from kernels.sparse_attention.signature import SIGNATURE
from kernels.sparse_attention.walks import Walks, readers, walks
from kernels.triton_support import architecture, precision

__all__ = ["HELD_BACK", "OPERATORS", "launch", "prepare", "run", "supports"]

HELD_BACK = "a kernel that has not been measured on a GPU yet; name it (kernels/bench/sparse.py measures it)"
LARGEST = 256  # head size
SCRATCH = 1 << 29
ENTRY_BYTES = 64  # of scratch that an entry of a list takes while it is sorted
FEW = 256  # programs that fill a GPU; below, lists are shared out
SHARE_BLOCK = 128  # entries of a program of `shares`


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: of a program.
        keys: that it works on at once.
        warps, stages: of a program; loads run so many steps ahead.
    """

    rows: int
    keys: int
    warps: int
    stages: int


# By kernel, or for exact float32 products and for RDNA one for all, and by the head size filled up to a power
# of two: chosen by what the compiler reports (registers, spills, shared memory), not by a clock.
LAUNCHES = {
    "attend": {64: Launch(64, 64, 4, 2), 128: Launch(64, 64, 8, 2), 256: Launch(64, 32, 8, 2)},
    "query_gradients": {64: Launch(64, 64, 4, 2), 128: Launch(64, 32, 8, 2), 256: Launch(32, 32, 8, 1)},
    "key_gradients": {64: Launch(64, 64, 4, 2), 128: Launch(32, 64, 8, 2), 256: Launch(32, 32, 8, 1)},
    "exact": {64: Launch(16, 32, 4, 1), 128: Launch(16, 32, 8, 1), 256: Launch(16, 16, 8, 1)},
    "rdna": {64: Launch(32, 32, 4, 1), 128: Launch(32, 32, 8, 1), 256: Launch(32, 32, 8, 1)},
}
RDNA, CDNA = ("gfx10", "gfx11", "gfx12"), "gfx9"


def supports(case: Case) -> str | None:
    """Why it cannot run a case, or None."""
    if case.head_size > LARGEST:
        return f"the Triton backend runs head sizes up to {LARGEST}, not {case.head_size}"
    return triton_support.unusable(case)


def prepare(case: Case) -> None:
    """Compiles the kernels and checks them where they are to run; raises jit_build.BuildError if wrong."""
    how = precision(case.dtype, architecture(torch.device(case.device_type)))
    verify("triton", run, case, how.tolerance, native=True)


def power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


def launch(kernel: str, size: int, length: int, products: str, device: str) -> Launch:
    """How a kernel is launched.

    Args:
        kernel: "attend", "query_gradients" or "key_gradients".
        size: of a head.
        length: keys of a block.
        products: as of triton_support.Precision.
        device: as triton_support.architecture names it.
    """
    kind = "exact" if products == "ieee" else "rdna" if device.startswith(RDNA) else kernel
    chosen = LAUNCHES[kind][max(64, power_of_two(size))]
    if products == "tf32":  # numbers twice as large
        chosen = chosen._replace(keys=chosen.keys // 2, stages=1)
    if device.startswith(CDNA):  # more warps would halve the registers that each can have
        chosen = chosen._replace(warps=4)
    return chosen._replace(keys=min(chosen.keys, max(16, power_of_two(length))))


class Plan:
    """The launches of one call: sizes, and constants of the kernels.

    Args:
        q, k, blocks: of the call.
        kernel: whose tiles; of LAUNCHES.
    """

    def __init__(self, q: Tensor, k: Tensor, blocks: Tensor, kernel: str):
        self.batch, self.tokens, self.heads, self.size = q.shape
        self.blocks, self.length, self.groups = k.shape[1:4]
        self.lists, self.listed = blocks.shape[2:]
        device = architecture(q.device)
        self.how, self.dtype = precision(q.dtype, device), q.dtype
        self.launch = launch(kernel, self.size, self.length, self.how.products, device)
        heads = self.heads // self.lists  # of a list
        alone = self.batch * self.tokens * self.lists
        self.span = 1 if alone <= FEW else min(self.tokens, max(1, self.launch.rows // heads))
        self.rows = min(self.launch.rows, max(16, power_of_two(self.span * heads)))
        self.strips = -(-self.span * heads // self.rows)
        self.tiles = -(-self.tokens // self.span)
        spare = FEW // (alone * self.strips) if self.span == 1 else 1
        self.parts = 1 << max(0, min(spare, self.listed).bit_length() - 1)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(first tile, tiles) of each launch, as many as SCRATCH lets."""
        heads = self.heads // self.lists
        entry = 4 * heads + (ENTRY_BYTES if self.span > 1 else 0)
        tile = self.batch * self.span * self.lists * self.listed * entry
        most = max(1, SCRATCH // tile)
        for first in range(0, self.tiles, most):
            yield first, min(most, self.tiles - first)

    def programs(self, tiles: int) -> int:
        """Of so many tiles."""
        return self.batch * tiles * self.lists * self.strips

    def walks(
        self, blocks: Tensor, starts: Tensor, positions: Tensor, first: int, tiles: int, also_watched: bool
    ) -> Walks:
        """Of some tiles; a tile of one token walks its list as it is."""
        some = slice(first * self.span, (first + tiles) * self.span)
        if self.span == 1:
            return Walks(blocks[:, some].contiguous(), None, None)
        return walks(blocks[:, some], starts, positions[:, some], self.span, also_watched)

    def sizes(self, first: int, tiles: int) -> tuple[int, ...]:
        """The numbers that the kernels of tiles are given."""
        return self.batch, self.tokens, self.blocks, first, tiles

    def constants(self) -> dict:
        """Of all kernels that multiply."""
        return {
            "HEADS": self.heads,
            "GROUPS": self.groups,
            "LISTS": self.lists,
            "LISTED": self.listed,
            "N": self.size,
            "C": self.length,
            "W": max(16, power_of_two(self.size)),
            "KEYS": self.launch.keys,
            # Products of float16 numbers as they are given stay in its range.
            "PRODUCTS": "fp16" if self.dtype == torch.float16 else self.how.products,
            "num_warps": self.launch.warps,
            "num_stages": self.launch.stages,
        }

    def tile_constants(self) -> dict:
        """Of the kernels of tiles."""
        return self.constants() | {
            "ROWS": self.rows,
            "SPAN": self.span,
            "MEMBERS": max(16, power_of_two(self.span)),  # less, and RDNA's compiler gives up
        }

    def reader_constants(self) -> dict:
        """Of the kernel of blocks."""
        return self.constants() | {"ROWS": self.launch.rows}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor,
    y: Tensor, share: Tensor, logs: Tensor | None,
) -> None:  # fmt: skip
    """Inputs and outputs in the order of the signature."""
    from kernels.sparse_attention import triton_forward  # late: Triton is optional

    plan = Plan(q, k, blocks, "attend")
    if logs is None:
        logs = custom_ops.allocate(q.shape[:3], torch.float32, q.device)
    part_y, part_logs = y, logs
    if plan.parts > 1:
        part_y = custom_ops.allocate((plan.parts, *y.shape), torch.float32, y.device)
        part_logs = custom_ops.allocate((plan.parts, *logs.shape), torch.float32, y.device)
    with torch.cuda.device_of(q):
        for first, tiles in plan.ranges():
            walk = plan.walks(blocks, starts, positions, first, tiles, also_watched=True)
            tokens = (plan.batch, tiles * plan.span)
            shape = (*tokens, plan.heads * plan.listed)  # [.., J, K, H / J]
            entries = custom_ops.allocate(shape, torch.float32, q.device)
            triton_forward.attend[plan.programs(tiles), plan.parts](
                q, k, v, *walk, starts, positions, part_y, part_logs, entries, *plan.sizes(first, tiles),
                PARTS=plan.parts, **plan.tile_constants(),
            )  # fmt: skip
            if plan.parts > 1:  # then this is the only launch
                triton_forward.combine[logs.numel(),](
                    part_y, part_logs, y, logs, logs.numel(), **combine_constants(plan)
                )
            pieces = -(-plan.lists * plan.listed // SHARE_BLOCK)
            triton_forward.shares[tokens[0] * tokens[1], pieces](
                blocks, starts, positions, logs, entries, share, *plan.sizes(first, tiles)[1:],
                **share_constants(plan),
            )  # fmt: skip


def combine_constants(plan: Plan) -> dict:
    """Of `combine`."""
    return {"N": plan.size, "W": power_of_two(plan.size), "PARTS": plan.parts, "num_warps": 4}


def share_constants(plan: Plan) -> dict:
    """Of `shares`."""
    names = {"HEADS": plan.heads, "LISTS": plan.lists, "LISTED": plan.listed, "SPAN": plan.span}
    return names | {"BLOCK": SHARE_BLOCK, "num_warps": 4}


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor,
    y: Tensor, logs: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """The gradient of y, inputs, y, the logarithms, and the gradients, in the order of the signature."""
    from kernels.sparse_attention import triton_backward

    plan = Plan(q, k, blocks, "query_gradients")
    meeting = custom_ops.allocate(logs.shape, torch.float32, q.device)
    slopes = {"SLOPES": plan.how.products}
    with torch.cuda.device_of(q):
        for first, tiles in plan.ranges():
            walk = plan.walks(blocks, starts, positions, first, tiles, also_watched=False)
            triton_backward.query_gradients[plan.programs(tiles),](
                dy, q, k, v, *walk, starts, positions, y, logs, meeting, dq, *plan.sizes(first, tiles),
                **slopes, **plan.tile_constants(),
            )  # fmt: skip
        plan = Plan(q, k, blocks, "key_gradients")
        units = plan.batch * plan.groups
        lists = blocks.transpose(1, 2).reshape(units, -1, *blocks.shape[1::2])  # [B*G,J/G,T,K]
        most = max(1, SCRATCH // (lists[0].numel() * ENTRY_BYTES))
        for first in range(0, units, most):
            row = torch.arange(first, min(first + most, units), device=q.device) // plan.groups
            who = readers(lists[first : first + most].transpose(1, 2), starts[row], positions[row])
            pieces = -(-plan.length // plan.launch.keys)
            triton_backward.key_gradients[plan.blocks * pieces * len(row),](
                dy, q, k, v, *who, starts, positions, logs, meeting, dk, dv,
                plan.tokens, plan.blocks, first, len(row), **slopes, **plan.reader_constants(),
            )  # fmt: skip


OPERATORS = register("sparse_attention", "triton", ["cpu", "cuda"], SIGNATURE, _forward, _backward)


def run(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Triton sparse attention; arguments and results as in kernels/sparse_attention/reference.py.

    q, k and v may be of 16 bits (all alike), and y then is.
    """
    tensors = (q, k, v, blocks, starts, positions)
    y, share, _ = OPERATORS.forward(*tensors, wants_gradient(tensors))
    return y, share
