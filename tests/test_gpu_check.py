"""gpu_check survives what may happen on a machine that nobody has seen; its parts run on the CPU here."""

import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarks import FP32, PEAKS, SMALL, raising_peer, replace_backend, row

from kernels.bench import gpu_check
from kernels.bench.calls import BOTH, FORWARD, Shape
from kernels.bench.checks import RIGHT, UNABLE, UNBUILT, WRONG
from kernels.bench.child import Child
from kernels.bench.decode import decode
from kernels.bench.gpu_check import Budget, Plan
from kernels.bench.parity import Kind, kinds, parity
from kernels.bench.part import run_speed
from kernels.bench.report import aims, report
from kernels.bench.results import Findings, write
from kernels.bench.table import Bench
from kernels.wkv7 import chunked

ROOT = Path(__file__).parent.parent


def test_kinds_of_call():
    found = kinds()
    assert len(set(found)) == len(found) == 3 * 3 * 3 * (7 * 2 + 1)
    assert {kind.tokens for kind in found if not kind.documents} == {1, 2, 15, 16, 17, 63, 64}
    assert found[0].head_size == 64


KIND = Kind(op="wkv7", bonus=False, dtype="float32", head_size=32, tokens=5, documents=True)


def test_parity_finds_what_is_wrong(monkeypatch):
    (fine,) = parity("chunked", "cpu", [KIND])
    assert fine["check"] == RIGHT and fine["backend"] == "chunked" and fine["tokens"] == 5
    calls = itertools.count()

    def restless(r, *rest):
        y, state = chunked.run(r, *rest)
        return y * (1 + 1e-7 * (next(calls) % 2)), state

    replace_backend(monkeypatch, "chunked", run=restless)
    (found,) = parity("chunked", "cpu", [KIND])
    assert found["check"] == WRONG and "two runs differ in y" in found["reason"]
    replace_backend(monkeypatch, "chunked", run=raising_peer)
    (found,) = parity("chunked", "cpu", [KIND])
    assert found["check"] == WRONG and "illegal memory access" in found["reason"]
    replace_backend(monkeypatch, "chunked", supports=lambda case: "not today")
    (found,) = parity("chunked", "cpu", [KIND])
    assert (found["check"], found["reason"]) == (UNABLE, "not today")


def test_decoding_steps():
    rows = list(decode("wkv6", SMALL, FP32, "cpu", ["chunked"], PEAKS))
    assert [(x["backend"], x["check"], x["graph_us"]) for x in rows] == [("chunked", RIGHT, None)]
    assert rows[0]["plain_us"] > rows[0]["floor_us"] > 0


def test_a_budget_runs_down():
    clock = iter([0.0, 10.0, 80.0, 90.0, 500.0]).__next__
    budget = Budget(100.0, now=clock)
    assert budget.left(20) == 20
    assert budget.left(20) == 100 - 80 - gpu_check.END_GRACE
    assert budget.left() == budget.left(5) == 0


def test_calls_are_skipped_where_the_time_is_short(monkeypatch):
    """The first call of an operator compiles: it says nothing about the next one."""
    clock = {"now": 0.0}
    durations = iter([50.0, 10.0, 30.0])

    def measure(self, op, shape):
        clock["now"] += next(durations)
        return [row(shape=shape, what=FORWARD)]

    monkeypatch.setattr(Bench, "measure", measure)
    shapes = [{"batch_size": 1, "sequence_length": t, "heads": 1, "head_size": 32} for t in (1, 2, 3, 4, 5)]
    peaks = {"bandwidth": 1e9, "flops": 1e9}
    options = {"backends": ["chunked"], "operators": ["wkv7"], "shapes": shapes, "peaks": peaks}
    found = list(run_speed("cpu", "float32", **options, seconds=1, limit=100.0, now=lambda: clock["now"]))
    assert [x.get("sequence_length") for x in found] == [1, 2, 3, None, None]
    assert found[-1] == {"skipped": "speed of wkv7 B1 T5 H1 N32: no time was left"}


@pytest.fixture
def plan() -> Plan:
    """A rehearsal of gpu_check on the CPU, as small as can be."""
    return Plan(
        device="cpu", backends=["chunked"], kinds=[KIND], shapes=[SMALL], decoding=[SMALL],
        operators=["wkv7"], dtype="float32", seconds=0.05, tests=False,
        peak_sizes={"copied": 2**20, "edge": 64, "runs": 1},
    )  # fmt: skip


def test_rehearsal_of_gpu_check(plan, tmp_path):
    """Every part as a process of its own, and the files that are left behind."""
    found = gpu_check.check(plan, Budget(120))
    assert not found.failed() and not found.notes
    assert [x["check"] for x in found.parity] == [RIGHT]
    assert [(x.backend, x.what) for x in found.speed] == [("chunked", FORWARD), ("chunked", BOTH)]
    assert all(x.ms > 0 for x in found.speed) and found.decode[0]["plain_us"] > 0
    paths = write(tmp_path, found, report)
    assert sorted(p.suffix for p in paths) == [".csv", ".csv", ".json", ".md", ".png"]
    assert {p.parent for p in paths} == {tmp_path} and all(found.facts["date"] in p.name for p in paths)
    page = paths[0].read_text()
    assert "| chunked | wkv7 | float32 | 1 of 1 |" in page and f"![times and floors]({paths[4].name})" in page
    assert json.loads(paths[1].read_text())["facts"]["torch"] == torch.__version__


def test_without_time_everything_is_skipped(plan, tmp_path):
    found = gpu_check.check(plan, Budget(0))
    assert len(found.notes) == 3 and all("no time" in x or "for want of" in x for x in found.notes)
    assert "no time was left" in write(tmp_path, found, report)[0].read_text()


def test_a_part_that_crashes_or_hangs_is_survived(tmp_path):
    rows, reason, broke = Child(tmp_path, "no part", {"part": "nonsense", "device": "cpu"}).finish(60)
    assert rows == [] and broke and "ended with status 1" in reason and "nonsense" in reason
    hanging = Child(
        tmp_path, "slow part", {"part": "parity", "backend": "chunked", "device": "cpu", "kinds": []}
    )
    rows, reason, broke = hanging.finish(0.0)
    assert rows == [] and broke and "stopped after 0 s" in reason


def test_the_marked_tests_count(tmp_path, monkeypatch):
    """Those marked gpu are run, and only they; a failure and a time limit are both seen."""
    (tmp_path / "tests").mkdir()
    text = "import pytest, time\n@pytest.mark.gpu\ndef test_a():\n    time.sleep({})\n    assert {}\n"
    file = tmp_path / "tests" / "test_one.py"
    (tmp_path / "tests" / "test_other.py").write_text("def test_b():\n    assert False\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for content, failed in ((text.format(0, True), False), (text.format(0, False), True)):
        file.write_text(content)
        found = Findings({})
        gpu_check._tests(Budget(100), found)
        assert found.tests_failed == failed and "1 failed" * failed in found.tests and not found.notes
    file.write_text(text.format(100, True))
    found = Findings({})
    gpu_check._tests(Budget(gpu_check.END_GRACE + 0.5), found)
    assert not found.tests_failed and "stopped after" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, False),
        ({"parity": [{"backend": "cuda", "check": WRONG}]}, True),
        ({"parity": [{"backend": "fla", "check": WRONG}]}, False),
        ({"parity": [{"backend": "cuda", "check": UNABLE}]}, False),
        ({"parity": [{"backend": "cuda", "check": UNBUILT}]}, True),
        ({"speed": [row("triton", ms=None, check=WRONG)]}, True),
        ({"decode": [{"backend": "triton", "check": WRONG}]}, True),
        ({"broken": ["parity of cuda"]}, True),
        ({"broken": ["parity of fla"]}, False),
        ({"tests_failed": True}, True),
    ],
)
def test_what_fails_gpu_check(changes, failed):
    """A mistake of somebody else's code is shown, but is no failure of ours."""
    assert Findings({}, **changes).failed() == failed


def test_the_aims_are_judged():
    other = Shape(1, 1024, 16, 64)
    rows = [row("cuda", ms=2.0), row("triton", ms=9.0), row("fla", ms=3.0)]
    rows += [row("cuda", other, ms=2.0), row("fla", other, ms=3.0)]
    rows += [row("cuda", Shape(2, 8, 32, 64), ms=1.0), row("cuda", Shape(3, 8, 32, 64), ms=None, check=WRONG)]
    assert aims(rows) == [
        "wkv7 B8 T4096 H32 N64: cuda is 1.50 x as fast as fla; aim 2: MISSED",
        "wkv7 B8 T4096 H32 N64: cuda 4.0 x floor; aim 5: met",
        "wkv7 B8 T4096 H32 N64: triton 18.0 x floor; aim 5: MISSED",
        "wkv7 B8 T4096 H32 N64: fla 6.0 x floor; aim 5: MISSED",
        "wkv7 B1 T1024 H16 N64: cuda is 1.50 x as fast as fla; aim 1: met",
        "wkv7 B2 T8 H32 N64: cuda is the fastest of ours; fla was not timed",
        "wkv7 B3 T8 H32 N64: none of ours was timed",
    ]


def test_a_report_names_every_failure():
    wrong = asdict(KIND) | {"backend": "cuda", "check": WRONG, "error": 0.5, "reason": "off | by\none"}
    page = report(Findings({"device": "GPU", "date": "today"}, parity=[wrong], broken=["speed"]), None)
    assert "WRONG: cuda, wkv7 and documents float32 N32 T5: off / by one" in page
    assert "| cuda | wkv7 | float32 | 0 of 1 |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_run(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert "no GPU that torch can use; nothing was run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_bare_image_is_enough():
    """No Hydra, omegaconf, rich, Lightning, Triton; matplotlib only where something is drawn."""
    missing = ("hydra", "omegaconf", "rich", "lightning", "triton", "matplotlib", "fla")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); import kernels.bench.gpu_check as g; "
        "import kernels.bench.part; print(g.default_plan('cpu').backends)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "chunked" in done.stdout and "reference" not in done.stdout
