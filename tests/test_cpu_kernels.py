"""What is particular to the C++ backends; what every backend must do is in test_operators.py."""

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from compilers import require_compiler
from operator_calls import STEPS, VARIANTS, call, check
from torch import Tensor

from kernels import native
from kernels.examples import INPUTS, Example, results, truth

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=VARIANTS)
def variant(request) -> tuple[str, bool]:
    """An operator, and whether it has its bonus; skipped only where nothing can compile C++."""
    require_compiler()
    return VARIANTS[request.param]


@pytest.fixture
def threads():
    """Sets the number of threads; sets it back to one."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def calls_of(monkeypatch) -> list[tuple[str, int, list[Tensor | None]]]:
    """Every call of the library from here on: entry, number of threads, tensors."""
    made, original = [], native.call

    def recorded(operator, entry, shape, tensors):
        made.append((entry, torch.get_num_threads(), list(tensors)))
        original(operator, entry, shape, tensors)

    monkeypatch.setattr(native, "call", recorded)
    return made


@pytest.mark.parametrize("size", [32, 64, 128])
def test_any_number_of_threads_gives_the_same_bits(variant, threads, monkeypatch, size):
    """More threads than heads, fewer, and a number that does not divide them."""
    made = call(variant, batch=3, tokens=2_000_000 // (6 * size * size), size=size, documents=True)
    alone, calls = results(made, "cpu"), calls_of(monkeypatch)
    for number in (2, 4, 7):
        threads(number)
        together = results(made, "cpu")
        assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert [(entry, number) for entry, number, _ in calls] == [
        (entry, number) for number in (2, 4, 7) for entry in ("forward", "backward")
    ]


def step(made: Example) -> tuple[Tensor, Tensor]:
    """One decoding step of a call's first tokens: y and the new state."""
    inputs = {
        name: x.float() if name in ("u", "state") else x[:, 0].float() for name, x in made.inputs.items()
    }
    codes = (torch.arange(len(inputs["r"])) % 3).to(torch.int8)
    return STEPS[made.op](**inputs, codes=codes, backend="cpu"), inputs["state"]


def test_a_large_step_on_threads_gives_the_same_bits(variant, threads):
    made = call(variant, batch=8, tokens=1, heads=32, size=64)
    alone = step(made)
    threads(2)
    assert all(torch.equal(x, y) for x, y in zip(alone, step(made), strict=True))


FORKED = """
import os, sys, torch
from kernels import native
operator, shape = sys.argv[1], (2, 300, 2, 64)
inputs = [torch.rand(shape) - 0.5 for _ in range(6 if operator == "wkv7" else 4)]
inputs[1] -= 0.5
inputs += [torch.ones(2, 64)] * (operator == "wkv6") + [torch.zeros(2, 2, 64, 64), None]
here, there = ([torch.zeros(shape), torch.zeros(2, 2, 64, 64)] for _ in range(2))
torch.set_num_threads(2)
native.call(operator, "forward", shape, [*inputs, *here, *[None] * (operator == "wkv7")])
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
native.call(operator, "forward", shape, [*inputs, *there, *[None] * (operator == "wkv7")])
torch.set_num_threads(1)  # from here on torch itself must not wait for threads that are gone
os._exit(0 if all(map(torch.equal, here, there)) else 1)
"""


@pytest.mark.parametrize("operator", STEPS)
def test_a_forked_process_has_threads_of_its_own(operator):
    """The threads shared with torch do not outlive a fork: a child that used them would wait for ever."""
    require_compiler()
    script = [sys.executable, "-c", FORKED, operator]
    process = subprocess.Popen(script, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, text=True)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):  # a child that waits for ever would outlive its parent
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors


narrow_library = cache(native.library.__wrapped__)  # as it is built for processors without AVX-512


@pytest.mark.parametrize("size", [32, 64, 128])
def test_narrow_vectors(variant, monkeypatch, size):
    """The eight-lane code of processors without AVX-512 is right too, forward, backward and step."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("needs an x86 processor with AVX2 to run code built for one")
    narrow = [flag for flag in native.compiler_flags() if "march" not in flag] + ["-march=haswell"]
    wide = step(call(variant, batch=3, size=size))
    monkeypatch.setattr(native, "compiler_flags", lambda: narrow)
    monkeypatch.setattr(native, "library", narrow_library)
    made = call(variant, tokens=70, size=size, documents=True)
    check(results(made, "cpu"), truth(made))
    for x, y in zip(wide, step(call(variant, batch=3, size=size)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_forgotten_state_has_no_gradient_at_all(variant):
    """Where the decay is 0 the gradient of its logarithm is 0 and not a rounding error."""
    made = call(variant, tokens=40)
    made.inputs["log_w"][:, ::3] = -math.inf
    gradient = results(made, "cpu")["dlog_w"]
    assert (gradient[:, ::3] == 0).all() and (gradient[:, 1::3] != 0).all()


def test_inference_keeps_nothing(variant, monkeypatch):
    """Without a backward pass to come nothing is kept for it, and the results are the same."""
    made = call(variant, tokens=40, documents=True)
    kept, calls = results(made, "cpu"), calls_of(monkeypatch)
    found = results(made, "cpu", backward=False)
    assert all(torch.equal(found[name], kept[name]) for name in ("y", "state_out"))
    [(entry, _, tensors)] = calls
    outputs = tensors[len(INPUTS[made.op]) + (made.op == "wkv6") + 2 :]
    assert entry == "forward"
    assert [x is None for x in outputs] == ([False, False, True] if made.op == "wkv7" else [False, False])


@pytest.mark.parametrize("entry", ["forward", "backward"])
def test_exhausted_memory_is_an_error(variant, entry):
    """A row so long that no memory holds its bookkeeping."""
    op, bonus = variant
    shape, state = (1, 1 << 50, 1, 64), torch.zeros(1, 1, 64, 64)
    tokens = torch.zeros(1).expand(shape)
    inputs = [tokens] * len(INPUTS[op]) + ([torch.zeros(1, 64) if bonus else None] if op == "wkv6" else [])
    arguments = [*inputs, state, None]
    if entry == "forward":
        arguments += [tokens, state] + [None] * (op == "wkv7")
    else:
        arguments = [tokens, state, *arguments] + [tokens] * (op == "wkv7") + [tokens] * len(inputs) + [state]
    with pytest.raises(MemoryError, match=rf"C\+\+ {op} ran out of memory at \[B,T,H,N\]"):
        native.call(op, entry, shape, arguments)


def test_wrong_calls_are_refused(variant):
    op, _ = variant
    inputs = [torch.zeros(1, 1, 1, 48)] * 12
    with pytest.raises(ValueError, match="not compiled for head size 48"):
        native.call(op, "step", (1, 1, 1, 48), inputs)
    with pytest.raises(ValueError, match="takes float32 and integer tensors, got torch.bfloat16"):
        native.call(op, "step", (1, 1, 1, 48), [x.bfloat16() for x in inputs])
