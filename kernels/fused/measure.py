"""Times the fused parts against plain torch: `python -m kernels.fused.measure` on a machine with a GPU.

It says whether a part pays; nothing takes the Triton kernels by itself before that is known.
"""

import sys

import torch
from torch import Tensor

from kernels import fused
from kernels.bench.timing import Clock, interleaved

SHAPE = (8, 4096, 32, 8, 64)  # B, T, H, G, N
BACKENDS = ("reference", "triton")


def calls(shape: tuple[int, ...], device: str) -> dict[str, dict[str, Tensor]]:
    """Part -> its inputs in float32, with everything that it may be given."""
    batch, tokens, heads, groups, size = shape
    torch.manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, requires_grad=True)

    def row(channels: int = heads) -> Tensor:
        return normal(batch, tokens, channels, size)

    width = heads * size
    ending = {"y": row(), "r": row(), "k": row(), "v": row(), "bonus": normal(heads, size)}
    ending |= {"norm_weight": normal(width), "norm_bias": normal(width), "gate": normal(batch, tokens, width)}
    hidden = {"hidden": normal(batch, tokens, width), "previous": normal(batch, tokens, width)}
    return {
        "prepare": {"decay": row(), "rate": row(), "key": row(groups)},
        "finish": ending,
        "shift": hidden | {"mixes": normal(6, width)},
    }


def measure(
    shape: tuple[int, ...], device: str, backends: tuple[str, ...] = BACKENDS, repeats: int = 20
) -> dict[str, dict[str, float]]:
    """Part -> backend -> the least milliseconds of forward + backward, in turns.

    Args:
        shape: B, T, H, G, N.
        device: "cuda", or "cpu".
        backends: of kernels.fused.
        repeats: of each.
    """
    found = {}
    for part, inputs in calls(shape, device).items():

        def once(backend: str, part: str = part, inputs: dict[str, Tensor] = inputs) -> None:
            made = getattr(fused, part)(**inputs, backend=backend)
            outputs = [made] if isinstance(made, Tensor) else list(made)
            torch.autograd.grad(outputs, list(inputs.values()), outputs)

        jobs = {backend: lambda backend=backend, once=once: once(backend) for backend in backends}
        for job in jobs.values():
            job()
        times = interleaved(jobs, Clock(device), repeats, seconds=20.0)
        found[part] = {backend: min(runs) for backend, runs in times.items()}
    return found


def report(found: dict[str, dict[str, float]]) -> str:
    """A table in Markdown."""
    lines = ["| part | plain torch, ms | Triton, ms | ratio |", "| --- | ---: | ---: | ---: |"]
    for part, times in found.items():
        plain, kernel = (times[backend] for backend in BACKENDS)
        lines.append(f"| {part} | {plain:.3f} | {kernel:.3f} | {plain / kernel:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("torch finds no usable GPU; nothing was measured")
    sys.stdout.write(f"{torch.cuda.get_device_name()}, B T H G N = {SHAPE}, forward + backward, float32\n\n")
    sys.stdout.write(report(measure(SHAPE, "cuda")))
