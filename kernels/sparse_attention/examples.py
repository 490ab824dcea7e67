"""Example calls of sparse attention, what a backend makes of them, and the check before its first use."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.case import Case
from kernels.self_check import held_against
from kernels.sparse_attention import reference
from kernels.sparse_attention.lists import NONE, watched


@dataclass
class Example:
    """Arguments of one call, and the gradient of y to send back.

    Attributes:
        q, k, v: float64, exact in `rounded` of `example`.
        blocks, starts, positions: int32.
        upstream: [B,T,H,N] likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    starts: Tensor
    positions: Tensor
    upstream: Tensor

    def to(self, device: str | torch.device) -> "Example":
        """The same call on another device."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items()})

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """What says who sees what."""
        return self.blocks, self.starts, self.positions


def example(
    batch: int,
    tokens: int,
    heads: int,
    groups: int,
    size: int,
    *,
    lists: int | None = None,
    length: int = 16,
    listed: int = 4,
    seed: int = 0,
    documents: int = 1,
    context: int = 0,
    watches: int = 0,
    unfilled: float = 0.0,
    rounded: torch.dtype = torch.float32,
) -> Example:
    """A call as a mixer makes it: each token lists its own block, the document's first one, and random others
    of its document, in any order, some entries being none.

    Args:
        batch, tokens, heads, groups, size, lists, length, listed: B, T, H, G, N, J (G if None), C, K.
        seed: of everything.
        documents: in a row, each with blocks of its own; their lengths differ from row to row, and two tokens
            in the middle of every second row are padding: they list blocks, but their position is -1.
        context: tokens before these, whose keys are there, but not their queries.
        watches: so many entries of each list are only watched.
        unfilled: what stands in the places of blocks that are not filled.
        rounded: the values are exact in this dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    lists, tokens = lists or groups, tokens + context
    count = tokens // length + documents + 1  # one more than any row needs

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(rounded).double()

    document, positions, starts, owners = _rows(batch, tokens, length, documents, count, generator)
    score = torch.rand(batch, tokens, lists, count, generator=generator)
    begun = (starts[:, None] <= positions[..., None]) & (owners[:, None] == document[..., None])
    own = begun & (starts[:, None] > positions[..., None] - length)
    score = score.masked_fill(~begun[:, :, None], -1) + 2.0 * own[:, :, None]
    score += 2.0 * (begun & (starts == 0)[:, None])[:, :, None]
    best = score.topk(min(listed, count), -1)
    blocks = torch.where(best.values >= 0, best.indices, NONE).int()
    if watches:
        blocks[..., -watches:] = watched(blocks[..., -watches:])
    blocks = torch.nn.functional.pad(blocks, (0, listed - blocks.shape[-1]), value=NONE)
    blocks = blocks[..., torch.randperm(listed, generator=generator)]
    if documents > 1:
        positions[1::2, tokens // 2 : tokens // 2 + 2] = -1
    pool = (batch, count, length, groups, size)
    lengths = torch.stack([(document == number).sum(1) for number in range(documents)], 1)  # [B,documents]
    ends = lengths.gather(1, owners.clamp_min(0)).masked_fill(owners < 0, 0)
    empty = starts[..., None] + torch.arange(length) >= ends[..., None]
    k, v = (normal(*pool).masked_fill(empty[..., None, None], unfilled) for _ in range(2))
    q = (normal(batch, tokens, heads, size) * 1.5 * size**-0.5).to(rounded).double()
    upstream = normal(batch, tokens, heads, size)
    q, blocks, positions, upstream = (x[:, context:] for x in (q, blocks, positions, upstream))
    return Example(q, k, v, blocks, starts.int(), positions.int(), upstream)


def _rows(
    batch: int, tokens: int, length: int, documents: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token its document and its position in it; of each block its start and its document, or -1."""
    document = torch.zeros(batch, tokens, dtype=torch.long)
    positions = torch.zeros_like(document)
    starts = torch.full((batch, count), tokens)  # of blocks that nobody fills
    owners = torch.full_like(starts, -1)
    for row in range(batch):
        cuts = torch.randperm(tokens, generator=generator)[: documents - 1].sort().values
        edges = [0, *cuts.tolist(), tokens]
        block = 0
        for number, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
            document[row, begin:end] = number
            positions[row, begin:end] = torch.arange(end - begin)
            for start in range(0, end - begin, length):
                starts[row, block], owners[row, block] = start, number
                block += 1
    return document, positions, starts, owners


def results(
    call: Example, run: Callable, dtype: torch.dtype = torch.float32, backward: bool = True
) -> dict[str, Tensor]:
    """y, share and the gradients of a call, by name.

    Args:
        call: the call, on its device.
        run: (q, k, v, blocks, starts, positions) -> (y, share).
        dtype: that q, k, v and dy are given in.
        backward: also the gradients.
    """
    leaves = [x.detach().to(dtype).requires_grad_(backward) for x in (call.q, call.k, call.v)]
    y, share = run(*leaves, *call.lists)
    found = {"y": y.detach(), "share": share.detach()}
    if backward:
        gradients = torch.autograd.grad(y, leaves, call.upstream.to(y.dtype))
        found |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return found


def truth(call: Example, backward: bool = True) -> dict[str, Tensor]:
    """The definition in float64."""
    return results(call, reference.run, torch.float64, backward)


@torch.inference_mode(False)
@torch.enable_grad()
def verify(name: str, run: Callable, case: Case, tolerance: str, native: bool) -> None:
    """Run a small call forward and backward on the device and compare it with float64.

    Args:
        name, run: the backend.
        case: the device, dtype and head size to check it with.
        tolerance: a key of kernels.examples.TOLERANCES.
        native: whether it takes 16-bit inputs.

    Raises:
        BuildError: with the errors that are too large.
    """
    dtype = case.dtype if native else torch.float32
    call = example(
        2, 80, 4, 2, case.head_size, length=24, documents=2, watches=1, unfilled=torch.nan, rounded=dtype
    )
    held_against(
        truth(call),
        lambda: results(call.to(case.device_type), run, dtype),
        "sparse_attention",
        name,
        tolerance,
    )
