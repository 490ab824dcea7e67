"""Every kind of call that a backend must get right, held against float64."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from kernels.bench.calls import Contestant, contestants
from kernels.bench.checks import (
    RIGHT,
    UNABLE,
    WRONG,
    Verdict,
    compute,
    guarded,
    judge,
    obstacle,
    steps,
    tolerance_of,
)
from kernels.case import HEAD_SIZES, Case
from kernels.examples import Example, example, truth

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 1000)
LONG = 512  # from here on only one row and head, with documents: float64 takes its time
DTYPES = ("float32", "bfloat16", "float16")
# Peers need not stand decays that no model of theirs has.
HARD_DECAYS, EASY_DECAYS = (0.006, 0.9999), (0.545, 1.0)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of call: the operator, whether it has wkv6's bonus, dtype, N, T, documents and padding."""

    op: str
    bonus: bool
    dtype: str
    head_size: int
    tokens: int
    documents: bool


def kinds(
    operators: Sequence[str] = ("wkv7", "wkv6"),
    dtypes: Sequence[str] = DTYPES,
    head_sizes: Sequence[int] = HEAD_SIZES,
    lengths: Sequence[int] = LENGTHS,
) -> list[Kind]:
    """All combinations, the likeliest to be used first; long calls only with documents."""
    return [
        Kind(op=op, bonus=bonus, dtype=dtype, head_size=size, tokens=tokens, documents=documents)
        for size in sorted(head_sizes, key=lambda size: (size != 64, size))
        for dtype in dtypes
        for op in operators
        for bonus in ((False, True) if op == "wkv6" else (False,))
        for tokens in lengths
        for documents in ((False, True) if tokens < LONG else (True,))
    ]


def parity(backend: str, device: str, wanted: Sequence[Kind]) -> Iterator[dict]:
    """Checks a backend: forward, every gradient, steps; twice, to the last bit the same.

    Args:
        backend: its name.
        device: "cpu" or "cuda".
        wanted: what to check.

    Yields:
        One row for each kind: its fields, `backend`, and those of checks.Verdict.
    """
    known: dict[tuple, list[Contestant]] = {}  # what cannot be built is not tried again for every length
    for kind in wanted:
        case = Case(torch.device(device).type, getattr(torch, kind.dtype), kind.head_size)
        if (kind.op, case) not in known:
            known[kind.op, case] = contestants(kind.op, case, [backend])
        verdict = Verdict(UNABLE, reason=f"{kind.op} has no such backend")
        for contestant in known[kind.op, case]:
            verdict = obstacle(contestant) or guarded(_check, contestant, kind, device)
        yield {"backend": backend, **asdict(kind), **asdict(verdict)}


def _check(contestant: Contestant, kind: Kind, device: str) -> Verdict:
    dtype = getattr(torch, kind.dtype)
    tolerance = tolerance_of(contestant, dtype)
    call = _call(kind, contestant.peer)
    found = compute(contestant, call, dtype, device)
    verdict = judge(found, truth(call), tolerance)
    if verdict.check == RIGHT and not contestant.peer:
        again = compute(contestant, call, dtype, device)
        differing = [name for name, x in found.items() if not torch.equal(x, again[name])]
        if differing:
            verdict = Verdict(WRONG, verdict.error, f"two runs differ in {', '.join(differing)}")
    if verdict.check == RIGHT and contestant.step is not None and kind.tokens <= 16:
        stepped = judge(steps(contestant, call, dtype, device), truth(call, False), tolerance)
        if stepped.check != RIGHT:
            return Verdict(stepped.check, stepped.error, f"in decoding steps: {stepped.reason}")
    return verdict


def _call(kind: Kind, peer: bool) -> Example:
    batch, heads = (2, 2) if kind.tokens < LONG else (1, 1)
    return example(
        kind.op, batch, kind.tokens, heads, kind.head_size, bonus=kind.bonus, documents=kind.documents,
        decay=EASY_DECAYS if peer else HARD_DECAYS, rounded=getattr(torch, kind.dtype), seed=kind.tokens,
    )  # fmt: skip
