"""Losses that need logits, chunk by chunk, against the dense computation; and gradients handed over late."""

import pytest
import torch
import torch.nn.functional as F
from tiny import LiveBytes, packed_batch, tiny_student, tiny_teacher
from torch import Tensor, nn

from models.backbone import hidden_states
from models.deferred import GradientSum, hand_over
from models.losses import (
    ALIGNMENT_LOSSES,
    IGNORED,
    alignment_l2,
    alignment_mse,
    alignment_relative,
    chunked_mean,
    cross_entropy,
    forward_kl,
)
from models.objectives import Align, CrossEntropy, Distill

TOKENS, WIDTH, VOCABULARY = 23, 12, 31


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def toy(tokens: int = TOKENS, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Hidden states, a head with bias, teacher logits and labels (a third of them ignored)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    target = 2 * torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    labels[torch.arange(tokens) % 3 == 1] = IGNORED
    return hidden, head, target.to(dtype), labels


def plain_kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The definition, in float64 and from explicit probabilities."""
    student, teacher = ((x.double() / temperature).softmax(-1) for x in (logits, target))
    return temperature**2 * (teacher * (teacher / student).log()).sum(-1)


@pytest.mark.parametrize("chunk", [1, 5, 8, 15, 1000], ids=lambda chunk: f"chunk{chunk}")
@pytest.mark.parametrize("kind", ["kl", "kl_soft", "cross_entropy"])
def test_chunked_mean_is_the_dense_mean_with_its_gradients(kind, chunk):
    hidden, head, target, labels = toy()
    chosen = labels != IGNORED
    kept, kept_target, kept_labels = hidden[chosen], target[chosen], labels[chosen]
    temperature = 2.5 if kind == "kl_soft" else 1.0

    def token_loss(logits: Tensor, piece: slice) -> Tensor:
        if kind == "cross_entropy":
            return cross_entropy(logits, kept_labels[piece])
        return forward_kl(logits, kept_target[piece], temperature)

    found = chunked_mean(kept, head, list(head.parameters()), token_loss, chunk)
    inputs = [hidden, head.weight, head.bias]
    found_gradients = torch.autograd.grad(found, inputs)
    if kind == "cross_entropy":
        wanted = F.cross_entropy(head(hidden), labels, ignore_index=IGNORED)
    else:
        wanted = plain_kl(head(hidden)[chosen], kept_target, temperature).mean()
    for a, b in zip([found, *found_gradients], [wanted, *torch.autograd.grad(wanted, inputs)], strict=True):
        assert relative_error(a, b) < 1e-6
    assert (found_gradients[0][~chosen] == 0).all()


def test_float32_stays_within_1e_6_of_float64():
    hidden, head, target, labels = toy(tokens=200, dtype=torch.float32)
    loss = chunked_mean(hidden, head, list(head.parameters()), lambda x, c: forward_kl(x, target[c]), 64)
    loss.backward()
    wide, wide_head = hidden.detach().double().requires_grad_(), nn.Linear(WIDTH, VOCABULARY).double()
    wide_head.load_state_dict(head.state_dict())
    wanted = plain_kl(wide_head(wide), target, 1.0).mean()
    wanted.backward()
    assert relative_error(loss, wanted) < 1e-6
    for a, b in ((hidden, wide), (head.weight, wide_head.weight), (head.bias, wide_head.bias)):
        assert relative_error(a.grad, b.grad) < 1e-6


def test_bfloat16_logits_are_compared_in_float32():
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert forward_kl(logits, target).dtype == torch.float32
    assert relative_error(forward_kl(logits, target), plain_kl(logits, target, 1.0)) < 1e-5
    assert (
        relative_error(cross_entropy(logits, torch.arange(9)), -logits.double().log_softmax(-1).diagonal())
        < 1e-5
    )


def test_no_token_gives_zero_and_zero_gradients():
    hidden, head, target, _ = toy()
    loss = chunked_mean(hidden[:0], head, list(head.parameters()), lambda x, c: forward_kl(x, target[c]), 4)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()
    assert all(p.grad is None or (p.grad == 0).all() for p in head.parameters())


def test_without_gradients_and_with_a_frozen_head():
    hidden, head, target, _ = toy()

    def mean(states: Tensor) -> Tensor:
        return chunked_mean(states, head, list(head.parameters()), lambda x, c: forward_kl(x, target[c]), 6)

    wanted = plain_kl(head(hidden), target, 1.0).mean()
    with torch.no_grad():
        assert relative_error(mean(hidden), wanted) < 1e-12 and not mean(hidden).requires_grad
    only_head = torch.autograd.grad(mean(hidden.detach()), head.weight)[0]
    assert relative_error(only_head, torch.autograd.grad(wanted, head.weight, retain_graph=True)[0]) < 1e-12
    head.requires_grad_(False)
    assert (
        relative_error(torch.autograd.grad(mean(hidden), hidden)[0], torch.autograd.grad(wanted, hidden)[0])
        < 1e-12
    )


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    vocabulary, chunk, width = 2000, 16, 8
    head = nn.Linear(width, vocabulary)

    def watch(tokens: int) -> LiveBytes:
        hidden = torch.randn(tokens, width, requires_grad=True)
        labels = torch.zeros(tokens, dtype=torch.int64)
        with LiveBytes() as watched:
            chunked_mean(
                hidden, head, list(head.parameters()), lambda x, c: cross_entropy(x, labels[c]), chunk
            ).backward()
        head.zero_grad()
        return watched

    few, many = watch(64), watch(512)
    assert many.largest == chunk * vocabulary
    dense_growth = (512 - 64) * vocabulary * 4
    assert many.peak - few.peak < 0.05 * dense_growth, "logits of earlier chunks are still alive"


@pytest.mark.parametrize(
    "objective", [Distill(chunk_tokens=8), CrossEntropy(chunk_tokens=8)], ids=lambda o: type(o).__name__
)
def test_objectives_never_hold_the_logits_of_a_row(objective):
    teacher = tiny_teacher(layers=1, vocab_size=3001)
    student = tiny_student(teacher)
    batch = packed_batch([[40, 60], [90, -10]])
    with LiveBytes() as watched:
        objective(student, teacher, batch).total.backward()
    tokens = int((batch["labels"] != IGNORED).sum())
    assert tokens * 3001 > 2 * student.get_output_embeddings().weight.numel()  # or nothing would be shown
    assert watched.largest <= student.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("weight, temperature", [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_distill_is_the_dense_loss_over_labelled_tokens(weight, temperature):
    teacher = tiny_teacher("qwen2_tied")
    student = tiny_student(teacher)
    batch = packed_batch([[9, 15, -4], [-3, 25]])
    chosen = batch["labels"] != IGNORED
    objective = Distill(temperature=temperature, cross_entropy_weight=weight, chunk_tokens=7)
    found = objective(student, teacher, batch)
    parameters = list(student.parameters())
    found_gradients = torch.autograd.grad(found.total, parameters)

    hidden = hidden_states(student, batch["input_ids"], batch["document_ids"])
    logits = student.get_output_embeddings()(hidden)[chosen]
    target = hidden_states(teacher, batch["input_ids"], batch["document_ids"])
    target = teacher.get_output_embeddings()(target)[chosen]
    kl = plain_kl(logits, target, temperature).mean()
    entropy = F.cross_entropy(logits.double(), batch["labels"][chosen])
    wanted = (1 - weight) * kl + weight * entropy
    assert relative_error(found.total, wanted) < 1e-6
    assert relative_error(found.parts["kl"], kl) < 1e-5
    assert relative_error(found.parts["loss"], entropy) < 1e-5
    for a, b in zip(found_gradients, torch.autograd.grad(wanted, parameters), strict=True):
        assert relative_error(a, b) < 1e-3 or (a - b).abs().max() < 1e-7


def test_a_batch_without_labels_trains_nothing_and_breaks_nothing():
    teacher = tiny_teacher(layers=1)
    student = tiny_student(teacher)
    batch = packed_batch([[5, 7]])
    batch["labels"].fill_(IGNORED)
    for objective in (Distill(), CrossEntropy()):
        terms = objective(student, teacher, batch)
        terms.total.backward()
        assert terms.total.item() == 0
        assert all(p.grad is None or (p.grad == 0).all() for p in student.parameters())


def test_alignment_losses_are_their_formulas():
    output, target = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[4.0, 6.0], [3.0, -1.0]])
    torch.testing.assert_close(
        alignment_l2(output, target), torch.tensor([5 / 2**0.5, 0.0]), atol=2e-6, rtol=1e-6
    )
    torch.testing.assert_close(alignment_mse(output, target), torch.tensor([12.5, 0.0]))
    torch.testing.assert_close(alignment_relative(output, target), torch.tensor([12.5, 0.0]) / (62 / 4))
    assert alignment_relative(torch.zeros_like(target), target).mean().item() == pytest.approx(1.0)
    exact = target.clone().requires_grad_()
    for name, loss in ALIGNMENT_LOSSES.items():
        (gradient,) = torch.autograd.grad(loss(exact, target).sum(), exact)
        assert torch.isfinite(gradient).all(), f"{name} has no gradient at a perfect match"


def test_handed_over_gradients_are_scaled_by_what_comes_from_above():
    x, w = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    unused = torch.tensor([1.0], requires_grad=True)
    loss = hand_over(torch.tensor(7.0), [x, w, unused], [torch.tensor([2.0, 4.0]), torch.tensor([5.0]), None])
    assert loss.item() == 7.0
    (loss * 0.5 + 1).backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(w.grad, torch.tensor([2.5]))
    assert unused.grad is None


def test_handed_over_gradients_reach_what_lies_below():
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    hidden = 3 * leaf
    hand_over(torch.tensor(0.0), [hidden], [torch.tensor([1.0, 10.0])]).backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([3.0, 30.0]))


def test_accumulated_and_scaled_batches_equal_one_mean():
    """Lightning divides each loss by `accumulate`, a scaler multiplies it; both must reach the end."""
    hidden, head, target, _ = toy(tokens=24)
    pieces, scale = (slice(0, 8), slice(8, 16), slice(16, 24)), 1024.0
    for piece in pieces:
        targets = target[piece]
        loss = chunked_mean(
            hidden[piece], head, list(head.parameters()), lambda x, c, t=targets: forward_kl(x, t[c]), 3
        )
        (loss / len(pieces) * scale).backward()
    wanted = plain_kl(head(hidden), target, 1.0).mean()
    for parameter, gradient in zip(
        [hidden, *head.parameters()], torch.autograd.grad(wanted, [hidden, *head.parameters()]), strict=True
    ):
        assert relative_error(parameter.grad / scale, gradient) < 1e-9


def test_a_scale_beyond_one_half_precision_gradient_survives():
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    loss = hand_over(torch.tensor(1.0), [weight], [torch.full((3,), 0.5, dtype=torch.bfloat16)])
    (loss * 65536.0).backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad == 32768).all()


def test_a_gradient_sum_skips_what_has_no_gradient():
    total = GradientSum([torch.zeros(2), torch.zeros(1)])
    total.add([torch.ones(2), None])
    total.add([torch.ones(2), None])
    assert total.gradients[0].tolist() == [2.0, 2.0] and total.gradients[1] is None


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: Distill(temperature=0.0), "objective.temperature"),
        (lambda: Distill(cross_entropy_weight=1.5), "objective.cross_entropy_weight"),
        (lambda: Align(loss="l3"), "objective.loss"),
    ],
)
def test_wrong_values_are_refused_with_their_key(make, key):
    with pytest.raises(ValueError, match=key):
        make()
