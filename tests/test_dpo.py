"""Direct preference optimisation: the loss by hand, its gradient, and what training does to the margin."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import LiveBytes, packed_batch, tiny_student, tiny_teacher
from torch import Tensor, nn

from models import preference
from models.backbone import hidden_states
from models.config import StudentConfig
from models.layer_plan import LayerPlan
from models.losses import IGNORED
from models.mixers import RWKV7Options
from models.preference import DirectPreference
from models.student_folder import Student
from pipeline.students import frozen_copy

PLAIN = DirectPreference(beta=0.5, chunk_tokens=7)


@pytest.fixture
def tables(monkeypatch):
    """Makes models of bare heads: logits at a token are a row of a table, and can be worked out by hand."""

    def one_hot(model: nn.Linear, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        return F.one_hot(input_ids, model.in_features).double()

    def table(rows: list[list[float]]) -> nn.Linear:
        head = nn.Linear(len(rows), len(rows[0]), bias=False)
        head.weight = nn.Parameter(torch.tensor(rows, dtype=torch.float64).T.contiguous())
        return head

    monkeypatch.setattr(preference, "hidden_states", one_hot)
    monkeypatch.setattr(preference, "output_head", lambda model: model)
    return table


def answer_batch(rows: list[list[int]], seed: int = 3) -> dict[str, Tensor]:
    """Rows of one document of which the first half is a prompt; lengths and padding as in `packed_batch`."""
    batch = packed_batch(rows, seed)
    for row, (length, *_) in enumerate(rows):
        batch["labels"][row, : length // 2] = IGNORED
    return batch


BATCH = [[20], [14, -6], [9, -11], [17, -3]]


@pytest.fixture
def models():
    """A student, and the reference it has moved away from."""
    teacher = tiny_teacher()
    return tiny_student(teacher, noise=0.1), tiny_student(teacher, noise=0.05).requires_grad_(False)


def answers(model, batch, normalised: bool = False) -> Tensor:
    """[B] log-probabilities of the answers, by the definition."""
    states = hidden_states(model, batch["input_ids"], batch["document_ids"])
    logs = model.get_output_embeddings()(states).log_softmax(-1)
    mask = batch["labels"] != IGNORED
    each = logs.gather(-1, batch["labels"].clamp_min(0)[..., None])[..., 0] * mask
    return each.sum(1) / (mask.sum(1) if normalised else 1)


def test_the_loss_of_a_pair_worked_out_by_hand(tables):
    # Two tokens; after token 0 the student says 1 with probability 3/4, the reference with 1/2.
    student, reference = tables([[0.0, math.log(3.0)], [0.0, 0.0]]), tables([[0.0, 0.0], [0.0, 0.0]])
    ids, labels = torch.tensor([[0, 0], [0, 0]]), torch.tensor([[1, IGNORED], [0, IGNORED]])
    batch = {"input_ids": ids, "labels": labels, "document_ids": torch.zeros(2, 2, dtype=torch.int32)}
    terms = DirectPreference(beta=2.0)(student, reference, batch)
    margin = 2.0 * (math.log(0.75 / 0.5) - math.log(0.25 / 0.5))  # 2 ln 3
    assert terms.parts["reward_margin"].item() == pytest.approx(margin)
    assert terms.total.item() == pytest.approx(math.log(1 + 1 / 9))  # -ln σ(2 ln 3)
    assert terms.parts["chosen_reward"].item() == pytest.approx(2 * math.log(1.5))
    assert terms.parts["rejected_reward"].item() == pytest.approx(-2 * math.log(2))
    assert terms.parts["accuracy"].item() == 1
    terms.total.backward()
    slope = student.weight.grad[:, 0]
    assert slope[1] < 0 < slope[0]  # going downhill, the chosen token gains and the rejected one loses
    swapped = {**batch, "labels": labels.flip(0)}
    terms = DirectPreference(beta=2.0)(student, reference, swapped)
    assert terms.total.item() == pytest.approx(math.log(1 + 9)) and terms.parts["accuracy"].item() == 0


@pytest.mark.parametrize(
    "objective",
    [PLAIN, replace(PLAIN, label_smoothing=0.2), replace(PLAIN, length_normalise=True, beta=3.0)],
    ids=["plain", "smoothed", "normalised"],
)
def test_loss_and_gradients_are_those_of_the_definition(models, objective):
    student, reference = models
    batch = answer_batch(BATCH)
    found = objective(student, reference, batch)
    parameters = [p for p in student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found.total, parameters)
    ratios = [answers(model, batch, objective.length_normalise) for model in (student, reference)]
    rewards = objective.beta * (ratios[0] - ratios[1])
    margins, smoothing = rewards[0::2] - rewards[1::2], objective.label_smoothing
    wanted = -(margins.sigmoid().log() * (1 - smoothing) + (-margins).sigmoid().log() * smoothing).mean()
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found.parts["reward_margin"].item() == pytest.approx(margins.mean().item(), rel=1e-4)
    assert found.parts["accuracy"].item() == (margins > 0).float().mean().item()
    assert found.parts["chosen_log_probability"].item() == pytest.approx(
        ratios[0][0::2].mean().item(), rel=1e-5
    )
    expected = torch.autograd.grad(wanted, parameters)
    error = sum((a - b).pow(2).sum() for a, b in zip(gradients, expected, strict=True)).sqrt()
    assert error < 1e-4 * sum(b.pow(2).sum() for b in expected).sqrt()


def test_the_student_itself_as_reference_gives_ln_2(models):
    student, _ = models
    terms = PLAIN(student, student, answer_batch(BATCH))
    assert terms.total.item() == pytest.approx(math.log(2), abs=1e-6)
    assert terms.parts["reward_margin"].item() == 0


def test_prompts_and_padding_do_not_count(models):
    batch = answer_batch(BATCH)
    wanted = PLAIN(*models, batch)
    shorter = {name: tensor[2:4, :17] for name, tensor in batch.items()}
    alone = PLAIN(*models, shorter)
    both = [PLAIN(*models, {name: t[i : i + 2] for name, t in batch.items()}) for i in (0, 2)]
    assert alone.total.item() == pytest.approx(both[1].total.item(), rel=1e-5)
    assert wanted.total.item() == pytest.approx(sum(one.total.item() for one in both) / 2, rel=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_length_normalisation_takes_the_mean(tables, normalised):
    # A uniform student against a reference that is a bit wrong: every token adds the same.
    student, reference = tables([[0.0, 0.0, 0.0]] * 3), tables([[1.0, 0.0, 0.0]] * 3)
    labels = torch.tensor([[0, 0, 0, 0], [0, IGNORED, IGNORED, IGNORED]])
    batch = {"input_ids": labels.clamp_min(0), "labels": labels, "document_ids": torch.zeros(2, 4).int()}
    margin = PLAIN.beta * (math.log(1 / 3) - math.log(math.e / (math.e + 2))) * (0 if normalised else 3)
    terms = replace(PLAIN, length_normalise=normalised)(student, reference, batch)
    assert terms.parts["reward_margin"].item() == pytest.approx(margin, abs=1e-6)


def test_training_widens_the_margin(models):
    student, _ = models
    reference = frozen(student)
    batch, held_out = answer_batch(BATCH), answer_batch(BATCH, seed=4)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    optimizer, seen = torch.optim.Adam(student.parameters(), 1e-3), []
    for _ in range(12):
        terms = PLAIN(student, reference, batch)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        seen.append({name: value.item() for name, value in terms.parts.items()})
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and seen[-1]["loss"] < 0.3
    margins = [step["reward_margin"] for step in seen]
    assert margins == sorted(margins) and margins[-1] > 1 and seen[-1]["accuracy"] == 1
    gaps = [step["chosen_log_probability"] - step["rejected_log_probability"] for step in seen]
    assert gaps[-1] > gaps[0]  # the chosen answers have gained on the rejected ones
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())
    with torch.inference_mode():  # as Lightning validates
        assert math.isfinite(PLAIN(student, reference, held_out).parts["accuracy"])


def frozen(model) -> nn.Module:
    """The copy that a stage makes of its student."""
    options = StudentConfig(layer_plan=LayerPlan(), mixers={"rwkv7": RWKV7Options()})
    return frozen_copy(None, Student(model, ["rwkv7"] * 3, options))


def test_the_reference_is_a_copy_that_says_the_same(models):
    student, _ = models
    copy = frozen(student)
    batch = answer_batch(BATCH)
    assert torch.equal(answers(copy, batch), answers(student, batch))
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())
    owned = {p.data_ptr() for p in student.parameters()}
    assert not owned & {p.data_ptr() for p in copy.parameters()}


def test_the_head_learns_under_autocast(models):
    # Weights that autocast has cast without gradients must not be taken for those that need some.
    student, reference = models
    with torch.autocast("cpu", torch.bfloat16):
        terms = PLAIN(student, reference, answer_batch(BATCH))
    terms.total.backward()
    assert student.get_output_embeddings().weight.grad.abs().sum() > 0


def test_logits_of_a_row_never_exist_at_once():
    teacher = tiny_teacher(layers=1, vocab_size=3001)
    student, reference = tiny_student(teacher), tiny_student(teacher, noise=0.05)
    with LiveBytes() as watched:
        PLAIN(student, reference, answer_batch([[150], [150]])).total.backward()
    assert watched.largest == 64 * 3001  # the head's gradient; all answer tokens would be 150 x 3001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"objective\.beta=0\.0 must be positive"),
        ({"label_smoothing": 0.5}, r"objective\.label_smoothing=0\.5 must lie in \[0, 0\.5\)"),
        ({"chunk_tokens": 0}, r"objective\.chunk_tokens=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DirectPreference(**options)
