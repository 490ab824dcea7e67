"""Parallel forward, prefill in pieces and token-by-token decoding are one function; generation; the cache."""

import random

import pytest
import torch
from tiny import (
    ARWKV,
    LAYERS,
    convert,
    packed_batch,
    packed_ids,
    random_ids,
    student_config,
    tiny_student,
    tiny_teacher,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.backbone import document_mask, document_positions, has_documents, hidden_states
from models.decoding import decoding_cost
from models.sequence_state import RecurrentCacheLayer, cache_bytes_per_row, recurrent_layer
from models.student_folder import load_model, model_folder

TOLERANCE = 1e-9  # of float64: what rounding does is no question here, and random models magnify it
PLANS = {"pure": (), "keep_middle": (1,), "keep_first": (0,), "keep_last": (-1,)}
INDUCTION = {"induction_layers": [0, 2], "induction_heads": 1}
FLAVOURS = {"radlads": {}, "arwkv": ARWKV, "induction": INDUCTION}
STUDENTS = [(plan, flavour, "qwen2") for plan in PLANS for flavour in FLAVOURS]
STUDENTS += [("keep_middle", "arwkv", "qwen3"), ("pure", "radlads", "llama_biased")]


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    """Decoding needs none."""
    with torch.no_grad():
        yield


@pytest.fixture(params=STUDENTS, ids="-".join, scope="module")
def student(request) -> PreTrainedModel:
    plan, flavour, family = request.param
    return tiny_student(tiny_teacher(family), PLANS[plan], **FLAVOURS[flavour]).double()


def pieces(tokens: int, seed: int) -> list[int]:
    """Sizes from 1 to 9 that add up to `tokens`; seed 0: token by token, seed 1: one piece, then tokens."""
    if seed == 0:
        return [1] * tokens
    if seed == 1:
        return [tokens - 5] + [1] * 5
    chance, sizes = random.Random(seed), []
    while sum(sizes) < tokens:
        sizes.append(min(chance.randint(1, 9), tokens - sum(sizes)))
    return sizes


def in_pieces(model: PreTrainedModel, ids: Tensor, seed: int, mask: Tensor | None = None) -> Tensor:
    """Logits [B,T,V] through the cache, as `generate` calls the model."""
    cache, outputs, start = DynamicCache(config=model.config), [], 0
    for size in pieces(ids.shape[1], seed):
        stop = start + size
        given = {} if mask is None else {"attention_mask": mask[:, :stop]}
        outputs.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **given).logits)
        start = stop
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(outputs, 1)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    """To a share of the values' scale."""
    assert torch.isfinite(found).all()
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


# --- one function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_pieces_equal_the_parallel_forward(student, seed):
    ids = random_ids(2, 40)
    assert_close(in_pieces(student, ids, seed), student(ids).logits)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_pieces_equal_the_parallel_forward_in_float32(flavour, seed):
    """On the backends of float32; a model of moderate weights, which does not magnify its rounding."""
    model = tiny_student(tiny_teacher(initializer_range=0.05), (1,), noise=0.03, **FLAVOURS[flavour])
    ids = random_ids(2, 40)
    assert_close(in_pieces(model, ids, seed), model(ids).logits, tolerance=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_pieces_equal_the_text_alone_under_padding(student, side, seed):
    lengths, total = (24, 31, 3), 31
    ids, mask = random_ids(3, total), torch.zeros(3, total, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start = {"left": total - length, "right": 0, "both": (total - length) // 2}[side]
        mask[row, start : start + length] = 1
    parallel, decoded = student(ids, attention_mask=mask).logits, in_pieces(student, ids, seed, mask)
    for row in range(3):
        real = mask[row].bool()
        alone = student(ids[row, real][None]).logits[0]
        assert_close(parallel[row, real], alone)
        assert_close(decoded[row, real], alone)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_equal_each_document_alone(student, seed):
    lengths = [[-3, 11, 9, 1, 8], [13, 13, -6], [4, -5, 20, 3], [32]]
    batch = packed_batch(lengths)
    ids, documents = batch["input_ids"], batch["document_ids"]
    parallel = hidden_states(student, ids, documents)
    cache, outputs, start = DynamicCache(config=student.config), [], 0
    for size in pieces(ids.shape[1], seed):
        stop = start + size
        outputs.append(hidden_states(student, ids[:, start:stop], documents[:, :stop], cache))
        start = stop
    decoded = torch.cat(outputs, 1)
    for row in range(len(ids)):
        for document in range(int(documents[row].max()) + 1):
            place = documents[row] == document
            alone = hidden_states(student, ids[row, place][None])[0]
            assert_close(parallel[row, place], alone)
            assert_close(decoded[row, place], alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_teacher_keeps_documents_apart_as_well(attention):
    teacher = tiny_teacher().double()
    teacher.set_attn_implementation(attention)
    batch = packed_batch([[-3, 11, 9, 2], [13, 8, -4]])
    ids, documents = batch["input_ids"], batch["document_ids"]
    found = hidden_states(teacher, ids, documents)
    for row, document in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        place = documents[row] == document
        alone = hidden_states(teacher, ids[row, place][None])[0]
        assert_close(found[row, place], alone, tolerance=1e-6)  # eager attention's softmax is in float32


def test_an_attention_without_masks_is_refused_in_words():
    teacher = tiny_teacher()
    teacher.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="teacher.attention"):
        hidden_states(teacher, random_ids(1, 6), packed_ids([[3, 3]]))


def test_one_text_may_be_continued_after_right_padding(student):
    """A batch prefilled with padding on the right goes on with real tokens, as a chat turn does."""
    first, more = random_ids(2, 12), random_ids(2, 6, seed=8)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    cache = DynamicCache(config=student.config)
    student(first, attention_mask=mask, past_key_values=cache, use_cache=True)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.int64)], 1)
    found = student(more, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    parallel = student(torch.cat([first, more], 1), attention_mask=mask).logits[:, 12:]
    for row, length in enumerate((12, 7)):
        alone = student(torch.cat([first[row, :length], more[row]])[None]).logits[0, length:]
        assert_close(found[row], alone)
        assert_close(parallel[row], alone)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_padding_within_a_document_is_passed_over(flavour):
    model = tiny_student(tiny_teacher(), **{**FLAVOURS[flavour], "rope": False}).double()
    ids = random_ids(1, 14)
    documents = packed_ids([[5, -4, 5]])
    documents[documents == 1] = 0
    real = documents[0] >= 0
    alone = hidden_states(model, ids[:, real])[0]
    assert_close(hidden_states(model, ids, documents)[0, real], alone)
    cache = DynamicCache(config=model.config)
    steps = [hidden_states(model, ids[:, i : i + 1], documents[:, : i + 1], cache) for i in range(14)]
    assert_close(torch.cat(steps, 1)[0, real], alone)


@pytest.mark.parametrize("how", ["embeddings", "positional"])
def test_padding_is_read_however_the_model_is_called(how):
    model, ids = tiny_student(tiny_teacher(), (1,), **ARWKV), random_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    wanted = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    if how == "embeddings":
        found = model.model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    else:
        found = model.model(ids, mask)
    assert torch.equal(found.last_hidden_state, wanted)


# --- invariances --------------------------------------------------------------------------------------------


def test_a_document_depends_on_nothing_around_it(student):
    """Neither on the row's other documents, nor on padding, nor on other rows, nor on the order of rows."""
    batch = packed_batch([[6, 14, 10], [-2, 17, 11], [25, -5], [30]])
    ids, documents = batch["input_ids"], batch["document_ids"]
    found = hidden_states(student, ids, documents)
    other = ids.clone()
    changed = (documents == 0) & (torch.arange(4) < 2)[:, None] | (documents < 0)
    other[changed] = (ids[changed] + 1) % 90
    again = hidden_states(student, other, documents)
    same = (documents >= 0) & ~changed
    assert_close(again[same], found[same])
    assert (again[changed & (documents >= 0)] - found[changed & (documents >= 0)]).abs().max() > 0.01
    order = torch.tensor([2, 0, 3, 1])
    reordered = hidden_states(student, ids[order], documents[order])
    real = documents[order] >= 0
    assert_close(reordered[real], found[order][real])
    renumbered = torch.where(documents >= 0, 3 * documents + 5, documents)
    assert torch.equal(hidden_states(student, ids, renumbered)[documents >= 0], found[documents >= 0])


def test_document_masks_and_positions_by_hand():
    ids = packed_ids([[-1, 2, 2], [5]])
    assert document_positions(ids).tolist() == [[0, 0, 1, 0, 1], [0, 1, 2, 3, 4]]
    mask = document_mask(ids, 5)[0, 0]
    seen = [[int(key) for key in row.nonzero()] for row in mask]
    assert seen == [[0], [1], [1, 2], [3], [3, 4]]
    assert torch.equal(document_mask(ids, 2), document_mask(ids, 5)[:, :, -2:])
    assert not has_documents(None) and not has_documents(torch.full((2, 3), 4))
    assert has_documents(ids) and has_documents(packed_ids([[2, -1]]))


# --- generation ---------------------------------------------------------------------------------------------


def greedy(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """Argmax of the full forward, again and again."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy_generation_is_the_argmax_of_the_full_forward(student):
    ids = random_ids(2, 9)
    found = student.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert found.tolist() == greedy(student, ids, 12).tolist()


def test_prompts_of_unequal_length_are_continued_as_if_alone(student):
    lengths = (4, 11, 7)
    ids, mask = random_ids(3, 11), torch.zeros(3, 11, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 11 - length :] = 1
    found = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, length in enumerate(lengths):
        assert (
            found[row, 11:].tolist() == greedy(student, ids[row, 11 - length :][None], 8)[0, length:].tolist()
        )


def beam_search(model: PreTrainedModel, ids: Tensor, use_cache: bool) -> Tensor:
    options = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **options)


def test_beam_search_reorders_states(student, monkeypatch):
    ids, moves = random_ids(2, 9), []
    reorder = RecurrentCacheLayer.reorder_cache

    def watch(layer: RecurrentCacheLayer, beams: Tensor) -> None:
        moves.append(beams.tolist() != list(range(len(beams))))
        reorder(layer, beams)

    monkeypatch.setattr(RecurrentCacheLayer, "reorder_cache", watch)
    found = beam_search(student, ids, use_cache=True)
    assert any(moves), "no beam has moved, so nothing is shown"
    assert found.tolist() == beam_search(student, ids, use_cache=False).tolist()


def test_sampling_several_texts_per_prompt_works(student):
    ids = random_ids(1, 6)
    torch.manual_seed(0)
    found = student.generate(ids, max_new_tokens=4, do_sample=True, num_return_sequences=3, pad_token_id=0)
    assert found.shape == (3, 10)


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_cache_of_a_pure_student_does_not_grow(flavour):
    model = tiny_student(tiny_teacher(), **FLAVOURS[flavour])
    cost = decoding_cost({"student": model}, [16, 64, 512], tokens=1)["student"]
    state, shifted = 2 * 32 * 32 * 4, 64 * 4  # [H,N,N] and, shifted, the last token [D]
    banks = 2 * (128 * 128 + 128) * 4  # in two layers a state and the last key
    extra = {"radlads": 0, "arwkv": LAYERS * shifted, "induction": banks}
    assert cost["state_bytes"] == [LAYERS * state + extra[flavour]] * 3
    assert len(cost["seconds_per_token"]) == 3 and min(cost["seconds_per_token"]) > 0


def test_time_per_token_is_flat_for_a_student_and_grows_for_its_teacher():
    """Ratios of medians within one run in which all take turns; benchmark.py suite=decoding shows more."""
    teacher = load_model(model_folder("assets/tiny_qwen2"))
    models = {"student": convert(teacher, student_config())[0], "teacher": teacher}
    cost = decoding_cost(models, [256, 8192], tokens=40)
    growth = {
        name: found["seconds_per_token"][1] / found["seconds_per_token"][0] for name, found in cost.items()
    }
    assert growth["student"] < 1.2 < 1.5 < growth["teacher"]
    assert cost["student"]["state_bytes"][0] == cost["student"]["state_bytes"][1]


def test_the_cache_of_a_hybrid_grows_by_its_kept_layers_only():
    teacher = tiny_teacher()
    models = {"student": tiny_student(teacher, (1,)), "teacher": teacher}
    cost = decoding_cost(models, [16, 80], tokens=1)
    small, large = cost["student"]["state_bytes"]
    assert large - small == 64 * 2 * 32 * 4  # keys and values of one layer with one head
    small, large = cost["teacher"]["state_bytes"]
    assert large - small == LAYERS * 64 * 2 * 32 * 4


def test_a_cache_can_be_used_for_a_new_text_after_a_reset():
    model, ids = tiny_student(tiny_teacher(), **ARWKV), random_ids(2, 10)
    cache = DynamicCache(config=model.config)
    first = model(ids, past_key_values=cache, use_cache=True).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits, first)


def filled_layer() -> RecurrentCacheLayer:
    layer = RecurrentCacheLayer()
    layer.advance(
        torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 4), torch.arange(3.0)[:, None].expand(3, 8), 5
    )
    return layer


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.begin(torch.tensor([True, False, True])), [0, 0, 2]),
        (lambda layer: layer.begin(None), [0, 1, 2]),
    ],
    ids=["reorder", "repeat", "select", "begin", "begin_none"],
)
def test_rows_of_a_cache_layer_move_together(change, rows):
    layer = filled_layer()
    change(layer)
    assert layer.state[:, 0, 0, 0].tolist() == rows and layer.last_hidden[:, 0].tolist() == rows
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(3) == (8, 0)


def test_a_cache_layer_knows_its_place():
    layer, cache = filled_layer(), DynamicCache()
    assert layer.bytes_per_row() == (2 * 4 * 4 + 8) * 4
    with pytest.raises(TypeError, match="advance"):
        layer.update(torch.zeros(1), torch.zeros(1))
    assert cache_bytes_per_row(cache) == 0
    assert recurrent_layer(cache, 2) is cache.layers[2] and len(cache.layers) == 3
    used = DynamicCache(config=tiny_teacher().config)
    used.update(torch.zeros(1, 1, 4, 32), torch.zeros(1, 1, 4, 32), 1)
    assert isinstance(recurrent_layer(used, 0), RecurrentCacheLayer)
    with pytest.raises(ValueError, match="cache layer 1"):
        recurrent_layer(used, 1)
