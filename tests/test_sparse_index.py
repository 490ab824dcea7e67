"""What the index of sparse attention learns: against a plain loop over tokens, and beside attention."""

import math

import attention_checks
import pytest
import torch
from attention_checks import GROUPED, hidden_of, plain_heads, rotary
from mixer_checks import assert_close, student_of
from tiny import packed_batch, packed_ids, tiny_teacher
from torch import Tensor

from models import ranks
from models.backbone import SequenceContext
from models.mixers import SparseAttentionMixer, SparseAttentionOptions, block_choice
from models.objectives import Align
from models.student import student_mixers


@pytest.fixture(autouse=True)
def few_products(monkeypatch):
    """Several pieces of scores in every row."""
    monkeypatch.setattr(block_choice, "PRODUCTS", 700)


def make(noise: float = 0.1, **options) -> SparseAttentionMixer:
    chosen = {"block_length": 5, "top_k": 2, "window": 7, "index_width": 32, **options}
    return attention_checks.make(SparseAttentionMixer, GROUPED, noise, **chosen)


def plain_index_loss(mixer: SparseAttentionMixer, hidden: Tensor) -> Tensor:
    """KL(attention's true share of complete blocks ‖ softmax of their scores), all blocks, one document."""
    query, key, _ = plain_heads(mixer, hidden, rotary(torch.arange(len(hidden))[None]))
    asks, index = mixer.index(hidden[None], hidden[None])
    index = index + (index.bfloat16() - index).detach()
    length, losses = mixer.options.block_length, []
    for token in range(2 * length, len(hidden)):
        past = token // length
        for group in range(mixer.shape.kv_heads):
            heads = [
                h for h in range(mixer.shape.heads) if h * mixer.shape.kv_heads // mixer.shape.heads == group
            ]
            shares = [
                torch.softmax(key[: token + 1, group] @ query[token, head] / math.sqrt(key.shape[2]), 0)
                for head in heads
            ]
            target = torch.stack(shares).mean(0)[: past * length].unflatten(0, (past, length)).sum(1)
            target = (target / target.sum()).detach()
            scores = index[0, : past * length, 0] @ asks[0, token, group]
            scores = scores.unflatten(0, (past, length)).logsumexp(1)
            losses.append((target * (target.log() - scores.double().log_softmax(0))).sum())
    return torch.stack(losses).mean()


def test_the_index_learns_the_true_share_of_each_block():
    mixer, hidden = make(), hidden_of(rows=1)
    mixer.dense = True
    context = SequenceContext(index_losses=[])
    mixer(hidden, sequence_context=context)
    (found,), wanted = context.index_losses, plain_index_loss(mixer, hidden[0])
    assert abs(found.item() - wanted.item()) < 1e-5 * wanted.item()
    parameters = list(mixer.index.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_the_index_loss_reaches_the_index_alone():
    mixer, hidden = make(), hidden_of().requires_grad_()
    context = SequenceContext(index_losses=[])
    mixer(hidden, sequence_context=context)
    context.index_losses[0].backward()
    assert hidden.grad is None
    moved = {name for name, parameter in mixer.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in mixer.named_parameters() if name.startswith("index.")}


def test_looking_at_other_blocks_changes_no_result():
    """Blocks that are tried while the index learns are not attended to."""
    mixer, hidden = make(index_tried=3), hidden_of()
    context = SequenceContext(index_losses=[])
    with torch.no_grad():
        found, wanted = mixer(hidden, sequence_context=context)[0], mixer(hidden)[0]
    assert_close(found, wanted)
    assert context.index_losses[0] > 0


def test_the_index_finds_a_block_that_attention_wants():
    """Trained beside fixed attention, its divergence falls to a fraction."""
    torch.manual_seed(0)
    mixer = make(noise=0.3)
    mixer.dense = True
    hidden = [hidden_of(tokens=tokens) for tokens in (40, 45, 50, 55)]
    optimizer = torch.optim.Adam(mixer.index.parameters(), 0.01)
    losses = []
    for step in range(60):
        context = SequenceContext(index_losses=[])
        mixer(hidden[step % 4], sequence_context=context)
        optimizer.zero_grad()
        context.index_losses[0].backward()
        optimizer.step()
        losses.append(context.index_losses[0].item())
    assert losses[-1] < 0.5 * losses[0], losses[:: len(losses) // 5]


def test_processes_share_the_mean_over_all_queries(monkeypatch):
    """However unevenly documents, and so the queries with a choice, are spread over them."""
    mixer, hidden = make(), hidden_of()
    rows = packed_ids([[30, 10, len(hidden[0]) - 40], [len(hidden[0])]])

    def loss_of(part: slice) -> Tensor:
        context = SequenceContext(index_losses=[], document_ids=rows[part])
        mixer(hidden[part], sequence_context=context)
        return context.index_losses[0]

    counts = []
    monkeypatch.setattr(ranks, "mean", lambda count: counts.append(count) or count)
    wanted = loss_of(slice(None))
    for row in range(2):
        loss_of(slice(row, row + 1))
    assert counts[1] != counts[2] and counts[0] == counts[1] + counts[2]
    monkeypatch.setattr(ranks, "mean", lambda count: counts[0] / 2)
    shares = [loss_of(slice(row, row + 1)) for row in range(2)]
    assert_close(sum(shares) / 2, wanted)
    parameters = list(mixer.index.parameters())
    found = torch.autograd.grad(sum(shares) / 2, parameters)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, parameters), strict=True):
        assert_close(ours, theirs)


def test_alignment_trains_and_tells_the_index():
    """Its part is the mean over layers; a frozen one has none."""
    options = SparseAttentionOptions(block_length=4, window=5, top_k=1, index_width=16)
    student, batch = student_of("sparse", options), packed_batch([[24], [20, 4]])
    mixers = student_mixers(student)
    terms = Align()(student, tiny_teacher(), batch)
    terms.total.backward()
    assert terms.parts["index"] > 0
    assert all(mixer.index.query.weight.grad.abs().sum() > 0 for mixer in mixers.values())
    apart = []
    for place, mixer in mixers.items():
        for other, module in mixers.items():
            module.index.requires_grad_(other == place)
        apart.append(Align()(student, tiny_teacher(), batch).parts["index"])
        assert mixer.index.query.weight.requires_grad
    torch.testing.assert_close(terms.parts["index"], torch.stack(apart).mean())
    student.requires_grad_(False)
    assert "index" not in Align()(student, tiny_teacher(), batch).parts
