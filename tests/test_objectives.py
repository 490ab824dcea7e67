"""Token weights, layer weights and bad values of objectives, against plain computations."""

import pytest
import torch
from tiny import packed_batch, packed_ids, random_ids, tiny_student, tiny_teacher
from torch import Tensor

from models.align import aligned_layers
from models.layer_plan import ATTENTION
from models.losses import ALIGNMENT_LOSSES, IGNORED
from models.objectives import Align, CrossEntropy, Distill
from models.token_weights import repeated_tokens, token_weights

ROWS = [[9, 15, -4], [-3, 25]]


def repeats(ids: list[int], documents: list[int], span: int) -> list[bool]:
    """The definition, by looking at every earlier place."""
    found = []
    for t in range(len(ids)):
        window = range(t - span + 1, t + 1)
        inside = t - span + 1 >= 0 and documents[t] >= 0 and len({documents[i] for i in window}) == 1
        found.append(
            inside
            and any(
                all(ids[s - j] == ids[t - j] and documents[s - j] == documents[t] for j in range(span))
                for s in range(span - 1, t)
            )
        )
    return found


@pytest.mark.parametrize("span", [1, 2, 4])
def test_repeated_tokens_equal_the_definition(span):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, (4, 60), generator=generator)  # three ids: spans recur all the time
    ids[3] = torch.arange(60) % 2 + 100_000
    documents = packed_ids([[60], [20, 40], [-10, 25, 25], [1, 2, 30, -20, 7]])
    found = repeated_tokens(ids, documents, span)
    wanted = [repeats(a, b, span) for a, b in zip(ids.tolist(), documents.tolist(), strict=True)]
    assert found.tolist() == wanted
    assert 0 < found.float().mean() < 1


def test_a_passage_shown_twice_is_repeated_the_second_time():
    passage = random_ids(1, 40)
    found = repeated_tokens(torch.cat([passage, passage], 1), torch.zeros(1, 80, dtype=torch.int32))
    assert not found[0, :40].any() and not found[0, 40:43].any() and found[0, 43:].all()


def test_weights_have_mean_one_and_the_asked_ratio():
    batch = packed_batch([[40, -4], [-8, 36]])
    batch["input_ids"][0, 20:40] = batch["input_ids"][0, :20]
    chosen = batch["labels"] != IGNORED
    repeated = repeated_tokens(batch["input_ids"], batch["document_ids"])[chosen]
    weights = token_weights(batch, chosen, 5.0)
    assert weights.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(
        weights[repeated] / weights[~repeated][0], torch.full((int(repeated.sum()),), 5.0)
    )
    assert token_weights(batch, chosen, 1.0) is None
    batch["weights"] = torch.rand(2, 44, generator=torch.Generator().manual_seed(0))
    given = token_weights(batch, chosen, 5.0)
    wanted = batch["weights"][chosen] * torch.where(repeated, 5.0, 1.0)
    torch.testing.assert_close(given, wanted / wanted.mean())


def test_weights_have_mean_one_over_all_processes(monkeypatch):
    """Two processes with unlike rows: each gives its share of what one process with all rows gives."""
    batch = packed_batch([[40, -4], [-8, 36]])
    batch["weights"] = torch.rand(2, 44, generator=torch.Generator().manual_seed(0))
    chosen = batch["labels"] != IGNORED
    together = token_weights(batch, chosen, 1.0)
    rows = [({name: tensor[i : i + 1] for name, tensor in batch.items()}, chosen[i : i + 1]) for i in (0, 1)]
    numbers = [[part["weights"][own].sum(), own.sum().float()] for part, own in rows]
    for mine, (part, own) in enumerate(rows):
        others = iter(numbers[1 - mine])
        monkeypatch.setattr("models.ranks.mean", lambda value, others=others: (value + next(others)) / 2)
        alone = token_weights(part, own, 1.0)
        first = 0 if mine == 0 else int(chosen[0].sum())
        torch.testing.assert_close(alone, together[first : first + len(alone)])


@pytest.mark.parametrize("make", [Distill, CrossEntropy], ids=lambda make: make.__name__)
def test_weighted_tokens_count_as_often_as_they_weigh(make):
    """Weights of 0 and 2 on halves of a batch: the loss of the half that is left."""
    teacher = tiny_teacher()
    student, batch = tiny_student(teacher), packed_batch([[24], [24]])
    half = {name: tensor[:1] for name, tensor in batch.items()}
    weights = torch.zeros(2, 24)
    weights[0] = 2.0
    found = make(chunk_tokens=7)(student, teacher, {**batch, "weights": weights})
    wanted = make(chunk_tokens=7)(student, teacher, half)
    torch.testing.assert_close(found.total, wanted.total)
    plain_loss = make(chunk_tokens=7)(student, teacher, batch)
    torch.testing.assert_close(found.parts["loss"], plain_loss.parts["loss"])  # what is shown is not weighted
    parameters = list(student.parameters())
    for a, b in zip(*(torch.autograd.grad(t.total, parameters) for t in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [[[24], [24]], ROWS], ids=["whole", "packed"])
@pytest.mark.parametrize("loss", ALIGNMENT_LOSSES)
def test_alignment_weighs_tokens_and_layers(loss, rows):
    teacher, batch = tiny_teacher(), packed_batch(rows)
    batch["input_ids"][:, -8:] = batch["input_ids"][:, -16:-8]  # something is repeated
    student = tiny_student(teacher, keep=(1,))
    objective = Align(loss=loss, layer_weights=[3.0, 9.0, 1.0], repeat_weight=4.0)
    found, even = objective(student, teacher, batch), Align(loss=loss)(student, teacher, batch)
    assert found.per_layer.keys() == {0, 2}  # the kept layer's weight is not read
    for index, value in even.per_layer.items():
        torch.testing.assert_close(found.per_layer[index], value)  # what is shown is not weighted
    torch.testing.assert_close(found.parts["alignment"], even.parts["alignment"])

    kept = batch["document_ids"] >= 0
    weights = token_weights(batch, kept, 4.0)
    per_layer = {}

    def weighed(output: Tensor, target: Tensor) -> Tensor:
        per_layer[len(per_layer)] = ALIGNMENT_LOSSES[loss](output, target) * weights
        return per_layer[len(per_layer) - 1]

    aligned_layers(student, teacher, batch, weighed)
    wanted = (3 * per_layer[0].mean() + 1 * per_layer[1].mean()) / 4
    torch.testing.assert_close(found.total, wanted.detach())
    assert abs(found.total - even.total) > 1e-3 * even.total


def test_relative_is_the_squared_error_over_the_teachers_mean_square():
    generator = torch.Generator().manual_seed(5)
    target, output = (torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    found = ALIGNMENT_LOSSES["relative"](output, 3 * target).mean()
    rms = (3 * target).pow(2).mean().sqrt()
    wanted = ((output - 3 * target) / rms).pow(2).mean()
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    "weights, plan, message",
    [
        ([1.0, 1.0], ["rwkv7"] * 3, "layer_weights has 2 entries, the teacher has 3 layers"),
        (
            [0.0, 1.0, 0.0],
            ["rwkv7", ATTENTION, "rwkv7"],
            "layer_weights is 0 for every layer that is replaced",
        ),
    ],
)
def test_layer_weights_that_do_not_fit_are_refused(weights, plan, message):
    with pytest.raises(ValueError, match=f"stage.align.objective.{message}"):
        Align(layer_weights=weights).check_layers(plan, "stage.align.objective")
    Align().check_layers(plan, "stage.align.objective")


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: Distill(divergence="kl"), "objective.divergence='kl' is unknown; choose one of forward_kl"),
        (lambda: Distill(divergence="js", js_weight=1.0), "objective.js_weight=1.0 must lie between"),
        (lambda: Distill(js_weight=0.3), "objective.js_weight=0.3 needs objective.divergence=js"),
        (lambda: Distill(repeat_weight=-1.0), "objective.repeat_weight=-1.0"),
        (lambda: Align(repeat_weight=-1.0), "objective.repeat_weight=-1.0"),
        (lambda: Align(layer_weights=[1.0, -1.0]), "objective.layer_weights"),
        (lambda: Align(layer_weights=[0.0, 0.0]), "objective.layer_weights"),
    ],
)
def test_wrong_values_are_refused_with_their_key(make, key):
    with pytest.raises(ValueError, match=key):
        make()
