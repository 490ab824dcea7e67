"""Held-out metrics against dense computations and hand-made examples."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import packed_batch, random_ids, tiny_student, tiny_teacher
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from models import evaluation
from models.evaluation import (
    EVERY,
    MetricSums,
    batch_metrics,
    copy_gain,
    evaluate,
    held_out_row,
    reverse_kl,
    top5_agreement,
)
from models.layer_errors import layer_errors, why_not_comparable
from models.losses import IGNORED

ROWS = [[9, 14, -3], [-4, 22]]


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher and a student."""
    teacher = tiny_teacher()
    return teacher, tiny_student(teacher, (1,))


def test_a_model_agrees_with_itself(models):
    teacher, _ = models
    means = batch_metrics(teacher, teacher, packed_batch(ROWS), EVERY).means()
    assert means["kl"] == pytest.approx(0.0, abs=1e-7)
    assert means["reverse_kl"] == pytest.approx(0.0, abs=1e-7)
    assert means["top1_agreement"] == means["top5_agreement"] == 1.0
    assert means["loss"] == means["teacher_loss"]


def test_an_all_attention_student_agrees_with_its_teacher():
    teacher = tiny_teacher("qwen2_tied")
    means = batch_metrics(tiny_student(teacher, (0, 1, 2), noise=0.0), teacher, packed_batch(ROWS)).means()
    assert means["kl"] == pytest.approx(0.0, abs=1e-7) and means["top1_agreement"] == 1.0


@pytest.mark.parametrize("chunk", [5, 2048])
def test_metrics_equal_a_dense_computation_document_by_document(models, chunk, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK_TOKENS", chunk)
    teacher, student = models
    batch = packed_batch(ROWS)
    sums = batch_metrics(student, teacher, batch, EVERY)
    wanted = dict.fromkeys(("loss", "teacher_loss", *EVERY), 0.0)
    tokens = 0
    with torch.no_grad():
        for row, document in ((0, 0), (0, 1), (1, 0)):
            ids = batch["input_ids"][row, batch["document_ids"][row] == document][None]
            ours, theirs = (model(ids).logits[0, :-1].double() for model in (student, teacher))
            wanted["loss"] += F.cross_entropy(ours, ids[0, 1:], reduction="sum").item()
            wanted["teacher_loss"] += F.cross_entropy(theirs, ids[0, 1:], reduction="sum").item()
            wanted["kl"] += F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="sum").item()
            wanted["reverse_kl"] += F.kl_div(theirs.log_softmax(-1), ours.softmax(-1), reduction="sum").item()
            wanted["top1_agreement"] += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
            among = ours.topk(5).indices == theirs.argmax(-1, keepdim=True)
            wanted["top5_agreement"] += among.any(-1).sum().item()
            tokens += ids.shape[1] - 1
    assert wanted["top1_agreement"] < wanted["top5_agreement"] < tokens
    assert sums.tokens == tokens and sums.sums.keys() == wanted.keys()
    assert batch_metrics(student, teacher, batch).sums.keys() == {
        "loss",
        "teacher_loss",
        "kl",
        "top1_agreement",
    }
    for name, value in wanted.items():
        assert sums.sums[name] == pytest.approx(value, rel=1e-4), name
        assert sums.means()[name] == pytest.approx(value / tokens, rel=1e-4)


def test_sums_by_position_add_up_to_the_totals(models):
    teacher, student = models
    batch = packed_batch(ROWS)
    sums = batch_metrics(student, teacher, batch)
    assert sums.by_position["count"].tolist() == (batch["labels"] != IGNORED).sum(0).tolist()
    assert sums.by_position["count"].sum() == sums.tokens
    for name, total in sums.sums.items():
        assert sums.by_position[name].shape == (26,)
        assert float(sums.by_position[name].sum()) == pytest.approx(total, rel=1e-12)
    means = sums.position_means()
    for position in range(26):
        count, total = sums.by_position["count"][position], sums.by_position["loss"][position]
        value = means["loss"][position]
        assert math.isnan(value) if count == 0 else value == pytest.approx(float(total / count))
    assert "count" not in means


def test_a_result_stands_at_the_position_of_the_predicting_token(models):
    teacher, _ = models
    batch = packed_batch([[12]])
    batch["labels"][:, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]] = IGNORED
    sums = batch_metrics(teacher, None, batch)
    logits = teacher(batch["input_ids"]).logits[0, 5]
    wanted = F.cross_entropy(logits, batch["input_ids"][0, 6]).item()
    assert sums.tokens == 1 and sums.by_position["loss"].nonzero().tolist() == [[5]]
    assert float(sums.by_position["loss"][5]) == pytest.approx(wanted, rel=1e-5)


def test_batches_add_up(models):
    teacher, student = models
    batches = [packed_batch(ROWS, seed=seed) for seed in (1, 2)]
    together = evaluate(student, teacher, batches)
    apart = [batch_metrics(student, teacher, batch) for batch in batches]
    stacked = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    at_once = batch_metrics(student, teacher, stacked)
    assert together.tokens == apart[0].tokens + apart[1].tokens == at_once.tokens
    for name, value in together.sums.items():
        assert value == pytest.approx(apart[0].sums[name] + apart[1].sums[name])
        assert value == pytest.approx(at_once.sums[name], rel=1e-4)
        torch.testing.assert_close(
            together.by_position[name], at_once.by_position[name], rtol=1e-4, atol=1e-4
        )


def test_a_batch_without_labels_adds_nothing(models):
    teacher, student = models
    empty = packed_batch(ROWS)
    empty["labels"].fill_(IGNORED)
    full = batch_metrics(student, teacher, packed_batch(ROWS))
    total = evaluate(student, teacher, [empty, packed_batch(ROWS), empty])
    assert total.tokens == full.tokens and total.sums == pytest.approx(full.sums)
    torch.testing.assert_close(total.by_position["count"], full.by_position["count"])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_and_no_gradient(models, training):
    _, student = models
    modes, probe = [], student.base_model.layers[0].mlp
    handle = probe.register_forward_hook(
        lambda module, args, output: modes.append((module.training, output.requires_grad))
    )
    student.train(training)
    evaluate(student, None, [packed_batch(ROWS)])
    handle.remove()
    assert student.training == training and modes == [(False, False)]
    student.eval()


def test_the_two_kl_by_hand():
    """Model (1/2, 1/2), teacher (3/4, 1/4)."""
    model, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert EVERY["kl"](model, teacher).item() == pytest.approx(forward, rel=1e-5)
    assert reverse_kl(model, teacher).item() == pytest.approx(reverse, rel=1e-5)


def test_top5_by_hand():
    """The teacher's choice is token 3; the model puts 4 others, 5 or none before it, or knows nothing."""
    teacher = F.one_hot(torch.tensor([3] * 4), 8).float()
    model = torch.zeros(4, 8)
    model[0, [0, 1, 2, 4]] = 1.0
    model[1, [0, 1, 2, 4, 5]] = 1.0
    model[3] = math.nan
    assert top5_agreement(model, teacher).tolist() == [1.0, 0.0, 1.0, 0.0]


# --- layers -------------------------------------------------------------------------------------------------


def test_layer_errors_equal_a_dense_computation(models):
    """Two batches of unequal size, documents and padding; float64 throughout in what is held against."""
    teacher, student = models
    batches = [packed_batch(ROWS), packed_batch([[7]], seed=5)]
    found = layer_errors(student, teacher, batches)
    squares = [[] for _ in found]
    with torch.no_grad():
        for batch in batches:
            for row, ids in enumerate(batch["document_ids"]):
                for document in set(ids.tolist()) - {-1}:
                    tokens = batch["input_ids"][row, ids == document][None]
                    for index in range(len(found)):
                        ours, theirs = (layer_output(m, index, tokens).double() for m in (student, teacher))
                        squares[index] += (
                            ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().tolist()
                        )
    wanted = [math.sqrt(sum(values) / len(values)) for values in squares]
    assert len(squares[0]) == 9 + 14 + 22 + 7
    assert found == pytest.approx(wanted, rel=1e-4) and min(found) > 0.01


def layer_output(model: PreTrainedModel, index: int, tokens: Tensor) -> Tensor:
    """[T,D] after decoder layer `index`, of a row without padding."""
    kept = []
    handle = model.base_model.layers[index].register_forward_hook(lambda m, a, output: kept.append(output))
    model(tokens)
    handle.remove()
    return kept[0][0]


def test_a_model_has_no_layer_errors_against_itself(models):
    teacher, _ = models
    assert layer_errors(teacher, teacher, [packed_batch(ROWS)]) == [0.0] * 3
    assert not teacher.base_model.layers[0]._forward_hooks


def test_layers_that_do_not_pair_up_are_not_compared(models):
    teacher, student = models
    assert why_not_comparable(student, teacher) is None
    assert "num_hidden_layers is 2" in why_not_comparable(tiny_teacher(layers=2), teacher)
    assert "hidden_size" in why_not_comparable(tiny_teacher(hidden_size=32), teacher)


# --- copying ------------------------------------------------------------------------------------------------


def passages_twice(length: int, rows: int = 2) -> dict[str, Tensor]:
    """Rows that hold a passage twice, as the data module makes them."""
    ids = random_ids(rows, length).repeat(1, 2)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    return {"input_ids": ids, "labels": labels, "document_ids": torch.zeros_like(ids, dtype=torch.int32)}


def test_copy_gain_by_hand():
    """Positions 0-2 predict the first copy of 4 tokens, 3 where the second begins, 4-6 the second copy."""
    loss, count = torch.tensor([6.0, 8.0, 10.0, 100.0, 1.0, 2.0, 3.0, 50.0]), torch.full((8,), 2.0)
    found = copy_gain(MetricSums(16, {}, {"loss": loss, "count": count}))
    assert found == {"first": 4.0, "second": 1.0, "gain": 3.0}
    uneven = torch.tensor([2.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    found = copy_gain(MetricSums(12, {}, {"loss": loss, "count": uneven}))
    assert found == {"first": 3.0, "second": 2.0, "gain": 1.0}


class Oracle(nn.Module):
    """Knows in the second copy what follows, and nothing else: the logits of a perfect copying machine."""

    def __init__(self, length: int, vocabulary: int):
        super().__init__()
        self.length, self.vocabulary = length, vocabulary
        self.head, self.config = nn.Identity(), PretrainedConfig()
        self.anything = nn.Parameter(torch.zeros(1))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def states(self, input_ids: Tensor) -> Tensor:
        """Logits [B,T,V]: flat, but sure of the token one passage back where there has been one."""
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for token in range(self.length, input_ids.shape[1] - 1):
            logits[torch.arange(len(input_ids)), token, input_ids[:, token + 1 - self.length]] = 50.0
        return logits


def test_a_perfect_copying_machine_gains_everything(monkeypatch):
    monkeypatch.setattr(evaluation, "hidden_states", lambda model, ids, documents: model.states(ids))
    found = copy_gain(evaluate(Oracle(10, 97), None, [passages_twice(10)]))
    assert found["first"] == pytest.approx(math.log(97), rel=1e-5)
    assert found["second"] == pytest.approx(0.0, abs=1e-6)
    assert found["gain"] == pytest.approx(math.log(97), rel=1e-5)


def test_a_row_of_the_results_table(models):
    teacher, student = models
    batches, copies = [packed_batch(ROWS)], [passages_twice(10)]
    row, curves = held_out_row(student, teacher, batches, copies)
    means, gain = evaluate(student, teacher, batches).means(), copy_gain(evaluate(student, None, copies))
    assert row["loss"] == means["loss"] and row["perplexity"] == pytest.approx(math.exp(means["loss"]))
    assert (row["kl"], row["top1_agreement"]) == (means["kl"], means["top1_agreement"])
    assert (row["copy_first"], row["copy_second"], row["copy_gain"]) == tuple(gain.values())
    assert len(curves["loss"]) == 26
    alone, _ = held_out_row(teacher, None, batches, copies)
    assert "kl" not in alone and "top1_agreement" not in alone
    assert alone["loss"] == pytest.approx(means["teacher_loss"])
