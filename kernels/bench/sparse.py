"""Sparse attention: parity with float64, and its speed beside dense attention.

    python -m kernels.bench.sparse                       # a GPU: all kinds of call, 16 k to 256 k tokens
    python -m kernels.bench.sparse --device cpu --backends cpu --lengths 4096 --dtype float32

One row of 16 heads of 64 with 4 key/value heads, blocks of 64 keys, lists of 42: the first block, the eight
before the token's own, the own one, and 32 others spread over the past. `alike`: tokens of a block choose the
same others; `apart`: every token and list chooses for itself, which no trained selection does. The peer is
torch's scaled_dot_product_attention, causal, over everything.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.bench.calls import BOTH, FORWARD, Contestant, unable
from kernels.bench.checks import (
    RIGHT,
    UNBUILT,
    WRONG,
    Verdict,
    guarded,
    judge,
    obstacle,
    poisoned,
    tolerance_of,
)
from kernels.bench.timing import Clock, interleaved
from kernels.case import Case
from kernels.sparse_attention import NONE, TABLE, sparse_attention
from kernels.sparse_attention.examples import example, results, truth

log = logging.getLogger(__name__)
OP, PEER = "sparse_attention", "sdpa"
HEADS, GROUPS, SIZE, LENGTH = 16, 4, 64, 64
WINDOW, OTHERS = 8, 32  # blocks before the own one, and further ones
DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = (16384, 32768, 65536, 131072, 262144)
DECODE = "decode"
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of call that must be right: dtype, N, T, tokens before, C, watched entries."""

    dtype: str
    head_size: int
    tokens: int
    context: int
    length: int
    watches: int


def kinds(sizes: Sequence[int] = (64, 128, 256, 80), dtypes: Sequence[str] = DTYPES) -> list[Kind]:
    """Tiles, single tokens, blocks that are no power of two; the likeliest first."""
    calls = ((300, 0, 64, 0), (1, 400, 64, 0), (70, 90, 40, 1), (6, 300, 100, 2))
    return [
        Kind(dtype=dtype, head_size=size, tokens=t, context=context, length=length, watches=watches)
        for size in sizes
        for dtype in dtypes
        for t, context, length, watches in calls
    ]


def parity(device: str, backends: Sequence[str], wanted: Sequence[Kind]) -> Iterator[dict]:
    """y, share and all gradients of each backend, twice to the last bit the same.

    Yields:
        A row for each: `op`, `backend`, the fields of the kind, and those of checks.Verdict.
    """
    for kind in wanted:
        for name in backends:
            case = Case(torch.device(device).type, getattr(torch, kind.dtype), kind.head_size)
            run = partial(sparse_attention, backend=name)
            each = Contestant(name, run, None, *unable(OP, TABLE[name], case))
            verdict = obstacle(each) or guarded(_check, each, kind, device)
            yield {"op": OP, "backend": name, **asdict(kind), **asdict(verdict)}


def _check(contestant: Contestant, kind: Kind, device: str) -> Verdict:
    dtype = getattr(torch, kind.dtype)
    call = example(
        2, kind.tokens, 8, 2, kind.head_size, context=kind.context, length=kind.length, listed=5, documents=2,
        watches=kind.watches, unfilled=torch.nan, rounded=dtype,
    )  # fmt: skip
    there = call.to(device)
    with poisoned():
        found, again = (results(there, contestant.run, dtype) for _ in range(2))
    differing = [name for name, x in found.items() if not torch.equal(x, again[name])]
    found = {name: x.cpu() for name, x in found.items()}
    verdict = judge(found, truth(call), tolerance_of(contestant, dtype))
    if verdict.check == RIGHT and differing:
        return Verdict(WRONG, verdict.error, f"two runs differ in {', '.join(differing)}")
    return verdict


def lists(positions: Tensor, alike: bool) -> Tensor:
    """[1,T,G,K] int32: the blocks that tokens at these positions list, of a text whose block m starts at m C.

    Args:
        positions: [T].
        alike: as the text at the top says.
    """
    device = positions.device
    generator = torch.Generator(device).manual_seed(SEED)
    own = positions // LENGTH
    window = own[:, None] - torch.arange(WINDOW + 1, device=device)
    between = (own - WINDOW - 1).clamp_min(0)[:, None, None]  # blocks that are neither first nor near
    shape = (len(positions), GROUPS, OTHERS)
    if alike:
        chosen = torch.rand(int(own.max()) + 1, *shape[1:], generator=generator, device=device)[own]
    else:
        chosen = torch.rand(*shape, generator=generator, device=device)
    at = torch.arange(OTHERS, device=device)
    low, high = at * between // OTHERS, (at + 1) * between // OTHERS
    spread = 1 + low + (chosen * (high - low)).long()
    others = torch.where(between > OTHERS, spread, torch.where(at < between, at + 1, NONE))
    near = torch.where(window > 0, window, NONE)[:, None].expand(-1, GROUPS, -1)
    first = torch.zeros(len(positions), GROUPS, 1, dtype=torch.long, device=device)
    return torch.cat([first, others, near], -1).int()[None]


def prefill(
    device: str, dtype: str, backends: Sequence[str], lengths: Sequence[int], seconds: float, repeats: int = 5
) -> Iterator[dict]:
    """Milliseconds of all tokens of a text, forward and forward + backward.

    Yields:
        Rows: op, backend, what, lists ("alike", "apart" or, of the peer, "all"), tokens, ms.
    """
    clock = Clock(device)
    for tokens in lengths:
        q, k, v, upstream = _tensors(tokens, tokens, device, dtype)
        positions = torch.arange(tokens, dtype=torch.int32, device=device)
        starts = torch.arange(0, tokens, LENGTH, dtype=torch.int32, device=device)
        pools = [x.unflatten(1, (-1, LENGTH)) for x in (k, v)]
        jobs = {}
        for alike in (True, False):
            blocks = lists(positions, alike)
            for name in backends:
                run = partial(
                    sparse_attention, q, *pools, blocks, starts[None], positions[None], backend=name
                )
                for what in (FORWARD, BOTH):
                    jobs[name, what, "alike" if alike else "apart"] = partial(
                        _pass, what, lambda run=run: run()[0], (q, k, v), upstream
                    )
        for what in (FORWARD, BOTH):
            jobs[PEER, what, "all"] = partial(_pass, what, partial(_dense, q, k, v), (q, k, v), upstream)
        yield from _timed(jobs, clock, repeats, seconds, dtype, tokens)


def decoding(
    device: str,
    dtype: str,
    backends: Sequence[str],
    lengths: Sequence[int],
    seconds: float,
    repeats: int = 15,
) -> Iterator[dict]:
    """Milliseconds of one more token behind so many; rows as those of `prefill`."""
    clock = Clock(device)
    for tokens in lengths:
        q, k, v, _ = _tensors(1, tokens, device, dtype)
        position = torch.tensor([tokens - 1], dtype=torch.int32, device=device)
        starts = torch.arange(0, tokens, LENGTH, dtype=torch.int32, device=device)
        pools = [x.detach().unflatten(1, (-1, LENGTH)) for x in (k, v)]
        arguments = (q.detach(), *pools, lists(position, False), starts[None], position[None])
        jobs = {
            (name, DECODE, "apart"): partial(sparse_attention, *arguments, backend=name) for name in backends
        }
        jobs[PEER, DECODE, "all"] = torch.no_grad()(partial(_dense, q, k, v))
        yield from _timed(jobs, clock, repeats, seconds, dtype, tokens)


def _tensors(queries: int, tokens: int, device: str, dtype: str) -> tuple[Tensor, ...]:
    """q [1,T,H,N] scaled, k and v [1,S,G,N], which want gradients; the gradient of y."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(tokens: int, heads: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(1, tokens, heads, SIZE, generator=generator, device=device).mul_(scale)
        return x.to(getattr(torch, dtype))

    leaves = (normal(queries, HEADS, SIZE**-0.5), normal(tokens, GROUPS), normal(tokens, GROUPS))
    return *(x.requires_grad_() for x in leaves), normal(queries, HEADS)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's attention over all keys, causal where there are as many queries."""
    causal = q.shape[1] == k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0, enable_gqa=True).transpose(
        1, 2
    )


def _pass(what: str, run, leaves: tuple[Tensor, ...], upstream: Tensor) -> None:
    with torch.set_grad_enabled(what == BOTH):
        y = run()
    if what == BOTH:
        torch.autograd.grad(y, leaves, upstream)


def _timed(jobs: dict, clock: Clock, repeats: int, seconds: float, dtype: str, tokens: int) -> Iterator[dict]:
    """Runs jobs in turns, after once for compiling; a job without memory for it has no time."""
    able = {}
    for key, job in jobs.items():
        try:
            job()
            able[key] = job
        except (torch.OutOfMemoryError, MemoryError):
            pass
    times = interleaved(able, clock, repeats, seconds)
    for key in jobs:
        backend, what, kind = key
        ms = statistics.median(times[key]) if key in times else None
        row = {"op": OP, "backend": backend, "what": what, "lists": kind, "tokens": tokens}
        yield row | {"dtype": dtype, "ms": ms}


def able(device: str, dtype: str) -> list[str]:
    """The backends to measure: all that can run there, the definition left out."""
    case = Case(torch.device(device).type, getattr(torch, dtype), SIZE)
    names = [b.name for b in dispatch.backends(OP) if b.supports(case) is None]
    return [name for name in names if name != "reference"]


def table(rows: Sequence[dict]) -> list[str]:
    """Markdown: a line for each pass and length, a column for each backend and kind of list."""
    heads = list(dict.fromkeys((r["backend"], r["lists"]) for r in rows))
    cells = {(r["what"], r["tokens"], r["backend"], r["lists"]): r["ms"] for r in rows}
    lines = [
        ["what (ms)", "tokens", *(f"{name}, {kind}" for name, kind in heads)],
        ["---"] * (len(heads) + 2),
    ]
    for what, tokens in dict.fromkeys((r["what"], r["tokens"]) for r in rows):
        found = [cells.get((what, tokens, *head)) for head in heads]
        lines.append([what, str(tokens), *("" if ms is None else f"{ms:.3f}" for ms in found)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 1 where a backend is wrong or cannot be built. Such a one is not timed."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.sparse", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", help="all that can run there but the definition")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, multiples of 64")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one pass of one backend")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    names = options.backends or able(options.device, options.dtype)
    checked = list(parity(options.device, names, kinds()))
    failed = [row for row in checked if row["check"] != RIGHT]
    for row in failed:
        log.info(" ".join(f"{name}={value}" for name, value in row.items()))
    log.info("parity: %d of %d not right", len(failed), len(checked))
    right = [name for name in names if name not in {row["backend"] for row in failed}]
    rows = []
    for length in options.lengths:
        for measure in (prefill, decoding):
            rows += measure(options.device, options.dtype, right, [length], options.seconds)
    log.info("\n".join(table(rows)))
    return int(any(row["check"] in (WRONG, UNBUILT) for row in failed))


if __name__ == "__main__":
    raise SystemExit(main())
