"""Induction heads: how they are found, and that a started bank finds what followed the like of its token."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import HEAD_SIZE, convert, random_ids, student_config, tiny_teacher
from torch import Tensor

from models.backbone import SequenceContext
from models.evaluation import evaluate
from models.induction import SCORE, LayerInputs, matching_maps, read_copies, scale_banks, start_bank
from models.mixers import AttentionShape, RWKV7Mixer, RWKV7Options
from models.mixers.induction_bank import FEATURES, START_RATE
from models.student import student_mixers

PASSAGE, WIDTH = 40, 4 * HEAD_SIZE
SHAPES = {
    "plain": AttentionShape(WIDTH, 4, 2, HEAD_SIZE),
    "biases": AttentionShape(WIDTH, 4, 4, HEAD_SIZE, value_bias=True, output_bias=True),
}


def uneven_hidden(rows: int, tokens: int, seed: int) -> Tensor:
    """[B,T,D] with a common mean, and variances that differ a thousandfold between directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    spread = torch.logspace(-1.4, 0, WIDTH)
    return torch.randn(rows, tokens, WIDTH, generator=generator) * spread @ mix + 3 * mix[0]


def inputs_of(hidden: Tensor, scores: list[float]) -> LayerInputs:
    flat = hidden.flatten(0, 1).double()
    one, matched = flat.new_tensor(1.0), flat.new_tensor(scores)
    return LayerInputs(flat.new_tensor(len(flat)), flat.sum(0), flat.T @ flat, matched, one)


def mixer_of(shape: str = "plain", **options: Any) -> RWKV7Mixer:
    torch.manual_seed(0)
    options = RWKV7Options(induction_layers=[0], **options)
    mixer = RWKV7Mixer(SHAPES[shape], options, layer_index=0, layer_count=2, first=True)
    with torch.no_grad():
        for name, part in mixer.named_parameters():
            if name.endswith("bias") and "." in name and name.split(".")[0] in ("value", "output"):
                part.add_(torch.randn_like(part))
    return mixer


def repeated(tokens: int = PASSAGE) -> dict[str, Tensor]:
    ids = random_ids(3, tokens).repeat(1, 2)
    return {"input_ids": ids, "document_ids": torch.zeros_like(ids, dtype=torch.int32)}


# --- what is read -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_the_attention_on_what_followed_the_first_copy():
    teacher, batch = tiny_teacher(), repeated()
    found = read_copies([0, 2], teacher, [batch])
    assert teacher.config._attn_implementation == "sdpa", "the teacher is as it was"
    teacher.set_attn_implementation("eager")
    attentions = teacher(batch["input_ids"], output_attentions=True).attentions
    for layer, inputs in found.items():
        asked = range(PASSAGE, 2 * PASSAGE - 1)
        wanted = torch.stack([attentions[layer][:, :, t, t - PASSAGE + 1] for t in asked]).mean((0, 1))
        torch.testing.assert_close(inputs.scores.float(), wanted, atol=1e-6, rtol=1e-5)
        assert inputs.tokens == batch["input_ids"].numel()
        assert torch.linalg.eigvalsh(inputs.covariance).min() > -1e-9


# --- the start ----------------------------------------------------------------------------------------------


def test_maps_whiten_hidden_states_and_share_no_direction():
    inputs = inputs_of(hidden := uneven_hidden(8, 400, seed=1), [1.0])
    maps = matching_maps(inputs, WIDTH - 1)
    seen = maps @ hidden.flatten(0, 1).double().T  # [rows, tokens]
    torch.testing.assert_close(seen.mean(1), torch.zeros_like(seen.mean(1)), atol=1e-9, rtol=0)
    identity = torch.eye(len(seen)).double()
    torch.testing.assert_close(torch.cov(seen, correction=0), identity, atol=1e-6, rtol=0)
    more = matching_maps(inputs, 2 * WIDTH)
    assert more.shape == (2 * WIDTH, WIDTH) and torch.equal(more[: WIDTH - 1], maps), (
        "the same in every process"
    )
    assert torch.linalg.matrix_rank(more[WIDTH - 1 : 2 * WIDTH - 2]) == WIDTH - 1


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_started_bank_finds_what_followed(shape, heads, features):
    """Its output, of what the teacher's induction heads 1 and 3 would say of the very token that followed."""
    mixer = mixer_of(shape, induction_heads=heads, induction_features=features)
    own = mixer.output.weight.clone()
    inputs = inputs_of(uneven_hidden(8, 400, seed=1), [0.0, 0.5, SCORE - 1e-6, 0.2])
    hidden = uneven_hidden(4, PASSAGE, seed=2).repeat(1, 2, 1)
    context = SequenceContext()
    assert (mixer.induction(hidden, context, None, "reference") == 0).all(), "a bank starts at 0"
    assert start_bank(mixer, inputs) == [1, 3]
    asked = torch.arange(PASSAGE, 2 * PASSAGE - 1)
    found = mixer.induction(hidden, context, None, "reference")[:, asked]
    values = mixer.repeat_kv(mixer.split(mixer.value(hidden)))[:, asked - PASSAGE + 1]
    values[:, :, [0, 2]] = 0
    followed = values.flatten(2) @ own.T
    found, followed = (F.normalize(x - x.mean(1, keepdim=True), dim=-1) for x in (found, followed))
    nearest = (found @ followed.transpose(1, 2)).argmax(-1)
    right = (nearest == torch.arange(len(asked))).float().mean()
    assert right > 0.6, f"{float(right):.2f} of the tokens; chance is {1 / len(asked):.2f}"
    scale = mixer.output.weight / own
    wanted = torch.tensor([1.0, 0.1, 1.0, 0.1]).repeat_interleave(HEAD_SIZE).expand_as(scale)
    torch.testing.assert_close(scale, wanted)
    rate = torch.sigmoid(mixer.induction.rate.bias)
    torch.testing.assert_close(rate, torch.full_like(rate, START_RATE))


@torch.no_grad()
def test_a_bank_is_as_loud_as_what_its_mixer_lacks():
    teacher = tiny_teacher()
    student, _ = convert(teacher, student_config(induction_layers=[1], induction_heads=1))
    mixer, batch = student_mixers(student)[1], repeated()
    inputs = read_copies([1], teacher, [batch])[1]
    inputs.matched += inputs.asked  # as if both heads were induction heads
    start_bank(mixer, inputs)
    given = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, out: given.update(kwargs=kwargs, target=out[0]), with_kwargs=True
        )
        for layer in teacher.model.layers[1:2]
    ]
    teacher(batch["input_ids"])
    handles[0].remove()
    hidden = given["kwargs"]["hidden_states"]
    bank = mixer.induction(hidden, SequenceContext(), None, "reference")
    rest = mixer(hidden, given["kwargs"]["position_embeddings"])[0] - bank
    factor = ((given["target"] - rest) * bank).sum() / bank.square().sum()
    before = mixer.induction.output.weight.clone()
    scale_banks({1: mixer}, teacher, [batch])
    torch.testing.assert_close(mixer.induction.output.weight, before * factor.clamp(0.1, 10))
    scale_banks({1: mixer}, teacher.bfloat16(), [batch])  # now as loud as it should be, but for rounding
    torch.testing.assert_close(
        mixer.induction.output.weight, before * factor.clamp(0.1, 10), rtol=0.05, atol=1e-4
    )


@torch.no_grad()
def test_a_bank_that_was_not_started_changes_nothing():
    teacher = tiny_teacher()
    batch = repeated() | {"labels": repeated()["input_ids"]}
    figures = []
    for options in ({}, {"induction_layers": [0, 2]}):
        student, rows = convert(teacher, student_config(**options))
        figures.append(evaluate(student, teacher, [batch]).sums)
        new = [row.target for row in rows if ".induction." in row.target and row.action == "new"]
        assert len(new) == len(options) * 2 * 11
    assert figures[0] == figures[1]


def test_a_bank_without_heads_or_with_unknown_features_is_refused():
    with pytest.raises(ValueError, match="induction_heads=0"):
        RWKV7Options(induction_layers=[0], induction_heads=0)
    with pytest.raises(ValueError, match="induction_features='sine'"):
        RWKV7Options(induction_layers=[0], induction_features="sine")
