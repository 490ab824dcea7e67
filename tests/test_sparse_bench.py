"""What measures sparse attention: its lists, its parity, its times; rehearsed on the CPU."""

import itertools
from dataclasses import replace

import pytest
import torch
from compilers import require_compiler

import kernels.sparse_attention as package
from kernels.bench import gpu_check, sparse
from kernels.bench.calls import BOTH, FORWARD
from kernels.bench.checks import RIGHT, UNABLE, WRONG
from kernels.bench.gpu_check import Budget, Plan
from kernels.bench.part import run_sparse
from kernels.bench.report import report
from kernels.bench.results import Findings
from kernels.sparse_attention import NONE, chunked

KIND = sparse.Kind(dtype="float32", head_size=16, tokens=20, context=0, length=8, watches=1)


def off(*tensors):
    """A backend that is one percent off."""
    y, share = chunked.run(*tensors)
    return y * 1.01, share


def changed(monkeypatch, name: str, **changes) -> None:
    """Another backend under a name that exists."""
    found = [replace(b, **changes) if b.name == name else b for b in package.BACKENDS]
    monkeypatch.setattr(package, "BACKENDS", tuple(found))
    for table in (package.TABLE, sparse.TABLE):
        monkeypatch.setitem(table, name, next(b for b in found if b.name == name))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("tokens", [64, 640, 2688, 8192])
def test_lists(alike, tokens):
    """Distinct blocks, none later, first and window among them; all of them while there are few."""
    found = sparse.lists(torch.arange(tokens), alike)[0]
    own = torch.arange(tokens) // sparse.LENGTH
    assert found.shape == (tokens, sparse.GROUPS, 42)
    ranks = found.sort(-1).values
    assert ((ranks[..., 1:] != ranks[..., :-1]) | (ranks[..., 1:] == NONE)).all()
    assert (found <= own[:, None, None]).all() and (found.amax(-1) == own[:, None]).all()
    assert ((found == 0).sum(-1) == 1).all()
    assert ((found >= 0).sum(-1) == (own + 1).clamp_max(42)[:, None]).all()
    same = (
        (found.unflatten(0, (-1, 64)) == found.unflatten(0, (-1, 64))[:, :1]).all()
        if tokens % 64 == 0
        else alike
    )
    assert same == (alike or tokens <= 2688)


def test_parity_finds_what_is_wrong(monkeypatch):
    (fine,) = sparse.parity("cpu", ["chunked"], [KIND])
    assert fine["check"] == RIGHT and fine["error"] < 2e-6 and fine["tokens"] == 20
    calls = itertools.count()

    def restless(q, *rest):
        y, share = chunked.run(q, *rest)
        return y * (1 + 1e-7 * (next(calls) % 2)), share

    changed(monkeypatch, "chunked", run=restless)
    (found,) = sparse.parity("cpu", ["chunked"], [KIND])
    assert found["check"] == WRONG and "two runs differ in y" in found["reason"]
    changed(monkeypatch, "chunked", run=off)
    (found,) = sparse.parity("cpu", ["chunked"], [KIND])
    assert found["check"] == WRONG and "too large" in found["reason"]
    changed(monkeypatch, "chunked", supports=lambda case: "not today")
    (found,) = sparse.parity("cpu", ["chunked"], [KIND])
    assert (found["check"], found["reason"]) == (UNABLE, "not today")


def test_times():
    """Every pass of every contestant, the peer beside it."""
    require_compiler()
    rows = [*sparse.prefill("cpu", "float32", ["cpu"], [128], 0.01, repeats=1)]
    rows += sparse.decoding("cpu", "float32", ["cpu"], [128], 0.01, repeats=1)
    assert [(r["backend"], r["what"], r["lists"]) for r in rows] == [
        ("cpu", FORWARD, "alike"), ("cpu", BOTH, "alike"), ("cpu", FORWARD, "apart"), ("cpu", BOTH, "apart"),
        ("sdpa", FORWARD, "all"), ("sdpa", BOTH, "all"),
        ("cpu", "decode", "apart"), ("sdpa", "decode", "all"),
    ]  # fmt: skip
    assert all(r["ms"] > 0 for r in rows)
    lines = sparse.table(rows)
    assert lines[0] == "| what (ms) | tokens | cpu, alike | cpu, apart | sdpa, all |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| forward", "| forward+backward", "| decode"]


def test_the_peer_computes_the_same():
    """Where the lists name all blocks, both give the same y: the times are of one task."""
    q, k, v, _ = sparse._tensors(128, 128, "cpu", "float32")
    positions = torch.arange(128, dtype=torch.int32)
    starts = torch.tensor([[0, 64]], dtype=torch.int32)
    pools = [x.unflatten(1, (-1, 64)) for x in (k, v)]
    y, _ = package.sparse_attention(q, *pools, sparse.lists(positions, False), starts, positions[None])
    torch.testing.assert_close(y, sparse._dense(q, k, v))


def test_a_wrong_backend_gets_no_time(monkeypatch):
    changed(monkeypatch, "chunked", run=off)
    monkeypatch.setattr(sparse, "kinds", lambda *_: [KIND])
    rows = list(run_sparse("cpu", "float32", ["chunked"], [64], 0.01))
    assert rows[0]["check"] == WRONG and {r["backend"] for r in rows[1:]} == {"sdpa"}


def test_a_part_of_gpu_check(monkeypatch):
    """In a process of its own, and in the page."""
    require_compiler()
    plan = Plan(
        device="cpu", backends=[], kinds=[], shapes=[], decoding=[], operators=[], dtype="float32",
        seconds=0.01, peak_sizes={"copied": 2**20, "edge": 64, "runs": 1}, sparse=[64], tests=False,
    )  # fmt: skip
    monkeypatch.setattr(sparse, "able", lambda *_: ["cpu"])
    found = gpu_check.check(plan, Budget(120))
    assert not found.failed() and not found.broken
    assert len([r for r in found.sparse if r.get("check") == RIGHT]) == len(sparse.kinds((64,), ("float32",)))
    page = report(found, None)
    assert "* cpu: 4 of 4 kinds of call right" in page and "| forward | 64 |" in page
    assert gpu_check.default_plan("cpu").sparse == gpu_check.SPARSE_LENGTHS


def test_a_wrong_one_fails_gpu_check():
    row = {
        "backend": "triton",
        "check": WRONG,
        "reason": "off",
        "tokens": 3,
        "dtype": "bfloat16",
        "head_size": 64,
    }
    found = Findings({"device": "GPU", "date": "today"}, sparse=[row])
    assert found.failed() and "* WRONG: triton, bfloat16 N64 T3: off" in report(found, None)


def test_the_command(caplog, monkeypatch):
    require_compiler()
    monkeypatch.setattr(sparse, "kinds", lambda: [KIND])
    words = "--device cpu --backends cpu --dtype float32 --lengths 64 --seconds 0.01".split()
    with caplog.at_level("INFO"):
        assert sparse.main(words) == 0
    assert "parity: 0 of 1 not right" in caplog.text and "| decode | 64 |" in caplog.text


def test_the_command_fails_where_a_backend_is_wrong(caplog, monkeypatch):
    changed(monkeypatch, "chunked", run=off)
    monkeypatch.setattr(sparse, "kinds", lambda: [KIND])
    words = "--device cpu --backends chunked --dtype float32 --lengths 64 --seconds 0.01".split()
    with caplog.at_level("INFO"):
        assert sparse.main(words) == 1
    assert "check=WRONG" in caplog.text and "| decode | 64 |" in caplog.text
