"""Divergences from a teacher, asked or cached, against plain computations in float64."""

import math

import pytest
import torch
from tiny import LiveBytes, packed_batch, tiny_student, tiny_teacher
from torch import Tensor, nn

from models.backbone import hidden_states
from models.divergences import DIVERGENCES, bucketed_logs, jensen_shannon_of, shared_logs
from models.losses import IGNORED, chunked_mean
from models.objectives import Distill
from models.teacher_targets import top_k_targets

VOCABULARY, WIDTH = 31, 12
ROWS = [[9, 15, -4], [-3, 25]]
KINDS = ("forward_kl", "reverse_kl", "js", "js_0.1", "js_0.9")


def split(kind: str) -> tuple[str, float]:
    """The name of a divergence, and the weight of `js`."""
    name, _, weight = kind.partition("_0.")
    return name, float(f"0.{weight}") if weight else 0.5


def plain(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The definitions, from probabilities [n,K]: terms of probability 0 are 0."""
    name, weight = split(kind)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p.clamp_min(1e-300) / q).log(), 0.0).sum(-1)

    mixture = weight * teacher + (1 - weight) * student
    return {
        "forward_kl": lambda: kl(teacher, student),
        "reverse_kl": lambda: kl(student, teacher),
        "js": lambda: weight * kl(teacher, mixture) + (1 - weight) * kl(student, mixture),
    }[name]()


def of_kind(kind: str, **options) -> Distill:
    name, weight = split(kind)
    return Distill(divergence=name, js_weight=weight, **options)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def widened(teacher: nn.Module, rows: int) -> nn.Module:
    """The model with so many more rows in its head, as padded checkpoints have them."""
    head = teacher.get_output_embeddings()
    wider = nn.Linear(head.in_features, head.out_features + rows, bias=False)
    with torch.no_grad():
        wider.weight[: head.out_features] = head.weight
    teacher.set_output_embeddings(wider)
    teacher.config.vocab_size += rows
    return teacher


def logits_of(model: nn.Module, batch: dict[str, Tensor], chosen: Tensor) -> Tensor:
    hidden = hidden_states(model, batch["input_ids"], batch["document_ids"])
    return model.get_output_embeddings()(hidden)[chosen].double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [(0, 0), (7, 0), (0, 7), (5, 5)], ids=str)
def test_divergences_equal_their_definitions_with_gradients(kind, padding):
    """Padded heads of either side: what only one has takes no part, what both have does."""
    generator = torch.Generator().manual_seed(0)
    shape = [VOCABULARY + more for more in padding]
    student, teacher = (2 * torch.randn(19, size, generator=generator, dtype=torch.float64) for size in shape)
    student.requires_grad_()
    shared, temperature = min(shape), 1.7
    name, weight = split(kind)
    options = {"weight": weight} if name == "js" else {}
    found = DIVERGENCES[name](*shared_logs(student, teacher, temperature), **options)
    wanted = plain(kind, *((x[:, :shared] / temperature).softmax(-1) for x in (student, teacher)))
    assert relative_error(found, wanted) < 1e-9
    gradients = [torch.autograd.grad(loss.mean(), student)[0] for loss in (found, wanted)]
    assert relative_error(*gradients) < 1e-9
    assert (gradients[0][:, shared:] == 0).all()


def test_js_is_symmetric_bounded_and_becomes_the_kls_at_its_ends():
    generator = torch.Generator().manual_seed(1)
    logs = [torch.randn(50, 9, generator=generator, dtype=torch.float64) * 4 for _ in range(2)]
    student, teacher = (x.log_softmax(-1) for x in logs)
    half = jensen_shannon_of(student, teacher)
    torch.testing.assert_close(half, jensen_shannon_of(teacher, student))
    assert (half > 0).all() and (half < math.log(2)).all()
    student, teacher = (
        (x / 8).log_softmax(-1) for x in logs
    )  # the ends are reached where no ratio is extreme
    forward, reverse = (DIVERGENCES[name](student, teacher) for name in ("forward_kl", "reverse_kl"))
    torch.testing.assert_close(jensen_shannon_of(student, teacher, 1e-7) / 1e-7, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        jensen_shannon_of(student, teacher, 1 - 1e-7) / 1e-7, reverse, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 1000], ids=lambda chunk: f"chunk{chunk}")
def test_chunks_give_the_dense_loss_and_gradients(kind, chunk):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(23, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
    target = 2 * torch.randn(23, VOCABULARY, generator=generator, dtype=torch.float64)
    keep = torch.arange(23) % 3 != 1
    name, weight = split(kind)
    options = {"weight": weight} if name == "js" else {}

    def token_loss(logits: Tensor, piece: slice) -> Tensor:
        return DIVERGENCES[name](*shared_logs(logits, target[keep][piece]), **options)

    found = chunked_mean(hidden[keep], head, list(head.parameters()), token_loss, chunk)
    wanted = plain(kind, head(hidden)[keep].softmax(-1), target[keep].softmax(-1)).mean()
    inputs = [hidden, head.weight, head.bias]
    pairs = [(found, wanted), *zip(*(torch.autograd.grad(x, inputs) for x in (found, wanted)), strict=True)]
    for a, b in pairs:
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [(0, 0), (6, 0), (0, 6)], ids=str)
def test_distill_is_the_dense_loss_over_labelled_tokens(kind, padding):
    """Padded batches, uneven chunks, heads of different widths: student and teacher in float32."""
    teacher = tiny_teacher()
    student = widened(tiny_student(teacher), padding[0])
    teacher = widened(teacher, padding[1])
    batch = packed_batch(ROWS)
    chosen = batch["labels"] != IGNORED
    found = of_kind(kind, temperature=1.5, chunk_tokens=7)(student, teacher, batch)
    student_logits, teacher_logits = (logits_of(model, batch, chosen)[:, :97] for model in (student, teacher))
    dense = (
        plain(kind, (student_logits / 1.5).softmax(-1), (teacher_logits / 1.5).softmax(-1)).mean() * 1.5**2
    )
    assert relative_error(found.total, dense) < 1e-6
    part = {"forward_kl": "kl"}.get(split(kind)[0], split(kind)[0])
    assert relative_error(found.parts[part], dense) < 1e-5 and set(found.parts) == {part, "loss"}


@pytest.mark.parametrize("kind", [*KINDS, "cached"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(kind):
    vocabulary, chunk, width, k = 2000, 16, 8, 4
    head, teacher_head = nn.Linear(width, vocabulary), nn.Linear(width, vocabulary).requires_grad_(False)
    objective = of_kind("forward_kl" if kind == "cached" else kind)
    options = {"weight": objective.js_weight} if objective.divergence == "js" else {}

    def watch(tokens: int) -> LiveBytes:
        hidden, target = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
        ids, logs = torch.arange(k).expand(tokens, k), torch.full((tokens, k), math.log(0.2))
        tail = torch.full((tokens,), math.log(0.2))

        def token_loss(logits: Tensor, piece: slice) -> Tensor:
            if kind == "cached":
                pair = bucketed_logs(logits, ids[piece], logs[piece], tail[piece])
            else:
                pair = shared_logs(logits, teacher_head(target[piece]))
            return DIVERGENCES[objective.divergence](*pair, **options)

        with LiveBytes() as watched:
            chunked_mean(hidden, head, list(head.parameters()), token_loss, chunk).backward()
        head.zero_grad()
        return watched

    few, many = watch(64), watch(512)
    assert many.largest == chunk * vocabulary
    assert many.peak - few.peak < 0.05 * (512 - 64) * vocabulary * 4, "earlier chunks are still alive"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cached_targets_give_the_divergence_of_the_buckets(kind, temperature):
    """k known ids and the rest as one outcome, in float64; the tail may be next to nothing."""
    generator, k = torch.Generator().manual_seed(3), 5
    logits = (4 * torch.randn(17, VOCABULARY, generator=generator, dtype=torch.float64)).requires_grad_()
    with torch.no_grad():
        logits[0, 7] += 60  # one id has nearly everything: 1 - sum would have no digit left
    teacher = 3 * torch.randn(17, VOCABULARY, generator=generator, dtype=torch.float64) / temperature
    logs, ids = teacher.log_softmax(-1).topk(k)
    tail = teacher.log_softmax(-1).scatter(-1, ids, -math.inf).logsumexp(-1)
    name, weight = split(kind)
    options = {"weight": weight} if name == "js" else {}
    found = DIVERGENCES[name](*bucketed_logs(logits, ids, logs, tail, temperature), **options)

    probabilities = (logits / temperature).softmax(-1)
    rest = torch.ones_like(probabilities).scatter(-1, ids, 0.0)
    buckets = torch.cat([probabilities.gather(-1, ids), (probabilities * rest).sum(-1, keepdim=True)], -1)
    wanted = plain(kind, buckets, torch.cat([logs.exp(), tail.exp()[:, None]], -1))
    assert relative_error(found, wanted) < 1e-9
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (found, wanted)]
    assert relative_error(*gradients) < 1e-9


def test_the_students_tail_keeps_its_digits_in_float32():
    logits = torch.zeros(1, 200).index_fill(1, torch.tensor([3]), 40.0).requires_grad_()
    ids, logs = torch.tensor([[3]]), torch.tensor([[math.log(0.5)]])
    student, _ = bucketed_logs(logits, ids, logs, torch.tensor([math.log(0.5)]))
    assert student[0, 1].item() == pytest.approx(math.log(199) - 40.0, rel=1e-6)
    (gradient,) = torch.autograd.grad(student[0, 1], logits)
    assert torch.isfinite(gradient).all() and gradient[0, 4] == pytest.approx(1 / 199, rel=1e-5)


def with_targets(batch: dict, teacher: nn.Module, k: int, temperature: float = 1.0) -> dict:
    return {**batch, **top_k_targets(teacher, batch, k, temperature, chunk_tokens=7)}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_ids_cached_are_the_dense_loss_to_half_precision(temperature):
    teacher = tiny_teacher("qwen2_tied")
    student, batch = tiny_student(teacher), packed_batch(ROWS)
    dense = Distill(chunk_tokens=7, temperature=temperature)(student, teacher, batch)
    cached = Distill(chunk_tokens=7, temperature=temperature, teacher_cache="anywhere")
    found = cached(student, teacher, with_targets(batch, teacher, 97, temperature))
    assert relative_error(found.total, dense.total) < 2e-3
    parameters = list(student.parameters())
    ours, theirs = (torch.autograd.grad(terms.total, parameters) for terms in (found, dense))
    assert (
        relative_error(torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in theirs]))
        < 2e-3
    )


def test_fewer_ids_cached_bound_the_kl_from_below_ever_closer():
    teacher = tiny_teacher()
    student, batch = tiny_student(teacher), packed_batch(ROWS)
    dense = Distill()(student, teacher, batch).total.item()
    cached = Distill(teacher_cache="anywhere")
    found = [
        cached(student, teacher, with_targets(batch, teacher, k)).total.item() for k in (1, 4, 16, 64, 96)
    ]
    assert found == sorted(found) and found[0] < 0.9 * dense and found[-1] <= dense * (1 + 1e-3)
    assert found[-1] == pytest.approx(dense, rel=5e-3)


def test_a_cached_step_does_not_run_the_teacher():
    teacher = tiny_teacher()
    student, batch = tiny_student(teacher), packed_batch(ROWS)
    batch = with_targets(batch, teacher, 8)
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    teacher.base_model.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    teacher.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the teacher's head ran"))
    Distill(teacher_cache="anywhere")(student, teacher, batch).total.backward()
    assert student.get_output_embeddings().weight.grad.abs().max() > 0


def test_targets_are_the_likeliest_ids_and_what_is_left():
    teacher, batch = tiny_teacher(), packed_batch(ROWS)
    found = top_k_targets(teacher, batch, 6, 1.3, chunk_tokens=5)
    everything = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    logs = (logits_of(teacher, batch, everything) / 1.3).log_softmax(-1).view(2, 28, 97)
    best, ids = logs.topk(6)
    assert torch.equal(found["teacher_ids"].long(), ids)
    torch.testing.assert_close(found["teacher_logs"].double(), best, rtol=2**-10, atol=1e-6)
    rest = logs.scatter(-1, ids, -math.inf).logsumexp(-1)
    torch.testing.assert_close(found["teacher_tail"].double(), rest, rtol=1e-5, atol=1e-5)
    assert [found[name].dtype for name in found] == [torch.int32, torch.float16, torch.float32]


def test_a_wider_student_is_cut_to_the_cached_ids_and_a_narrower_one_refused():
    teacher = tiny_teacher()
    student, batch = tiny_student(teacher), packed_batch(ROWS)
    batch = with_targets(batch, teacher, 8)
    objective = Distill(teacher_cache="anywhere")
    before = objective(student, teacher, batch).total
    torch.testing.assert_close(objective(widened(student, 5), teacher, batch).total, before)
    teacher.config.vocab_size += 9
    with pytest.raises(
        ValueError, match="teacher_cache: its teacher has logits for 106 ids, the student for 102"
    ):
        objective(student, teacher, batch)
    with pytest.raises(ValueError, match="brings no cached targets"):
        objective(student, teacher, packed_batch(ROWS))
