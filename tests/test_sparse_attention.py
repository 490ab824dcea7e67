"""Sparse attention on the CPU: every backend against the float64 definition, and the definition against dense
softmax attention written plainly. Errors are relative RMS; the C++ backend computes in float32."""

import math

import pytest
import torch
from compilers import require_compiler
from torch import Tensor

from kernels import custom_ops, explain
from kernels.examples import errors, too_large
from kernels.sparse_attention import HEAD_SIZES, NONE, chunked, cpu, sparse_attention, watched
from kernels.sparse_attention.examples import Example, example, results, truth

FAST = ("cpu", "chunked")
# B, T, H, G, N, and the other sizes of an example.
SHAPES = {
    "odd length": ((2, 37, 4, 2, 16), {"length": 8, "listed": 3}),
    "one token": ((2, 1, 4, 2, 32), {"length": 8, "context": 50, "documents": 2}),
    "a list for each head": ((1, 70, 4, 2, 24), {"lists": 4, "length": 16, "listed": 2}),
    "a list for every head": ((2, 65, 6, 1, 64), {"length": 24, "listed": 3}),
    "long blocks": ((1, 230, 2, 1, 8), {"length": 100, "listed": 2}),
    "many lists": ((1, 260, 8, 8, 32), {"length": 32, "listed": 5}),
    "documents": ((3, 61, 4, 2, 32), {"length": 12, "listed": 4, "documents": 3}),
    "watched": ((2, 90, 4, 2, 16), {"length": 20, "listed": 5, "watches": 2, "documents": 2}),
    "odd head size": ((1, 33, 6, 3, 13), {"length": 5, "listed": 4}),
    "more heads than rows": ((1, 5, 140, 1, 8), {"length": 8, "context": 20}),
}


@pytest.fixture(params=FAST)
def fast(request) -> str:
    """The backends other than the definition."""
    if request.param == "cpu":
        require_compiler()
    return request.param


def made(shape: str = "odd length", **options) -> Example:
    sizes, others = SHAPES[shape]
    return example(*sizes, **others | options)


def found(call: Example, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of a backend, in the dtype that it computes in."""
    dtype = dtype or (torch.float32 if backend == "cpu" else torch.float64)
    return results(call, lambda *tensors: sparse_attention(*tensors, backend=backend), dtype)


def check(call: Example, backend: str) -> None:
    relative = errors(found(call, backend), truth(call))
    assert not too_large(relative, "fp32")
    assert backend == "cpu" or max(relative.values()) < 1e-12


def poisoned(monkeypatch) -> None:
    """What a backend does not write is NaN."""
    allocate = custom_ops.allocate
    monkeypatch.setattr(custom_ops, "allocate", lambda *given: allocate(*given).fill_(math.nan))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_definition(fast, shape, seed, monkeypatch):
    """y, share and all gradients; outputs and unfilled places begin as NaN."""
    poisoned(monkeypatch)
    check(made(shape, seed=seed, unfilled=math.nan), fast)


def test_the_definition_in_float32():
    call = made("documents")
    assert not too_large(errors(found(call, "reference", torch.float32), truth(call)), "fp32")


def dense(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
    """Causal softmax attention within documents, plainly; k, v [B,T,G,N]."""
    heads = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(heads, 2) for x in (k, v))
    mask = (positions[:, None] <= positions[:, :, None]) & (documents[:, None] == documents[:, :, None])
    scores = torch.einsum("bthn,bshn->bhts", q, keys).masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bhts,bshn->bthn", scores.softmax(-1), values)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("lists", [2, 4])
@pytest.mark.parametrize("first", [48, 20])
def test_all_blocks_of_a_document_are_dense_attention(backend, lists, first):
    """One document, and two in a row; 48 tokens that blocks of 7 do not fill: forward and gradients."""
    if backend == "cpu":
        require_compiler()
    torch.manual_seed(0)
    batch, tokens, heads, groups, size, length = 2, 48, 4, 2, 16, 7
    edges = [0, first, tokens] if first < tokens else [0, tokens]
    documents, places, starts, owner = [], [], [], []
    for number, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        documents += [number] * (end - begin)
        places += [len(starts) * length + t for t in range(end - begin)]
        begun = range(0, end - begin, length)
        starts, owner = [*starts, *begun], [*owner, *[number] * len(begun)]
    count, documents = len(starts), torch.tensor(documents).expand(batch, -1)
    positions = torch.cat([torch.arange(e - b) for b, e in zip(edges, edges[1:], strict=False)]).int()
    positions = positions.expand(batch, -1).contiguous()
    mine = torch.tensor(owner) == documents[..., None]  # [B,T,M]
    blocks = torch.where(mine, torch.arange(count), NONE).int()[:, :, None].repeat(1, 1, lists, 1)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    q, dy = (torch.randn(batch, tokens, heads, size, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, tokens, groups, size, dtype=dtype) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def pool(x: Tensor) -> Tensor:
        room = x.new_full((batch, count * length, groups, size), math.nan)
        return room.index_copy(1, torch.tensor(places), x).unflatten(1, (-1, length))

    starts = torch.tensor(starts, dtype=torch.int32).expand(batch, -1).contiguous()
    y, share = sparse_attention(q, pool(k), pool(v), blocks, starts, positions, backend=backend)
    expected = dense(q, k, v, positions, documents)
    gradients = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    names = ("y", "dq", "dk", "dv")
    results_, exact = (
        dict(zip(names, (o, *g), strict=True)) for o, g in zip((y, expected), gradients, strict=True)
    )
    assert not too_large(errors(results_, exact), "fp32")
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]))


def test_a_watched_block_changes_nothing_else(fast):
    """y and its gradients are those of the list without it; its share is its weight against what is attended:
    a / (1 - a) where attending would give it a."""
    call = made("watched", watches=0, lists=4)  # a list for each head, so that no mean is taken
    column = (call.blocks != NONE).sum((0, 1, 2)).argmax()
    runs = {"attended": found(call, fast)}
    for name, entry in (("without", call.blocks.new_tensor(NONE)), ("watched", watched(call.blocks))):
        blocks = torch.where(torch.arange(5) == column, entry, call.blocks)
        runs[name] = found(Example(**vars(call) | {"blocks": blocks}), fast)
    shares = {name: run.pop("share") for name, run in runs.items()}
    assert not too_large(errors(runs["watched"], runs["without"]), "fp32")
    others = torch.arange(5) != column
    torch.testing.assert_close(shares["watched"][..., others], shares["without"][..., others])
    some = shares["without"].sum(-1) > 0  # elsewhere the watched block is all that a token lists
    part, weight = (shares[name][..., column] for name in ("attended", "watched"))
    assert some.sum() > 100 and (weight[~some] == 0).all()
    torch.testing.assert_close(weight[some], (part / (1 - part))[some], rtol=1e-4, atol=1e-6)


def test_shares_are_fractions(fast):
    """They sum to one where anything is seen, and are 0 for what is none or later."""
    call = made("documents")
    share = found(call, fast)["share"]
    seen = (call.positions >= 0)[..., None].expand(share.shape[:3])
    torch.testing.assert_close(share.sum(-1), seen.to(share.dtype))
    assert (share[call.blocks == NONE] == 0).all() and not share.requires_grad


def test_who_sees_nothing_gets_zero(fast, monkeypatch):
    """An empty list, and a position below 0."""
    poisoned(monkeypatch)
    call = made()
    call.blocks[0], call.positions[1] = NONE, -1
    for x in found(call, fast).values():
        assert (x == 0).all()


def test_the_order_of_a_list_does_not_matter(fast):
    call = made("many lists")
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3))
    moved = found(Example(**vars(call) | {"blocks": call.blocks[..., order]}), fast)
    plain = found(call, fast)
    plain["share"] = plain["share"][..., order]
    assert not too_large(errors(moved, plain), "fp32")


def test_chunked_in_pieces(monkeypatch):
    """A few queries at a time, their part of the backward pass computed again."""
    whole = found(made("documents"), "chunked")
    monkeypatch.setattr(chunked, "GATHERED", 1)
    pieces = found(made("documents"), "chunked")
    assert max(errors(pieces, whole).values()) < 1e-14


def test_the_threads_do_not_change_a_bit():
    """Large enough that both passes share their work out."""
    require_compiler()
    call = example(2, 700, 8, 4, 32, length=32, listed=6)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(found(call, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, other[name]) for other in runs[1:] for name, x in runs[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(fast, dtype):
    """Computed in float32; what is rounded is the result, and the gradients."""
    call = made(rounded=dtype)
    some = found(call, fast, dtype)
    assert some["y"].dtype == some["dk"].dtype == dtype and some["share"].dtype == torch.float32
    assert not too_large(errors(some, truth(call)), "16-bit")
    mixed = sparse_attention(call.q.to(dtype), call.k.float(), call.v.to(dtype), *call.lists, backend=fast)
    assert mixed[0].dtype == dtype and torch.equal(mixed[0], some["y"])


def test_autocast_changes_nothing(fast):
    call = made()
    plain = sparse_attention(*inputs(call), backend=fast)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sparse_attention(*inputs(call), backend=fast)
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


def inputs(call: Example) -> list[Tensor]:
    """As the C++ operators take them."""
    return [*(x.float() for x in (call.q, call.k, call.v)), *call.lists]


def test_the_custom_operators_keep_torchs_rules():
    """Schema, fake versions, autograd registration, and tracing."""
    require_compiler()
    call = made("odd length")
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs(call)]
    torch.library.opcheck(cpu.OPERATORS.forward, (*leaves, True))
    torch.library.opcheck(cpu.OPERATORS.forward, (*inputs(call), False))
    y, _, logs = cpu.OPERATORS.forward(*inputs(call), True)
    torch.library.opcheck(cpu.OPERATORS.backward, (call.upstream.float(), *inputs(call), y, logs))


def test_compiled_as_one_graph(fast):
    """torch.compile without a break, forward and backward."""
    call = made()

    def call_it(q, k, v):
        y, share = sparse_attention(q * 2, k, v, *call.lists, backend=fast)
        return (y * call.upstream.float()).sum() + share.sum()

    plain, compiled = ([x.float().requires_grad_() for x in (call.q, call.k, call.v)] for _ in range(2))
    call_it(*plain).backward()
    torch._dynamo.reset()
    torch.compile(call_it, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for x, y in zip(plain, compiled, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_what_is_kept_for_the_backward_pass():
    """Beside inputs and y one number a row and head; without gradients nothing."""
    require_compiler()
    call = made()
    kept = []
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs(call)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y, _ = cpu.run(*leaves)
    sizes = sorted(x.numel() for x in kept)
    assert sizes == sorted([*(x.numel() for x in leaves), y.numel(), y[..., 0].numel()])
    with torch.no_grad():
        assert cpu.OPERATORS.forward(*leaves, False)[2].numel() == 0


def test_auto_takes_the_compiled_one():
    require_compiler()
    answer = explain("sparse_attention", head_size=80)
    assert answer["backend"] == "cpu" and "could run" in answer["rejected"]["chunked"]
    assert explain("sparse_attention", dtype=torch.float64)["backend"] == "chunked"


GOOD = {
    "q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 5, 6, 2, 8), "v": torch.zeros(2, 5, 6, 2, 8),
    "blocks": torch.zeros(2, 3, 2, 1, dtype=torch.int32), "starts": torch.zeros(2, 5, dtype=torch.int32),
    "positions": torch.zeros(2, 3, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q must be \[B,T,H,N\]"),
        ({"q": torch.zeros(2, 0, 4, 8)}, "none empty"),
        ({"q": torch.zeros(2, 3, 4, 1025)}, "N up to 1,024"),
        ({"k": torch.zeros(2, 5, 6, 8)}, r"k must be \[B,M,C,G,N\]"),
        ({"k": torch.zeros(1, 5, 6, 2, 8)}, "B=2"),
        ({"k": torch.zeros(2, 5, 6, 2, 4)}, "N=8"),
        ({"k": torch.zeros(2, 5, 6, 3, 8)}, "G a divisor of 4 heads"),
        ({"k": torch.zeros(2, 0, 6, 2, 8)}, "k must be"),
        ({"v": torch.zeros(2, 5, 6, 1, 8)}, "v has shape"),
        ({"blocks": torch.zeros(2, 3, 2, dtype=torch.int32)}, r"blocks must be \[B,T,J,K\]"),
        ({"blocks": torch.zeros(2, 4, 2, 1, dtype=torch.int32)}, "T=3"),
        ({"blocks": torch.zeros(2, 3, 2, 0, dtype=torch.int32)}, "blocks must be"),
        ({"blocks": torch.zeros(2, 3, 3, 1, dtype=torch.int32)}, "J a divisor of 4 heads"),
        ({"blocks": torch.zeros(2, 3, 1, 1, dtype=torch.int32)}, "multiple of 2 key/value heads"),
        ({"starts": torch.zeros(2, 6, dtype=torch.int32)}, r"starts must be \(2, 5\)"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int32)}, r"positions must be \(2, 3\)"),
        ({"k": GOOD["k"].double()}, "k is torch.float64"),
        ({"v": GOOD["v"].int()}, "v is torch.int32"),
        ({"k": GOOD["k"].to("meta")}, "k is on meta"),
        ({"blocks": GOOD["blocks"].long()}, "blocks must be int32"),
        ({"starts": GOOD["starts"].to("meta")}, "starts must be int32 on cpu"),
        ({"positions": GOOD["positions"].float()}, "positions must be int32"),
        ({"backend": "flash"}, "unknown backend 'flash'"),
    ],
)
def test_wrong_arguments_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        sparse_attention(**GOOD | changes)


def test_a_named_backend_is_never_replaced():
    with pytest.raises(ValueError, match="float32, not float64"):
        sparse_attention(*(x.double() if x.is_floating_point() else x for x in GOOD.values()), backend="cpu")


@pytest.mark.parametrize("size", [1, 17, 300, HEAD_SIZES[-1]])
def test_head_sizes(fast, size):
    check(example(1, 9, 2, 1, size, length=4, listed=2), fast)
