"""Runs Triton kernels in Triton's interpreter and prints how far they are from the float64 definition.

`python tests/triton_parity.py wkv7` prints one line of JSON: check -> result -> relative RMS error (for
"repeatable": 0 where two runs agree to the last bit). A process of its own, because the interpreter must be
chosen before Triton is imported. Every output and all scratch memory begin as NaN.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parent.parent))  # started as a script, from anywhere

from kernels import custom_ops
from kernels.examples import INPUTS, Example, errors, example, results, truth

ANY_DECAY = (0.05, 0.9999)
IDS = torch.tensor(
    [
        [-1] * 3 + [0] * 10 + [1] + [2] * 40 + [-1] * 5 + [2] * 3 + [3] * 28 + [-1] * 10,
        [4] * 16 + [5] * 16 + [-1] * 32 + [6] * 36,
        [-1] * 100,
    ],
    dtype=torch.int32,
)


def repair_interpreter() -> None:
    """Make bfloat16 and TF32 what they are on a GPU, and calls of device functions cheaper.

    The interpreter multiplies the bit patterns of bfloat16 as integers, truncates what it converts to it, and
    takes TF32 for float32 (here it is truncated, the worse of what devices do).
    """
    builder = interpreter.InterpreterBuilder
    multiply, cast = builder.create_dot, builder.cast_impl

    def widened(handle) -> np.ndarray:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, input_precision, imprecise):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widened(x), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision.name.upper() == "TF32":
            mask = np.uint32(0xFFFFE000)
            a, b = (
                interpreter.TensorHandle((x.data.view(np.uint32) & mask).view(np.float32), tl.float32)
                for x in (a, b)
            )
        return multiply(self, a, b, d, input_precision, imprecise)

    def cast_impl(self, source, kind):
        if kind.scalar == tl.bfloat16 != source.dtype.scalar:
            exact = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
            bits = exact.bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 != kind.scalar:
            return interpreter.TensorHandle(
                widened(source).astype(interpreter._get_np_dtype(kind)), kind.scalar
            )
        return cast(self, source, kind)

    patched = set()

    def call(self, *args, **kwargs):
        """The language is patched once for each module, and not again in each call."""
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter.InterpretedFunction.__call__ = call


def poisoned(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that shows what was not written."""
    return torch.full(tuple(shape), math.nan, dtype=dtype, device=device)


def as_on(op: str, device: str) -> None:
    """Launch, and multiply in the precision, as on a device of this name."""
    module = importlib.import_module(f"kernels.{op}.triton")
    module.architecture = lambda _: device


def far(made: Example, dtype: torch.dtype = torch.float32, dirty: bool = False) -> dict[str, float]:
    """Errors of a call; `dirty`: with NaN in its padding, where gradients and outputs must be 0."""
    exact = truth(made)
    if dirty:
        for name in INPUTS[made.op]:
            made.inputs[name][made.document_ids < 0] = math.nan
    return errors(results(made, "triton", dtype), exact)


def steps(op: str, bonus: bool, dtype: torch.dtype) -> dict[str, float]:
    """Token by token, with resets and padding by code."""
    made = example(op, 3, 6, 2, 64, bonus=bonus, rounded=dtype)
    made.document_ids = torch.tensor([[0] * 3 + [1] * 3, [-1] * 2 + [0] * 4, [3] * 6], dtype=torch.int32)
    codes = torch.tensor([[0] * 3 + [1] + [0] * 2, [2] * 2 + [0] * 4, [0] * 6], dtype=torch.int8)
    exact = truth(made, backward=False)
    kinds = {name: torch.float32 if name in ("log_w", "state", "u") else dtype for name in made.inputs}
    inputs = {name: x.to(kinds[name]) for name, x in made.inputs.items()}
    state, outputs = inputs.pop("state").clone(), []
    step = getattr(importlib.import_module(f"kernels.{op}"), f"{op}_step")
    for t in range(6):
        token = {name: x if name == "u" else x[:, t] for name, x in inputs.items()}
        outputs.append(step(**token, state=state, codes=codes[:, t].contiguous(), backend="triton"))
    return errors({"y": torch.stack(outputs, dim=1), "state_out": state}, exact)


def clearing(made: Example) -> Example:
    """Decays of exactly zero and of one between others."""
    log_w = made.inputs["log_w"]
    log_w[:, 10], log_w[:, 20:25], log_w[:, 33, :, ::2], log_w[:, 40:60] = -math.inf, -1e30, -300.0, 0.0
    return made


def forgotten(made: Example) -> dict[str, float]:
    """The gradient of a decay of zero is zero, with no rounding left in it; and the errors of the call."""
    exact, found = truth(made), results(made, "triton")
    zero = (found["dlog_w"][made.inputs["log_w"] < -100] == 0).all()
    return errors(found, exact) | {"noise": 0.0 if zero else math.inf}


def same_keys(made: Example) -> Example:
    """The same key removed and written at every token, nothing decaying: powers of A_ab would be huge."""
    for name in ("a", "b", "k"):
        made.inputs[name] = made.inputs[name][:, :1].expand_as(made.inputs[name]).clone()
    made.inputs["b"] = -made.inputs["a"]
    made.inputs["log_w"].zero_()
    return made


def in_parts(made: Example) -> dict[str, float]:
    """Scratch for one unit at a time: as many launches as units."""
    module = importlib.import_module(f"kernels.{made.op}.triton")
    module.SCRATCH, scratch = 1, module.SCRATCH
    try:
        return far(made)
    finally:
        module.SCRATCH = scratch


def repeated(made: Example) -> dict[str, float]:
    first, second = results(made, "triton"), results(made, "triton")
    return {name: float(not torch.equal(x, second[name])) for name, x in first.items()}


def checks(op: str, bonus: bool) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Names of checks and what runs them; a name ends in the tolerance that holds."""

    def made(batch, tokens, heads, size, **options) -> Example:
        return example(op, batch, tokens, heads, size, bonus=bonus, **options)

    def documented(size: int, **options) -> Example:
        call = made(3, 100, 1, size, **options)
        call.document_ids = IDS
        return call

    lengths = [(t, 32) for t in (1, 2, 15, 16, 17, 63, 64, 100)] + [(17, 64), (100, 64), (1, 128), (65, 128)]
    for seed, (tokens, size) in enumerate(lengths):
        batch = 2 if tokens < 60 else 1
        call = made(batch, tokens, 1, size, seed=seed, decay=ANY_DECAY, documents=batch == 2)
        yield f"T={tokens} N={size}: fp32", lambda call=call: far(call)
    for decay in ((0.05, 0.06), (0.6, 1.0), (0.99, 0.9999)):
        yield f"decay {decay}: fp32", lambda decay=decay: far(made(1, 70, 2, 32, decay=decay))
    yield "decays of zero: fp32", lambda: forgotten(clearing(made(1, 70, 1, 32)))
    yield "documents and NaN in padding: fp32", lambda: far(documented(32), dirty=True)
    yield "a launch for each unit: fp32", lambda: in_parts(made(2, 20, 2, 32, documents=True))
    if op == "wkv7":
        yield "repeated keys: fp32", lambda: far(same_keys(made(1, 70, 1, 32)))
    yield "step: fp32", lambda: steps(op, bonus, torch.float32)
    yield "step in bf16: 16-bit", lambda: steps(op, bonus, torch.bfloat16)
    yield "repeatable: fp32", lambda: repeated(made(2, 33, 1, 32, documents=True))

    def rounded(device: str, call: Example, dtype: torch.dtype, **options) -> dict[str, float]:
        """On a device, with float32 allowed to become TF32."""
        torch.set_float32_matmul_precision("high")
        as_on(op, device)
        return far(call, dtype, **options)

    bf16, fp16 = torch.bfloat16, torch.float16
    yield "TF32: tf32", lambda: rounded("sm_90", made(1, 100, 1, 64), torch.float32)
    for decay in (ANY_DECAY, (0.6, 1.0), (0.99, 0.9999)):
        call = made(1, 130, 1, 64, decay=decay, rounded=bf16)
        yield f"bf16, decay {decay}: 16-bit", lambda call=call: rounded("sm_90", call, bf16)
    yield "bf16, N=128: 16-bit", lambda: rounded("sm_90", made(1, 65, 1, 128, rounded=bf16), bf16)
    yield "fp16: 16-bit", lambda: rounded("gfx1100", made(1, 65, 1, 64, rounded=fp16), fp16)
    yield (
        "bf16, documents and NaN in padding: 16-bit",
        lambda: rounded("gfx942", documented(32, rounded=bf16), bf16, dirty=True),
    )


def main() -> None:
    op, bonus = sys.argv[1], "bonus" in sys.argv[2:]
    np.seterr(all="ignore")  # infinities that a mask then drops
    repair_interpreter()
    custom_ops.allocate = poisoned
    package = importlib.import_module(f"kernels.{op}")
    # What `prepare` does on a GPU, a check against the definition, is all that happens here.
    ready = {name: replace(x, prepare=None) if name == "triton" else x for name, x in package.TABLE.items()}
    package.TABLE.update(ready)
    package.BACKENDS = tuple(ready.values())
    print(json.dumps({name: check() for name, check in checks(op, bonus)}))


if __name__ == "__main__":
    main()
