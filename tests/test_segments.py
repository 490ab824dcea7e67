"""Rows in segments: the loss of the whole row, gradients within a segment, and the memory of one segment."""

import pytest
import torch
from test_stage import stage
from tiny import SavedBytes, convert, disturb, packed_batch, tiny_student, tiny_teacher
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.backbone import hidden_states, output_head
from models.config import StudentConfig
from models.layer_plan import LayerPlan
from models.losses import IGNORED, cross_entropy
from models.mixers import RWKV6Options, RWKV7Options, SlidingWindowOptions
from models.objectives import Align, CrossEntropy, Distill, LongCrossEntropy
from models.preference import DirectPreference
from models.segments import detach

OBJECTIVES = {
    "cross_entropy": CrossEntropy(chunk_tokens=7),
    "long_cross_entropy": LongCrossEntropy(short_loss="somewhere", chunk_tokens=7),
    "distill": Distill(cross_entropy_weight=0.3, chunk_tokens=7),
}
ROWS = {
    "whole": [[40], [40]],
    "packed": [[9, 15, -4, 12], [-3, 25, 1, 11]],
    "padded": [[-14, 20, -6], [40]],
}
MIXERS = {
    "rwkv7": RWKV7Options(),
    "arwkv": RWKV7Options(rope=False, token_shift=True, bonus=True, group_norm=True, written_key="raw"),
    "rwkv6": RWKV6Options(),
    "sliding_window": SlidingWindowOptions(window=6, sinks=2),
}


def student_of(teacher: PreTrainedModel, flavour: str, keep=()) -> PreTrainedModel:
    name = "rwkv7" if flavour == "arwkv" else flavour
    config = StudentConfig(layer_plan=LayerPlan(mixer=name, keep=keep), mixers={name: MIXERS[flavour]})
    student, _ = convert(teacher, config)
    disturb(student, 0.1)
    return student.train()


def batch_of(rows: str) -> dict[str, Tensor]:
    batch = packed_batch(ROWS[rows])
    batch["short_loss"] = 5 * torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(5))
    batch["weights"] = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(6))
    return batch


@pytest.mark.parametrize("length", [1, 7, 16, 39])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("flavour", MIXERS)
def test_the_loss_in_segments_is_that_of_the_whole_row(flavour, rows, length):
    teacher = tiny_teacher()
    student, batch = student_of(teacher, flavour, keep=(1,)), batch_of(rows)
    for objective in OBJECTIVES.values():
        whole = objective(student, teacher, batch)
        parts = objective(student, teacher, batch, segment_length=length)
        torch.testing.assert_close(parts.total, whole.total, rtol=1e-5, atol=1e-5)
        for name, value in whole.parts.items():
            torch.testing.assert_close(parts.parts[name], value, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert not objective(student, teacher, batch, segment_length=length).total.requires_grad


@pytest.mark.parametrize("flavour", MIXERS)
def test_gradients_are_those_of_a_loop_that_detaches_the_state(flavour):
    student, batch = student_of(tiny_teacher(), flavour, keep=(1,)), packed_batch(ROWS["packed"])
    student.get_input_embeddings().requires_grad_(False)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    cache, losses = DynamicCache(config=student.config), []
    for start in range(0, 40, 16):
        here = slice(start, start + 16)
        hidden = hidden_states(
            student, batch["input_ids"][:, here], batch["document_ids"][:, : start + 16], cache
        )
        labels = batch["labels"][:, here]
        losses.append(
            cross_entropy(output_head(student)(hidden[labels != IGNORED]), labels[labels != IGNORED])
        )
        detach(cache)
    plain = torch.autograd.grad(torch.cat(losses).mean(), parameters, allow_unused=True)
    total = CrossEntropy(chunk_tokens=5)(student, None, batch, segment_length=16).total
    found = torch.autograd.grad(3 * total, parameters, allow_unused=True)
    for parameter, wanted, gradient in zip(parameters, plain, found, strict=True):
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        torch.testing.assert_close(gradient / 3, wanted, rtol=1e-4, atol=1e-6)
    whole = torch.autograd.grad(CrossEntropy()(student, None, batch).total, parameters, allow_unused=True)
    apart = max(float((a / 3 - b).abs().max()) for a, b in zip(found, whole, strict=True) if b is not None)
    assert apart > 1e-4  # something did flow across the segments before


@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_does_not_grow_with_the_row(name):
    teacher = tiny_teacher()
    student, peaks = tiny_student(teacher).train(), {}
    for segments in (0, 32):
        for length in (64, 256):
            batch = packed_batch([[length]])
            batch["short_loss"] = torch.zeros(1, length)
            with SavedBytes() as saved:
                OBJECTIVES[name](student, teacher, batch, segment_length=segments).total.backward()
            peaks[segments, length] = saved.peak
    assert peaks[0, 256] > 3 * peaks[0, 64]
    assert peaks[32, 256] < 1.05 * peaks[32, 64] < peaks[0, 64]


@pytest.mark.parametrize("objective", [Align(), DirectPreference(), None], ids=["align", "dpo", "none"])
def test_objectives_that_need_whole_rows_are_refused(objective):
    with pytest.raises(ValueError, match="stage.distill.segment_length=8 needs an objective that reads"):
        stage(objective=objective, segment_length=8)
    with pytest.raises(ValueError, match="segment_length=-1 must be at least 0"):
        stage(objective=CrossEntropy(), segment_length=-1)
    stage(objective=CrossEntropy(), segment_length=8)
