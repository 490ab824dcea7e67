"""What must hold on a GPU; `make gpu-check` runs these."""

import pytest
import tiny
import torch

from kernels.wkv7 import wkv7
from models.objectives import Align, Distill

pytestmark = pytest.mark.gpu


def inputs(tokens: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Operator inputs of the sizes that a mixer makes: unit removed keys, decays between 0.545 and 1."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (2, tokens, 3, 64)
    r, k, v, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5))
    unit = torch.nn.functional.normalize(a, dim=-1)
    log_w = -0.6065 * torch.sigmoid(b)
    found = {"r": r / 8, "log_w": log_w, "k": k / 8, "v": v, "a": -unit, "b": unit * torch.sigmoid(k)}
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in found.items()}


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 1000])
def test_chunked_wkv7_matches_the_float64_reference(tokens: int):
    torch.backends.cuda.matmul.allow_tf32 = False
    ids = (torch.arange(tokens) // 40).int().expand(2, tokens)
    exact, fast = inputs(tokens, "cpu", torch.float64), inputs(tokens, "cuda", torch.float32)
    expected, _ = wkv7(**exact, document_ids=ids, backend="reference")
    found, _ = wkv7(**fast, document_ids=ids.cuda(), backend="chunked")
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected * weight).sum().backward()
    (found * weight.cuda().float()).sum().backward()
    pairs = [(expected.detach(), found.detach())] + [(exact[name].grad, fast[name].grad) for name in exact]
    for right, got in pairs:
        difference = (got.double().cpu() - right).pow(2).mean().sqrt()
        assert difference < 1e-5 * right.pow(2).mean().sqrt().clamp_min(1e-12)


@pytest.mark.parametrize("objective", [Align(), Distill(chunk_tokens=64)])
def test_a_training_step_on_the_gpu_equals_that_on_the_cpu(objective: object):
    losses = {}
    for device in ("cpu", "cuda"):
        teacher = tiny.tiny_teacher().to(device)
        torch.manual_seed(0)
        student, _ = tiny.convert(tiny.tiny_teacher(), tiny.student_config(keep=[1]))
        student.to(device)
        ids = torch.arange(2 * 96, device=device).view(2, 96) % 60
        documents = (torch.arange(96, device=device) // 50).int().expand(2, 96)
        batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "document_ids": documents}
        total = objective(student, teacher, batch).total
        total.backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
        losses[device] = float(total)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
