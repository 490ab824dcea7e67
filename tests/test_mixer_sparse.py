"""Sparse attention against a plain choice of chunks, token by token; its limits; decoding; documents."""

import math

import attention_checks
import mixer_checks
import pytest
import torch
from attention_checks import GROUPED, SHAPES, TOKENS, hidden_of, plain_heads, rotary
from mixer_checks import assert_close, student_of
from tiny import (
    FAMILIES,
    HEAD_SIZE,
    LAYERS,
    LiveBytes,
    convert,
    packed_ids,
    random_ids,
    tiny_teacher,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.backbone import SequenceContext, document_positions, hidden_states
from models.mixers import AttentionShape, SparseAttentionMixer, SparseAttentionOptions, sparse_attention
from models.sequence_state import RecurrentCacheLayer, TokenCacheLayer, cache_bytes_per_row, token_layer


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries in every row, none of them a multiple of a chunk."""
    monkeypatch.setattr(sparse_attention, "QUERY_BLOCK", 7)


def make(shape: AttentionShape = GROUPED, noise: float = 0.1, **options) -> SparseAttentionMixer:
    chosen = {"chunk_length": 5, "top_k": 3, **options}
    return attention_checks.make(SparseAttentionMixer, shape, noise, **chosen)


def plain(mixer: SparseAttentionMixer, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """One document [T,D] through the mixer's definition in float64: each token and head ranks the complete
    chunks before its own, and one softmax runs over all tokens that it sees."""
    size, sharing = mixer.shape.head_size, mixer.shape.heads // mixer.shape.kv_heads
    length, best = mixer.options.chunk_length, mixer.options.top_k - 1
    weights = {name: parameter.double() for name, parameter in mixer.named_parameters()}
    query, key, value = plain_heads(mixer, hidden, positions)
    output = torch.zeros(len(hidden), mixer.shape.heads, size, dtype=torch.float64)
    for token in range(len(hidden)):
        own = token // length
        for head in range(mixer.shape.heads):
            keys, q = key[:, head // sharing], query[token, head]
            scores = {c: (q @ keys[c * length : (c + 1) * length].mean(0)).item() for c in range(own)}
            chosen = sorted(scores, key=scores.get, reverse=True)[:best]
            seen = [j for j in range(token + 1) if j // length in (own, *chosen)]
            share = torch.softmax(keys[seen] @ q / math.sqrt(size), 0)
            output[token, head] = share @ value[seen, head // sharing]
    return output.flatten(1) @ weights["output.weight"].T + weights.get("output.bias", 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "rope": True}, {"chunk_length": 1}], ids=str)
def test_the_mixer_computes_its_definition(options, shape):
    mixer = make(SHAPES[shape], **options)
    hidden, positions = hidden_of(SHAPES[shape].hidden_size), rotary(torch.arange(TOKENS)[None])
    with torch.no_grad():
        found, nothing = mixer(hidden, positions)
    assert nothing is None
    for row in range(2):
        assert_close(found[row].double(), plain(mixer, hidden[row], positions))


def test_heads_choose_for_themselves():
    mixer, hidden = make(top_k=2), hidden_of()
    seen = []
    choose = mixer._choose

    def watch(*arguments) -> Tensor:
        seen.append(choose(*arguments))
        return seen[-1]

    mixer._choose = watch
    with torch.no_grad():
        mixer(hidden)
    chosen = torch.cat([torch.nn.functional.pad(x, (0, 9 - x.shape[-1])) for x in seen], 2)
    assert (chosen.sum(-1)[..., 10:] == 1).all(), "one earlier chunk besides the own"
    assert (chosen[:, 0] != chosen[:, 1]).any() and (chosen[:, 0] != chosen[:, 2]).any()


# --- its limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_place_for_every_chunk_it_is_the_teacher(family):
    """Rope on, weights taken over: 40 tokens are 10 chunks of 4."""
    teacher, ids = tiny_teacher(family), random_ids(2, 40)
    documents = packed_ids([[-3, 20, 17], [40]])
    for top_k, equal in ((10, True), (3, False)):
        options = SparseAttentionOptions(chunk_length=4, top_k=top_k, rope=True)
        student, rows = convert(teacher, mixer_checks.config_of("sparse", options))
        assert {row.action.partition(",")[0] for row in rows} == {"kept", "moved"}, "nothing is new or lost"
        student.eval()
        with torch.no_grad():
            for given in (None, documents):
                found, wanted = (hidden_states(model, ids, given) for model in (student, teacher))
                real = slice(None) if given is None else given >= 0
                difference = (found - wanted)[real].abs().max() / wanted.abs().max()
                assert (difference < 1e-5) == equal, difference


def test_one_chunk_is_the_own_chunk():
    """Whatever stands in earlier chunks, a token with top_k=1 does not see it; with 2 it does."""
    hidden = hidden_of()
    other = hidden.clone()
    other[:, :10] += 1.0
    for top_k in (1, 2):
        mixer = make(top_k=top_k)
        with torch.no_grad():
            a, b = mixer(hidden)[0], mixer(other)[0]
        assert torch.equal(a[:, 10:], b[:, 10:]) == (top_k == 1)


def test_a_far_chunk_is_seen_at_once_and_in_calls():
    """What a prefill has read long before still changes the last token when its head asks for it."""
    mixer = make(GROUPED, top_k=2)
    hidden = hidden_of(rows=1)
    with torch.no_grad():
        found = mixer(hidden)[0]
        query = mixer.split(mixer.receptance(hidden[:, -1:]))[0, 0]
        key = mixer.split(mixer.key(hidden))[0, :40].unflatten(0, (8, 5)).mean(1)  # [8,G,N]
        asked = {int((key[:, head // 2] @ query[head]).argmax()) for head in range(4)}
        hidden[0, 5 * min(asked) + 2] += 0.5
        changed = mixer(hidden)[0]
        cache, outputs = DynamicCache(), []
        for call in hidden.split((41, 3, 1), dim=1):
            outputs.append(mixer(call, past_key_values=cache)[0])
    assert min(asked) < 7, "not the neighbouring chunk"
    assert (changed[:, -1] - found[:, -1]).abs().max() > 1e-4
    assert_close(torch.cat(outputs, 1), changed)


def test_gradients_are_those_of_the_softmax_over_what_is_visible():
    """The choice itself has none: it is a plain list of tokens in the definition."""
    mixer, hidden = make(), hidden_of(rows=1)
    positions = rotary(torch.arange(TOKENS)[None])
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    outputs = mixer(hidden, positions)[0][0], plain(mixer, hidden[0], positions)
    found, wanted = (torch.autograd.grad(x.pow(2).sum(), parameters) for x in outputs)
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, name


def test_blocks_change_neither_results_nor_gradients(monkeypatch):
    hidden, results = hidden_of(), []
    for block in (1, 7, 64):
        monkeypatch.setattr(sparse_attention, "QUERY_BLOCK", block)
        mixer = make()
        output = mixer(hidden)[0]
        output.pow(2).sum().backward()
        results.append([output.detach(), *(p.grad for p in mixer.parameters())])
    for other in results[:2]:
        for found, wanted in zip(other, results[2], strict=True):
            assert_close(found, wanted)


def test_memory_grows_with_the_row_and_not_with_its_square(monkeypatch):
    """One block's masks exist at a time, in the backward pass as well."""
    monkeypatch.setattr(sparse_attention, "QUERY_BLOCK", 16)
    mixer, peaks, largest = make(chunk_length=64), [], []
    for tokens in (512, 1024):
        with LiveBytes() as live:
            mixer(hidden_of(rows=1, tokens=tokens))[0].sum().backward()
        peaks.append(live.peak)
        largest.append(live.largest)
    assert peaks[1] < 2.2 * peaks[0] and largest[1] < 2.2 * largest[0], (peaks, largest)


# --- in a model ---------------------------------------------------------------------------------------------

STUDENTS = {
    "three_chunks": ({}, (), "qwen2"),
    "own_chunk_keep_first": ({"top_k": 1}, (0,), "qwen3"),
    "rope_keep_middle": ({"top_k": 2, "rope": True}, (1,), "llama_biased"),
}


@pytest.fixture(params=STUDENTS, scope="module")
def student(request) -> PreTrainedModel:
    options, keep, family = STUDENTS[request.param]
    return student_of("sparse", SparseAttentionOptions(**{"chunk_length": 4, **options}), keep, family)


class TestInAModel(mixer_checks.InAModel):
    """Sparse attention."""


@pytest.mark.parametrize("rope", [False, True])
def test_it_learns(rope):
    mixer_checks.assert_it_learns("sparse", SparseAttentionOptions(chunk_length=4, rope=rope))


def test_it_comes_back_from_disk(tmp_path):
    options = SparseAttentionOptions(chunk_length=4, top_k=2, rope=True)
    mixer_checks.assert_it_comes_back_from_disk("sparse", options, tmp_path / "student")


def test_padding_within_a_document_counts_for_no_chunk():
    mixer, hidden = make(rope=True), hidden_of(rows=1)
    documents = torch.zeros(1, TOKENS, dtype=torch.int32)
    documents[0, [0, 3, 4, 17, 30, 31, 32]] = -1
    real = documents[0] >= 0
    positions = rotary(torch.where(real, real.long().cumsum(0) - 1, 0)[None])
    with torch.no_grad():
        found, _ = mixer(hidden, positions, sequence_context=SequenceContext(document_ids=documents))
    packed = rotary(torch.arange(int(real.sum()))[None])
    assert_close(found[0, real].double(), plain(mixer, hidden[0, real], packed))
    assert found.isfinite().all()


def test_padding_is_inert():
    """Whatever stands in padded places, real tokens do not notice."""
    mixer, hidden = make(), hidden_of()
    documents = packed_ids([[-6, 20, 12, -7], [45]])
    positions = rotary(document_positions(documents))
    with torch.no_grad():
        context = SequenceContext(document_ids=documents)
        clean, _ = mixer(hidden, positions, sequence_context=context)
        dirty, _ = mixer(
            hidden.masked_fill((documents < 0)[..., None], 1e4), positions, sequence_context=context
        )
    assert torch.equal(clean[documents >= 0], dirty[documents >= 0])


# --- the cache ----------------------------------------------------------------------------------------------


def test_the_cache_grows_by_keys_values_and_chunk_numbers():
    model = student_of("sparse", SparseAttentionOptions(chunk_length=4))
    cache = DynamicCache(config=model.config)
    sizes = []
    with torch.no_grad():
        for tokens in (16, 1):
            model(random_ids(2, tokens), past_key_values=cache, use_cache=True)
            sizes.append(cache_bytes_per_row(cache))
    per_token = 2 * HEAD_SIZE * 4 + 8
    assert sizes == [LAYERS * (16 * per_token + 3 * 8), LAYERS * (17 * per_token + 3 * 8)]
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes_per_row(cache) == 0


def filled_layer() -> TokenCacheLayer:
    layer, keys = TokenCacheLayer(), torch.arange(3.0)[:, None, None, None].expand(3, 5, 1, 4)
    layer.advance(keys, -keys, packed_ids([[5], [-1, 2, 2], [-5]]), chunk_length=2)
    return layer


def test_chunks_are_counted_within_documents():
    layer = filled_layer()
    assert layer.chunks.tolist() == [[0, 0, 1, 1, 2], [-1, 0, 0, 1, 1], [-1] * 5]
    assert layer.counts.tolist() == [[5, 3, 0], [2, 2, 1], [0, 0, 0]]
    keys = torch.zeros(3, 3, 1, 4)
    layer.begin(torch.tensor([True, False, True]))
    text = layer.advance(keys, keys, packed_ids([[3], [3], [1, 2]]), chunk_length=2)
    assert text.chunks[:, 5:].tolist() == [[2, 3, 3], [2, 2, 3], [0, 1, 1]]
    assert text.first_chunks.tolist() == [[0, 0, 0], [2, 2, 2], [0, 1, 1]]
    assert layer.counts.tolist() == [[8, 4, 0], [3, 4, 2], [2, 2, 1]]


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_of_a_cache_layer_move_together(change, rows):
    layer, before = filled_layer(), filled_layer()
    change(layer)
    for name in ("keys", "values", "chunks", "counts"):
        assert torch.equal(getattr(layer, name), getattr(before, name)[rows]), name
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(3) == (8, 0)


def test_a_place_in_a_cache_that_another_mixer_has_used_is_refused():
    cache = DynamicCache()
    cache.layers.append(RecurrentCacheLayer())
    assert isinstance(token_layer(cache, 0), TokenCacheLayer)
    cache.layers[0] = layer = RecurrentCacheLayer()
    layer.advance(torch.zeros(1, 1, 4, 4), None, 3)
    with pytest.raises(ValueError, match="cache layer 0 already holds"):
        token_layer(cache, 0)


@pytest.mark.parametrize("options", [{"chunk_length": 0}, {"top_k": 0}], ids=str)
def test_wrong_options_are_refused_with_their_key(options):
    with pytest.raises(ValueError, match=f"student.mixers.sparse.{next(iter(options))}=0 must be at least 1"):
        SparseAttentionOptions(**options)
