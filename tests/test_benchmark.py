"""The kernel benchmark: nothing wrong gets a speed, and floors are what they say."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import AIMED, FP32, PEAKS, SMALL, replace_backend, row

from kernels import custom_ops, dispatch, explain
from kernels.bench.calls import BOTH, FORWARD, PASSES, STEP, Shape, contestants, make_call
from kernels.bench.checks import RIGHT, UNABLE, UNBUILT, WRONG, check_small, poisoned
from kernels.bench.floors import Peaks, bytes_moved, floor_ms, measure_peaks
from kernels.bench.plot import draw
from kernels.bench.table import Bench, Row, remember
from kernels.bench.timing import interleaved, memory_kept
from kernels.jit_build import BuildError
from kernels.wkv7 import chunked, reference
from pipeline.kernel_suite import KernelSuite

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh():
    """No decision survives a test."""
    dispatch.forget()
    yield
    dispatch.forget()


def bench(**options) -> Bench:
    return Bench("cpu", FP32, PEAKS, repeats=2, seconds=1.0, **options)


def by_name(rows: list[Row], what: str = BOTH) -> dict[str, Row]:
    return {row.backend: row for row in rows if row.what == what}


def test_floor_of_the_known_case():
    """B8 T4096 H32 N64 at 4.3 TB/s: 0.22 + 0.41 ms with everything in 16 bits; float32 decays cost more."""
    shape, dtype = AIMED, torch.bfloat16
    narrow = bytes_moved("wkv7", shape, dtype, decay=dtype)
    assert narrow[FORWARD] / 4.3e9 == pytest.approx(0.22, abs=0.005)
    assert narrow["backward"] / 4.3e9 == pytest.approx(0.41, abs=0.005)
    peaks = Peaks(bandwidth=4.3e12, flops=790e12)
    forward, both = (floor_ms(what, "wkv7", shape, dtype, peaks) for what in (FORWARD, BOTH))
    assert forward == pytest.approx(0.25, abs=0.005) and both - forward == pytest.approx(0.47, abs=0.005)
    assert floor_ms(FORWARD, "wkv6", shape, dtype, peaks) < forward


def test_a_floor_is_the_larger_of_memory_and_arithmetic():
    shape = Shape(1, 10, 1, 64)
    operations = 9 * 10 * 64 * 64
    assert floor_ms(FORWARD, "wkv7", shape, FP32, Peaks(1e20, 1e9)) == pytest.approx(operations / 1e6)
    moved = 4 * 10 * 64 * 7 + 2 * 4 * 64 * 64
    assert floor_ms(FORWARD, "wkv7", shape, FP32, Peaks(1e9, 1e20)) == pytest.approx(moved / 1e6)
    state_and_token = 2 * 4 * 64 * 64 + 7 * 64 * 4
    assert floor_ms(STEP, "wkv7", shape, FP32, Peaks(1e9, 1e20)) == pytest.approx(state_and_token / 1e6)


def test_the_rates_of_this_machine():
    peaks = measure_peaks("cpu", copied=2**22, edge=128)
    assert 1e8 < peaks.bandwidth < 1e13 and 1e8 < peaks.flops < 1e14


def test_jobs_take_turns_until_their_time_is_up():
    ran, durations = [], {"quick": 100.0, "slow": 700.0, "slowest": 5000.0}
    jobs = {name: (lambda name=name: ran.append(name)) for name in durations}

    def clock(function) -> float:
        function()
        return durations[ran[-1]]

    times = interleaved(jobs, clock, repeats=4, seconds=1.0)
    assert {name: len(ms) for name, ms in times.items()} == {"quick": 4, "slow": 2, "slowest": 1}
    assert ran == ["quick", "slow", "slowest", "quick", "slow", "quick", "quick"]


@pytest.mark.parametrize("op", ["wkv7", "wkv6"])
def test_right_backends_get_every_figure(op):
    rows = bench(backends=["chunked", "reference"]).measure(op, SMALL)
    assert [(row.backend, row.what) for row in rows] == [
        (name, what) for what in PASSES for name in ("chunked", "reference")
    ]
    for each in rows:
        assert each.check == RIGHT and each.error < 2e-6 and each.ms > 0 and each.runs >= 1
        assert each.times_floor == pytest.approx(each.ms / each.floor_ms)
    for what in PASSES:
        assert min(row.times_fastest for row in by_name(rows, what).values()) == 1
    assert by_name(rows)["chunked"].extra_bytes > 0 and by_name(rows, FORWARD)["chunked"].extra_bytes is None


def test_what_is_wrong_or_missing_gets_no_speed():
    names = ("right_peer", "wrong_peer", "nan_peer", "raising_peer", "no_such_peer")
    peers = {name: f"benchmarks.{name}" for name in names}
    rows = bench(backends=["chunked"], peers=peers).measure("wkv7", Shape(1, 80, 2, 32))
    found = by_name(rows)
    checks = {"chunked": RIGHT, "right_peer": RIGHT, "no_such_peer": UNABLE}
    assert {name: row.check for name, row in found.items()} == checks | {
        name: WRONG for name in ("wrong_peer", "nan_peer", "raising_peer")
    }
    for each in rows:
        assert (each.ms is not None) == (each.check == RIGHT), each
    assert found["wrong_peer"].error > 5e-3 and "y 1.0e-02" in found["wrong_peer"].reason
    assert "not finite at the full shape: y" in found["nan_peer"].reason
    assert "illegal memory access" in found["raising_peer"].reason
    assert "cannot be imported" in found["no_such_peer"].reason
    assert by_name(rows, STEP)["right_peer"].reason == "it has no decoding step"


def test_on_long_calls_backends_are_held_against_the_first_right_one(monkeypatch):
    """Where float64 would take too long; the small call was right in both."""
    monkeypatch.setattr("kernels.bench.checks.EXACT_UP_TO", 10)

    def late(r, *rest):
        y, state = reference.run(r, *rest)
        return (y if r.shape[1] < 70 else y * 1.001), state

    replace_backend(monkeypatch, "reference", run=late)
    found = by_name(bench(backends=["chunked", "reference"]).measure("wkv7", Shape(1, 80, 2, 32)))
    assert found["chunked"].check == RIGHT and found["reference"].check == WRONG
    assert "against chunked at the full shape" in found["reference"].reason


def test_what_cannot_be_built_has_its_reason(monkeypatch):
    def refuses(case):
        raise BuildError("no compiler today")

    def crashes(case):
        raise RuntimeError("the compiler crashed")

    replace_backend(monkeypatch, "chunked", prepare=refuses)
    replace_backend(monkeypatch, "reference", prepare=crashes)
    found = by_name(bench(backends=["chunked", "reference"]).measure("wkv7", SMALL))
    assert {x.check for x in found.values()} == {UNBUILT} and found["chunked"].ms is None
    assert found["chunked"].reason == "no compiler today"
    assert found["reference"].reason == "RuntimeError: the compiler crashed"


def test_a_wrong_step_is_seen(monkeypatch):
    def step(*arguments):
        return reference.step(*arguments) + 1

    replace_backend(monkeypatch, "chunked", step=step)
    found = by_name(bench(backends=["chunked"]).measure("wkv7", SMALL))
    assert found["chunked"].check == WRONG


def test_the_bonus_is_checked_too(monkeypatch):
    """wkv6 that forgets its bonus is right without one."""
    (contestant,) = contestants("wkv6", SMALL.case("cpu", FP32), ["chunked"])
    whole = contestant.run
    forgetful = replace(
        contestant, step=None, run=lambda u=None, **rest: whole(u=None if u is None else 0 * u, **rest)
    )
    assert check_small("wkv6", contestant, 32, FP32, "cpu").check == RIGHT
    assert check_small("wkv6", forgetful, 32, FP32, "cpu").check == WRONG


def test_outputs_that_are_left_out_show():
    with poisoned():
        assert custom_ops.allocate((3,), FP32, torch.device("cpu")).isnan().all()
    custom_ops.allocate((3,), FP32, torch.device("cpu")).zero_()
    assert custom_ops.allocate.__name__ == "allocate"


def test_16_bits():
    found = by_name(Bench("cpu", torch.bfloat16, PEAKS, 1, 1.0, ["chunked"]).measure("wkv6", SMALL))
    assert found["chunked"].check == RIGHT and 1e-4 < found["chunked"].error < 8e-3
    assert found["chunked"].dtype == "bfloat16"


def test_memory_kept_counts_each_memory_once():
    inputs, upstream = make_call("wkv7", SMALL, FP32, "cpu", seed=0)

    class Keeps(torch.autograd.Function):
        """Keeps r twice, and one tensor of 5 KiB."""

        @staticmethod
        def forward(ctx, r, log_w, k, v, a, b, state):
            ctx.save_for_backward(r, r.view(-1), torch.zeros(5 * 256))
            return r.clone(), state.clone()

        @staticmethod
        def backward(ctx, dy, dstate):
            return (dy,) * 6 + (dstate,)

    (contestant,) = contestants("wkv7", SMALL.case("cpu", FP32), ["chunked"])
    keeps = replace(contestant, run=lambda document_ids=None, **x: Keeps.apply(*x.values()))
    found = memory_kept(keeps, inputs, upstream)
    assert found == {"saved_bytes": 4 * SMALL.elements + 5120, "extra_bytes": 5120, "peak_bytes": None}


def test_the_fastest_is_remembered(tmp_path, monkeypatch):
    """Ours only, right ones only, of the largest call of a kind."""
    monkeypatch.setenv("TRANSMUTE_CACHE", str(tmp_path))
    figures = {"dtype": "float32", "what": BOTH}
    small, large = Shape(1, 10, 2, 32), Shape(1, 99, 2, 32)
    rows = [row("chunked", small, ms=1.0, **figures), row("reference", small, ms=2.0, **figures)]
    rows += [row("chunked", large, ms=5.0, **figures), row("reference", large, ms=3.0, **figures)]
    rows += [
        row("cpu", large, ms=None, **figures | {"check": WRONG}),
        row("cpu", large, FORWARD, 0.1, dtype="float32"),
    ]
    remember(rows, "cpu")
    answer = explain("wkv7", head_size=32, units=2)
    assert answer["backend"] == "reference" and "measured slower" in answer["rejected"]["chunked"]
    assert explain("wkv7", head_size=64)["backend"] != "reference"


def suite(**options) -> KernelSuite:
    shape = {"batch_size": 1, "sequence_length": 20, "heads": 2, "head_size": 32}
    return KernelSuite(
        **{"operators": ["wkv7"], "shapes": [shape], "seconds": 0.1, "device": "cpu"} | options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": ["wkv9"]}, "operators: 'wkv9' is unknown; choose from wkv7, wkv6"),
        ({"operators": []}, "at least one"),
        ({"backends": ["chunky"]}, "backends: 'chunky' is unknown; choose from .*chunked"),
        (
            {"shapes": [{"batch_size": 1, "heads": 2}]},
            "must give batch_size, sequence_length, heads, head_size",
        ),
        ({"shapes": [vars(SMALL) | {"heads": 0}]}, "each at least 1"),
        ({"shapes": [vars(SMALL) | {"head_size": 48}]}, "head_size: 48 is unknown; choose from 32, 64, 128"),
        ({"dtype": "float8"}, "dtype: 'float8'"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"tolerance": "loose"}, "tolerance: 'loose'"),
        ({"peers": {"chunked": "a.b"}}, "peers: chunked is the name of a backend"),
    ],
)
def test_what_the_suite_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        suite(**options)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend 'chunky' is unknown; choose from .*chunked"):
        bench(backends=["chunky"]).measure("wkv7", SMALL)


def test_the_suite_ends_with_an_error_where_a_backend_is_wrong(tmp_path, monkeypatch, capsys):
    """The others' figures are there all the same."""

    def wrong(*arguments):
        y, state = chunked.run(*arguments)
        return y + 0.1, state

    replace_backend(monkeypatch, "chunked", run=wrong)
    with pytest.raises(SystemExit, match="a backend is wrong"):
        suite(backends=["chunked", "reference"]).run(tmp_path, seed=0)
    lines = {(x["backend"], x["what"]): x for x in csv.DictReader((tmp_path / "kernels.csv").open())}
    assert lines["chunked", BOTH]["ms"] == "" and float(lines["reference", BOTH]["ms"]) > 0
    assert "chunked WRONG: relative errors too large: y" in " ".join(capsys.readouterr().out.split())


def test_the_script(tmp_path):
    """From the command line: every backend, a peer, two operators, the files."""
    shape = "{batch_size: 1, sequence_length: 20, heads: 2, head_size: 32}"
    command = [
        sys.executable, "benchmark.py", "suite=kernels", f"suite.shapes=[{shape}]", "suite.seconds=0.05",
        "suite.peers={mine: benchmarks.right_peer}", f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wkv7 B1 T20 H2 N32" in done.stdout and "floors:" in done.stdout
    lines = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    assert {"chunked", "reference", "mine"} <= {x["backend"] for x in lines if x["op"] == "wkv7"}
    assert "mine" not in {x["backend"] for x in lines if x["op"] == "wkv6"}
    assert all(x["check"] != WRONG for x in lines)
    assert (tmp_path / "kernels.png").read_bytes()[1:4] == b"PNG"


def test_nothing_to_draw(tmp_path):
    assert draw(tmp_path / "a.png", [row(ms=None)], "title") is None
    shapes = [Shape(rows, 512, 8, 64) for rows in (1, 2, 3, 4, 5)]
    many = [row(name, shape) for name in ("cuda", "somebody") for shape in shapes]
    assert draw(tmp_path / "a.png", many, "title").read_bytes()[1:4] == b"PNG"
