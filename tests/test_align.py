"""Layer-wise alignment against a plain computation: a recorded teacher, mixers beside it, plain autograd."""

from typing import NamedTuple

import pytest
import torch
from tiny import ARWKV, SavedBytes, packed_batch, tiny_student, tiny_teacher
from torch import Tensor
from transformers import PreTrainedModel

from models.align import aligned_layers
from models.architectures import attention_modules
from models.backbone import SequenceContext, has_documents, hidden_states
from models.losses import ALIGNMENT_LOSSES, alignment_l2
from models.objectives import Align
from models.student import student_mixers

ROWS = {"documents": [[-3, 11, 9, 5], [4, 15, -2, 7]], "one_document_per_row": [[24], [24]]}
FLAVOURS = {"radlads": {}, "arwkv": ARWKV, "residual": {"value_residual": True, "gate": "full"}}


class Record(NamedTuple):
    """What one attention module of the teacher read and gave."""

    hidden: Tensor
    positions: tuple[Tensor, Tensor]
    output: Tensor


def recorded(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> dict[int, Record]:
    """Input and output of each attention module, from an ordinary pass."""
    seen, handles = {}, []
    for index, module in attention_modules(teacher).items():

        def keep(module, args, kwargs, output, index=index):
            seen[index] = Record(kwargs["hidden_states"], kwargs["position_embeddings"], output[0])

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        hidden_states(teacher, batch["input_ids"], batch["document_ids"])
    for handle in handles:
        handle.remove()
    return seen


def plain_l2(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).norm(dim=-1) / output.shape[-1] ** 0.5


def plain_losses(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], *, detached: bool = True
) -> dict[int, Tensor]:
    """Loss of each layer with its whole graph; the first layer's value enters the others detached or not."""
    documents, losses, first = batch["document_ids"], {}, None
    real = documents >= 0
    for index, record in recorded(teacher, batch).items():
        mixer = student_mixers(student).get(index)
        if mixer is None:
            continue
        given = first.detach() if detached and first is not None else first
        context = SequenceContext(documents if has_documents(documents) else None, first_value=given)
        output, _ = mixer(record.hidden, record.positions, sequence_context=context)
        first = context.first_value if first is None else first
        losses[index] = plain_l2(output[real], record.output[real]).mean()
    return losses


def mixer_parameters(student: PreTrainedModel) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": parameter
        for index, mixer in student_mixers(student).items()
        for name, parameter in mixer.named_parameters()
    }


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("keep, family", [((), "qwen2"), ((1,), "qwen3"), ((0,), "llama_biased")], ids=str)
def test_losses_and_gradients_equal_a_plain_computation(keep, family, flavour, rows):
    teacher, batch = tiny_teacher(family), packed_batch(ROWS[rows])
    student = tiny_student(teacher, keep, **FLAVOURS[flavour]).train()
    losses, total, _ = aligned_layers(student, teacher, batch, alignment_l2)
    total.backward()
    wanted = plain_losses(student, teacher, batch)
    assert losses.keys() == wanted.keys() == {0, 1, 2} - {index % 3 for index in keep}
    for index in wanted:
        torch.testing.assert_close(losses[index], wanted[index].detach(), rtol=1e-6, atol=1e-6)
        assert not losses[index].requires_grad
    mean = sum(wanted.values()) / len(wanted)
    torch.testing.assert_close(total.detach(), mean.detach(), rtol=1e-6, atol=1e-6)
    parameters = mixer_parameters(student)
    gradients = torch.autograd.grad(mean, list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient.abs().max() > 0, name
        assert (parameter.grad - gradient).norm() < 1e-5 * gradient.norm(), name
    others = {id(p) for p in student.parameters()} - {id(p) for p in parameters.values()}
    assert all(p.grad is None for p in student.parameters() if id(p) in others), "only mixers take part"
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_are_layer_local_under_a_value_residual():
    """Undetached, the first value would carry later losses into the first layer; that would be seen."""
    teacher, batch = tiny_teacher(), packed_batch(ROWS["documents"])
    student = tiny_student(teacher, value_residual=True)
    weight = student_mixers(student)[0].value.weight
    own = torch.autograd.grad(plain_losses(student, teacher, batch)[0] / 3, weight)[0]
    coupled = sum(plain_losses(student, teacher, batch, detached=False).values()) / 3
    coupled = torch.autograd.grad(coupled, weight)[0]
    assert (coupled - own).norm() > 0.01 * own.norm(), "the layers are not coupled, so nothing is shown"
    aligned_layers(student, teacher, batch, alignment_l2).total.backward()
    assert (weight.grad - own).norm() < 1e-5 * own.norm()


def test_the_first_value_carries_gradients_outside_alignment():
    teacher, batch = tiny_teacher(), packed_batch(ROWS["documents"])
    student = tiny_student(teacher, value_residual=True)
    seen = []
    student_mixers(student)[2].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["sequence_context"]), with_kwargs=True
    )
    hidden_states(student, batch["input_ids"], batch["document_ids"])
    assert seen[0].first_value.requires_grad and not seen[0].local_gradients


@pytest.mark.parametrize("options", [{}, ARWKV], ids=["radlads", "arwkv"])
def test_memory_for_activations_does_not_grow_with_depth(options):
    def peak(layers: int) -> int:
        teacher = tiny_teacher(layers=layers)
        student = tiny_student(teacher, **options)
        with SavedBytes() as saved:
            aligned_layers(student, teacher, packed_batch(ROWS["documents"]), alignment_l2).total.backward()
        assert saved.live == 0, "some graph is still alive"
        return saved.peak

    def plain_peak(layers: int) -> int:
        teacher = tiny_teacher(layers=layers)
        with SavedBytes() as saved:
            sum(
                plain_losses(
                    tiny_student(teacher, **options), teacher, packed_batch(ROWS["documents"])
                ).values()
            )
        return saved.peak

    assert plain_peak(6) > 2.5 * plain_peak(2), "the meter sees no growth where there is growth"
    assert peak(6) == peak(2) > 0


@pytest.mark.parametrize("loss", ALIGNMENT_LOSSES)
def test_padding_and_its_place_are_left_out_of_the_mean(loss):
    teacher = tiny_teacher()
    student = tiny_student(teacher, **ARWKV)
    padded = packed_batch([[12, -6], [-6, 12]])
    found = Align(loss=loss)(student, teacher, padded)
    real = padded["document_ids"] >= 0
    compact = {name: tensor[real].view(2, 12) for name, tensor in padded.items()}
    wanted = Align(loss=loss)(student, teacher, compact)
    for index in wanted.per_layer:
        torch.testing.assert_close(found.per_layer[index], wanted.per_layer[index], rtol=1e-4, atol=1e-6)
    noise = {**padded, "input_ids": torch.where(real, padded["input_ids"], 96 - padded["input_ids"])}
    torch.testing.assert_close(
        Align(loss=loss)(student, teacher, noise).total, found.total, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(found.parts["alignment"], found.total.detach())


def test_documents_are_aligned_as_if_alone():
    teacher = tiny_teacher()
    student = tiny_student(teacher, **ARWKV)
    batch = packed_batch([[10, 10]])
    together = aligned_layers(student, teacher, batch, alignment_l2).layers
    apart = [
        aligned_layers(student, teacher, {n: t[:, part] for n, t in batch.items()}, alignment_l2).layers
        for part in (slice(0, 10), slice(10, 20))
    ]
    for index in together:
        torch.testing.assert_close(
            together[index], (apart[0][index] + apart[1][index]) / 2, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("options", [{}, ARWKV], ids=["radlads", "arwkv"])
def test_frozen_parameters_get_no_gradient(options):
    teacher, batch = tiny_teacher(), packed_batch(ROWS["documents"])
    student = tiny_student(teacher, **options)
    frozen = student_mixers(student)[1]
    frozen.requires_grad_(False)
    student_mixers(student)[0].key.weight.requires_grad_(False)
    aligned_layers(student, teacher, batch, alignment_l2).total.backward()
    for name, parameter in mixer_parameters(student).items():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_without_gradients_it_is_a_measurement():
    teacher, batch = tiny_teacher(), packed_batch(ROWS["documents"])
    student = tiny_student(teacher)
    with torch.no_grad():
        losses, total, _ = aligned_layers(student, teacher, batch, alignment_l2)
    assert not total.requires_grad
    torch.testing.assert_close(total, torch.stack(list(losses.values())).mean())
    torch.testing.assert_close(total, aligned_layers(student, teacher, batch, alignment_l2).total.detach())


def test_no_hook_stays_on_the_teacher():
    teacher, batch = tiny_teacher(), packed_batch(ROWS["documents"])
    student = tiny_student(teacher)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("broken loss")

    aligned_layers(student, teacher, batch, alignment_l2)
    with pytest.raises(RuntimeError, match="broken loss"):
        aligned_layers(student, teacher, batch, broken)
    assert not any(module._forward_hooks for module in attention_modules(teacher).values())


def test_nothing_to_align_is_refused_in_words():
    teacher = tiny_teacher()
    student = tiny_student(teacher, keep=(0, 1, 2))
    with pytest.raises(ValueError, match="student.layer_plan"):
        aligned_layers(student, teacher, packed_batch(ROWS["documents"]), alignment_l2)


def test_alignment_lowers_the_loss():
    """A few optimiser steps, each over two accumulated batches."""
    teacher, batch = tiny_teacher(), packed_batch(ROWS["documents"])
    student = tiny_student(teacher, noise=0.0)
    optimizer = torch.optim.Adam(mixer_parameters(student).values(), lr=3e-3)
    before = aligned_layers(student, teacher, batch, alignment_l2).total.item()
    for _ in range(15):
        for _ in range(2):
            (aligned_layers(student, teacher, batch, alignment_l2).total / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert aligned_layers(student, teacher, batch, alignment_l2).total.item() < 0.8 * before
