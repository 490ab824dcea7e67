"""Sliding-window attention with sinks: its definition, its limits, decoding from a memory of fixed size."""

import attention_checks
import mixer_checks
import pytest
import torch
from attention_checks import GROUPED, SHAPES, TOKENS, assert_equal_with_gradients, hidden_of, rotary
from mixer_checks import assert_close, student_of
from tiny import FAMILIES, HEAD_SIZE, LAYERS, LiveBytes, convert, packed_ids, random_ids, tiny_teacher
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.backbone import SequenceContext, document_positions, hidden_states
from models.mixers import SlidingWindowMixer, SlidingWindowOptions, sliding_window
from models.sequence_state import RecurrentCacheLayer, WindowCacheLayer, read_places, window_layer

FLAVOURS = {
    "sinks": {"window": 5, "sinks": 2},
    "no_sinks": {"window": 4, "sinks": 0, "rope": False, "gate": "low"},
    "many_sinks": {"window": 3, "sinks": 9, "gate": "full"},
    "one_token": {"window": 1, "sinks": 1},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries in every row, longer than a window and no multiple of it."""
    monkeypatch.setattr(sliding_window, "QUERY_BLOCK", 7)


def make(shape=GROUPED, noise=0.1, **options) -> SlidingWindowMixer:
    return attention_checks.make(SlidingWindowMixer, shape, noise, **options)


def visible(mixer: SlidingWindowMixer, length: int) -> Tensor:
    """[T,T] bool by the definition."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    near = (query - key < mixer.options.window) | (key < mixer.options.sinks)
    return near & (key <= query)


def plain(mixer: SlidingWindowMixer, hidden: Tensor) -> Tensor:
    return attention_checks.plain(mixer, hidden, visible(mixer, len(hidden)), lambda position: 1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_mixer_computes_its_definition(flavour, shape):
    mixer, hidden = make(SHAPES[shape], **FLAVOURS[flavour]), hidden_of(SHAPES[shape].hidden_size, rows=1)
    found, nothing = mixer(hidden, rotary(torch.arange(TOKENS)[None]))
    assert nothing is None
    assert_equal_with_gradients(mixer, found[0], plain(mixer, hidden[0]))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_documents_and_padding_anywhere_are_the_same_definition(flavour):
    """Padding within a document counts for nothing, whatever stands there."""
    mixer, hidden = make(**FLAVOURS[flavour]), hidden_of(rows=1)
    ids = packed_ids([[-4, 17, -2, 22]])
    ids[0, [6, 7, 11, 30, 31, 32, 40]] = -1
    positions = torch.zeros_like(ids).long()
    places = [(ids[0] == document).nonzero()[:, 0] for document in (0, 1)]
    for place in places:
        positions[0, place] = torch.arange(len(place))
    hidden[:, ids[0] < 0] = 1e3
    found = mixer(hidden, rotary(positions), sequence_context=SequenceContext(document_ids=ids))[0][0]
    wanted = torch.cat([plain(mixer, hidden[0, place]) for place in places])
    assert_equal_with_gradients(mixer, torch.cat([found[place] for place in places]), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_long_as_the_window_reaches_it_is_the_teacher(family):
    teacher, ids, documents = tiny_teacher(family), random_ids(2, 40), packed_ids([[-3, 20, 17], [40]])
    for window, sinks, equal in ((40, 0, True), (38, 2, True), (10, 2, False)):
        options = SlidingWindowOptions(window=window, sinks=sinks)
        student, rows = convert(teacher, mixer_checks.config_of("sliding_window", options))
        assert {row.action.partition(",")[0] for row in rows} == {"kept", "moved"}, "nothing is new or lost"
        with torch.no_grad():
            for given in (None, documents):
                found, wanted = (hidden_states(model.eval(), ids, given) for model in (student, teacher))
                real = slice(None) if given is None else given >= 0
                difference = (found - wanted)[real].abs().max() / wanted.abs().max()
                assert (difference < 1e-5) == equal, difference


def test_what_has_left_the_window_is_not_seen():
    mixer, hidden = make(window=6, sinks=2), hidden_of(rows=1)
    changed = {token: hidden.clone() for token in (1, 2, 20)}
    with torch.no_grad():
        before = mixer(hidden)[0][0]
        for token, other in changed.items():
            other[0, token] += 1.0
            differs = (mixer(other)[0][0] != before).any(-1)
            seen_by = [t for t in range(TOKENS) if visible(mixer, TOKENS)[t, token]]
            assert differs.nonzero()[:, 0].tolist() == seen_by, "sinks by all, others within the window"


def test_blocks_change_neither_results_nor_gradients(monkeypatch):
    hidden, results = hidden_of(), []
    context = SequenceContext(document_ids=packed_ids([[-4, 30, 11], [2, 43]]))
    for block in (1, 7, 64):
        monkeypatch.setattr(sliding_window, "QUERY_BLOCK", block)
        mixer = make(window=6, sinks=3, gate="low")
        output = mixer(hidden, sequence_context=context)[0][context.document_ids >= 0]
        output.pow(2).sum().backward()
        results.append([output.detach(), *(p.grad for p in mixer.parameters())])
    for other in results[:2]:
        for found, wanted in zip(other, results[2], strict=True):
            assert_close(found, wanted)


def test_time_and_memory_grow_with_the_row_and_not_with_its_square(monkeypatch):
    """A block of queries never meets more keys than the window, itself and the sinks."""
    monkeypatch.setattr(sliding_window, "QUERY_BLOCK", 64)
    mixer, peaks, largest = make(window=32, sinks=4), [], []
    for tokens in (512, 1024):
        with LiveBytes() as live:
            mixer(hidden_of(rows=1, tokens=tokens))[0].sum().backward()
        peaks.append(live.peak)
        largest.append(live.largest)
    assert peaks[1] < 2.2 * peaks[0] and largest[1] <= 2 * largest[0], (peaks, largest)


# --- in a model ---------------------------------------------------------------------------------------------

STUDENTS = {"sinks": ((), "qwen2"), "no_sinks": ((0,), "qwen3"), "many_sinks": ((1,), "llama_biased")}


@pytest.fixture(params=STUDENTS, scope="module")
def student(request) -> PreTrainedModel:
    keep, family = STUDENTS[request.param]
    return student_of("sliding_window", SlidingWindowOptions(**FLAVOURS[request.param]), keep, family)


class TestInAModel(mixer_checks.InAModel):
    """Sliding windows."""


def test_it_learns():
    mixer_checks.assert_it_learns("sliding_window", SlidingWindowOptions(**FLAVOURS["many_sinks"]))


def test_it_comes_back_from_disk(tmp_path):
    options = SlidingWindowOptions(**FLAVOURS["many_sinks"])
    mixer_checks.assert_it_comes_back_from_disk("sliding_window", options, tmp_path / "student")


def test_gradients_through_a_cache_are_those_of_the_whole_row():
    """Where gradients are wanted nothing is changed in place, one token at a time or several."""
    student = student_of("sliding_window", SlidingWindowOptions(window=5, sinks=2))
    ids, weight = random_ids(2, 24), student.model.layers[1].self_attn.key.weight
    wanted = torch.autograd.grad(hidden_states(student, ids).pow(2).sum(), weight)[0]
    found = mixer_checks.in_calls(student, ids, [9, 1, 1, 8, 1, 4], None)
    assert_close(torch.autograd.grad(found.pow(2).sum(), weight)[0], wanted)


# --- the memory ---------------------------------------------------------------------------------------------


def test_the_memory_is_made_once_and_does_not_grow():
    model = student_of("sliding_window", SlidingWindowOptions(window=6, sinks=2))
    cache, places, sizes = DynamicCache(config=model.config), set(), set()
    with torch.no_grad():
        for tokens in (1, 1, 20, 1, 1, 1):
            model(random_ids(2, tokens), past_key_values=cache, use_cache=True)
            sizes.add(sum(layer.bytes_per_row() for layer in cache.layers))
            if tokens == 1:
                places.add(cache.layers[0].keys.data_ptr())
    assert sizes == {LAYERS * (8 * (2 * HEAD_SIZE * 4 + 8) + 8)}
    assert len(places) == 2, "one token is written in place; a call of many replaces the tensor"
    assert cache.get_seq_length() == 25 and cache.get_mask_sizes(3, 0) == (28, 0)


def test_inference_mode_may_come_and_go():
    """What was made in inference mode is not changed in place outside of it."""
    model, ids = student_of("sliding_window", SlidingWindowOptions(window=5, sinks=1)), random_ids(2, 14)
    cache, outputs = DynamicCache(config=model.config), []
    for start, mode in ((0, torch.inference_mode), (6, torch.no_grad), (7, torch.inference_mode)):
        with mode():
            for token in ids[:, start : {0: 6, 6: 7, 7: 14}[start]].split(1, dim=1):
                outputs.append(model(token, past_key_values=cache, use_cache=True).logits.clone())
    with torch.no_grad():
        assert_close(torch.cat(outputs, 1), model(ids).logits)


def filled_layer(split: list[int]) -> WindowCacheLayer:
    """Three rows of 12 tokens, in calls, by tokens' places alone or in place."""
    layer, ids = WindowCacheLayer(), packed_ids([[12], [-2, 3, 7], [4, 8]])
    keys = torch.arange(1.0, 13).repeat(3, 1)[..., None, None].expand(3, 12, 1, 2)
    ids[1, 8] = -1
    start = 0
    for size in split:
        stop = start + size
        fresh, now = keys[:, start:stop], ids[:, start:stop]
        layer.make(fresh, fresh, 6)
        layer.begin(None if start == 0 else (ids[:, :start].amax(1) == now.amax(1)) | (now < 0).all(1))
        places = read_places(layer.count, now, size)
        if size == 1:
            layer.put(fresh, -fresh, places, 2)
        else:
            order = (places.documents < 0).int().argsort(dim=1, stable=True)
            places = type(places)(*(x.gather(1, order) for x in places[:2]), places.seen)
            fresh = fresh.gather(1, order[..., None, None].expand_as(fresh))
            layer.advance(fresh, -fresh, places, 2)
        start = stop
    return layer


@pytest.mark.parametrize("split", [[12], [1] * 12, [5, 7], [1, 1, 4, 6], [3, 1, 1, 1, 6]], ids=str)
def test_every_token_has_its_place(split):
    """The first two of a document, and the last four of its others, each in the place of its position."""
    layer = filled_layer(split)
    assert layer.positions.tolist() == [[0, 1, 10, 11, 8, 9], [0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 4, 5]]
    assert layer.count.tolist() == [12, 6, 8] and layer.get_seq_length() == 12
    assert layer.keys[..., 0, 0].tolist() == [
        [1, 2, 11, 12, 9, 10],
        [6, 7, 8, 10, 11, 12],
        [5, 6, 11, 12, 9, 10],
    ]
    assert torch.equal(layer.values, -layer.keys)


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
    layer, before = filled_layer([12]), filled_layer([12])
    change(layer)
    for name in ("keys", "values", "positions", "count"):
        assert torch.equal(getattr(layer, name), getattr(before, name)[rows]), name
    assert layer.get_seq_length() == 12
    layer.reset()
    assert layer.keys is None and layer.get_seq_length() == 0 and layer.bytes_per_row() == 0


def test_a_place_in_a_cache_that_another_mixer_has_used_is_refused():
    cache = DynamicCache()
    cache.layers.append(layer := RecurrentCacheLayer())
    layer.advance(torch.zeros(1, 1, 4, 4), None, 3)
    with pytest.raises(ValueError, match="cache layer 0 already holds"):
        window_layer(cache, 0)


def test_positions_count_real_tokens():
    ids = packed_ids([[-2, 3, 4], [9], [-9]])
    places = read_places(torch.tensor([5, 0, 7]), ids, 9)
    assert places.documents.tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1, 1], [0] * 9, [-1] * 9]
    assert places.positions.tolist() == [[0, 0, 5, 6, 7, 0, 1, 2, 3], list(range(9)), [0] * 9]
    assert places.seen.tolist() == [4, 9, 7]
    fresh = read_places(torch.zeros(3, dtype=torch.int64), ids, 9)
    assert torch.equal(fresh.positions[ids >= 0], document_positions(ids)[ids >= 0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, "student.mixers.sliding_window.window=0 must be at least 1"),
        ({"sinks": -1}, "student.mixers.sliding_window.sinks=-1 must be at least 0"),
        ({"gate": "wide"}, "student.mixers.sliding_window.gate='wide' is unknown"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_their_key(options, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowOptions(**options)
