"""Sparse attention against a plain choice of blocks, token by token; its limits; decoding."""

import copy
import math

import attention_checks
import mixer_checks
import pytest
import torch
from attention_checks import GROUPED, SHAPES, TOKENS, hidden_of, plain_heads, rotary
from mixer_checks import assert_close, student_of
from tiny import FAMILIES, LiveBytes, convert, packed_ids, random_ids, tiny_teacher
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models.backbone import SequenceContext, document_positions, hidden_states
from models.block_pool import BlockPool
from models.mixers import AttentionShape, SparseAttentionMixer, SparseAttentionOptions, block_choice
from models.mixers.heads import rotate
from models.sequence_state import cache_bytes_per_row

PUBLISHED = {"selector": "published", "sinks": 0, "window": 1}


@pytest.fixture(autouse=True)
def few_products(monkeypatch):
    """Several pieces of scores in every row."""
    monkeypatch.setattr(block_choice, "PRODUCTS", 700)


def make(shape: AttentionShape = GROUPED, noise: float = 0.1, **options) -> SparseAttentionMixer:
    chosen = {"block_length": 5, "top_k": 2, "window": 7, "pool_blocks": 30, "index_width": 32, **options}
    return attention_checks.make(SparseAttentionMixer, shape, noise, **chosen)


def plain_scores(mixer: SparseAttentionMixer, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """[T,H,M] of one document [T,D]: what the selector thinks of each block, were it complete."""
    options, heads = mixer.options, mixer.shape.heads
    blocks = -(-len(hidden) // options.block_length)
    if mixer.index is None:
        query, key, _ = plain_heads(mixer, hidden, positions)
        keys = key.repeat_interleave(heads // key.shape[1], 1)
        means = torch.stack([part.mean(0) for part in keys.split(options.block_length)])
        return torch.einsum("qhn,mhn->qhm", query, means)
    asks, keys = copy.deepcopy(mixer.index).double()(hidden.double()[None], hidden.double()[None])
    if options.rope:
        asks, keys = (rotate(x, [table.double() for table in positions]) for x in (asks, keys))
    if options.index_part == 1:
        keys = keys.bfloat16().double()
    scores = torch.full((len(hidden), asks.shape[2], blocks), -math.inf, dtype=torch.float64)
    for block, own in enumerate(keys[0, :, 0].split(options.block_length)):
        parts = torch.stack([part.sum(0) / options.index_part for part in own.split(options.index_part)])
        scores[..., block] = (asks[0] @ parts.T).logsumexp(-1)
    return scores.repeat_interleave(heads // asks.shape[2], 1)


def plain(mixer: SparseAttentionMixer, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """One document [T,D] through the mixer's definition in float64: each token and head ranks the complete
    blocks before its own that it does not see anyway, and one softmax runs over all tokens that it sees."""
    size, sharing, options = mixer.shape.head_size, mixer.shape.heads // mixer.shape.kv_heads, mixer.options
    length = options.block_length
    with torch.no_grad():
        scores = plain_scores(mixer, hidden, positions)
    weights = {name: parameter.double() for name, parameter in mixer.named_parameters()}
    query, key, value = plain_heads(mixer, hidden, positions)
    output = torch.zeros(len(hidden), mixer.shape.heads, size, dtype=torch.float64)
    for token in range(len(hidden)):
        own = token // length
        reach = max(token - options.window + 1, 0) // length  # the block in which the window begins
        # Whole blocks, as many for each token of a block as its first token needs.
        reach = min(reach, max(own - options.near, 0))
        always = {own, *range(reach, own), *range(min(options.sinks, own))}
        for head in range(mixer.shape.heads):
            rest = [block for block in range(own) if block not in always]
            best = sorted(rest, key=lambda block: scores[token, head, block].item(), reverse=True)
            chosen = {*always, *best[: options.top_k]}
            seen = [j for j in range(token + 1) if j // length in chosen]
            scale = math.log(token + 1) / math.log(options.training_length)
            scale = max(1.0, scale) if options.log_position_scale else 1.0
            products = key[seen, head // sharing] @ query[token, head]
            share = torch.softmax(products * scale / math.sqrt(size), 0)
            output[token, head] = share @ value[seen, head // sharing]
    return output.flatten(1) @ weights["output.weight"].T + weights.get("output.bias", 0.0)


OPTIONS = {
    "gated": {},
    "gated_parts_rope": {"block_length": 6, "index_part": 3, "top_k": 1, "rope": True},
    "gated_only_near": {"top_k": 0, "sinks": 2, "window": 12},
    "gated_scaled": {"log_position_scale": True, "training_length": 9},
    "published": PUBLISHED,
    "published_rope": PUBLISHED | {"top_k": 1, "rope": True},
    "published_single_tokens": PUBLISHED | {"block_length": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_mixer_computes_its_definition(options, shape):
    mixer = make(SHAPES[shape], **OPTIONS[options])
    hidden, positions = hidden_of(SHAPES[shape].hidden_size), rotary(torch.arange(TOKENS)[None])
    with torch.no_grad():
        found, nothing = mixer(hidden, positions)
        assert nothing is None
        for row in range(2):
            assert_close(found[row].double(), plain(mixer, hidden[row], positions))


@pytest.mark.parametrize("selector, lists", [("published", 4), ("gated", 2)])
def test_who_chooses(selector, lists):
    """Each head for itself as published; the heads of a key/value head together where the choice learns."""
    mixer = make(selector=selector, sinks=0, window=1, top_k=1)
    with torch.no_grad():
        pool, context = BlockPool(), SequenceContext()
        tokens = mixer.read(hidden_of(), None, pool, context)
        places = mixer.places(pool, tokens, context, whole=True)
        blocks = pool.advance(tokens.k, tokens.v, tokens.index_keys, places)
        listed = mixer.choice(tokens.asks, blocks, places, scored=False).listed
    assert listed.shape == (2, TOKENS, lists, 2)
    late = listed[:, 10:].sort(-1).values
    assert (late >= 0).all() and (late.diff(dim=-1) > 0).all(), "one other block besides the own"
    assert (late[:, :, 0] != late[:, :, 1]).any()


# --- its limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_place_for_every_block_it_is_the_teacher(family):
    """Rope on, weights taken over: 40 tokens are 10 blocks of 4, the own one and 9 others."""
    teacher, ids = tiny_teacher(family), random_ids(2, 40)
    documents = packed_ids([[-3, 20, 17], [40]])
    for selector, top_k, equal in (("published", 9, True), ("gated", 9, True), ("published", 2, False)):
        options = SparseAttentionOptions(
            selector=selector, block_length=4, top_k=top_k, sinks=0, window=1, rope=True
        )
        student, rows = convert(teacher, mixer_checks.config_of("sparse", options))
        new = {row.target for row in rows if row.action.partition(",")[0] not in ("kept", "moved")}
        assert all(".index." in name for name in new), "nothing else is new or lost"
        assert bool(new) == (selector == "gated")
        student.eval()
        with torch.no_grad():
            for given in (None, documents):
                found, wanted = (hidden_states(model, ids, given) for model in (student, teacher))
                real = slice(None) if given is None else given >= 0
                difference = (found - wanted)[real].abs().max() / wanted.abs().max()
                assert (difference < 1e-5) == equal, difference


def test_dense_is_causal_attention_whatever_is_listed():
    """As while the index is preheated."""
    found, wanted = make(top_k=0, window=1), make(top_k=9)
    wanted.load_state_dict(found.state_dict())
    hidden = hidden_of()
    with torch.no_grad():
        sparse = found(hidden)[0]
        found.dense = True
        assert_close(found(hidden)[0], wanted(hidden)[0])
    assert (sparse - wanted(hidden)[0]).abs().max() > 1e-3


def test_own_block_alone():
    """Whatever stands in earlier blocks, a token with top_k=0 does not see it; with 1 it does."""
    hidden = hidden_of()
    other = hidden.clone()
    other[:, :10] += 1.0
    for top_k in (0, 1):
        mixer = make(**PUBLISHED | {"top_k": top_k})
        with torch.no_grad():
            a, b = mixer(hidden)[0], mixer(other)[0]
        assert torch.equal(a[:, 10:], b[:, 10:]) == (top_k == 0)


@pytest.mark.parametrize("selector", ["published", "gated"])
def test_a_far_block_is_seen_at_once_and_in_calls(selector):
    """What a prefill has read long before still changes the last token when its head asks for it."""
    mixer = make(selector=selector, sinks=0, window=1, top_k=1)
    hidden = hidden_of(rows=1)
    with torch.no_grad():
        found = mixer(hidden)[0]
        scores = plain_scores(mixer, hidden[0], rotary(torch.arange(TOKENS)[None]))[-1, :, :8]
        asked = {int(block) for block in scores.argmax(-1)}
        changed = hidden.clone()
        changed[0, 5 * min(asked) + 2] += 0.5
        after = mixer(changed)[0]
        cache, outputs = DynamicCache(), []
        for call in changed.split((41, 3, 1), dim=1):
            outputs.append(mixer(call, past_key_values=cache)[0])
    assert min(asked) < 7, "not the neighbouring block"
    assert (after[:, -1] - found[:, -1]).abs().max() > 1e-4
    assert_close(torch.cat(outputs, 1), after)


@pytest.mark.parametrize("options", ["gated", "published"])
def test_gradients_are_those_of_the_softmax_over_what_is_visible(options):
    """The choice itself has none: it is a plain list of tokens in the definition."""
    mixer, hidden = make(**OPTIONS[options]), hidden_of(rows=1)
    positions = rotary(torch.arange(TOKENS)[None])
    named = {n: p for n, p in mixer.named_parameters() if not n.startswith("index.")}
    outputs = mixer(hidden, positions)[0][0], plain(mixer, hidden[0], positions)
    found, wanted = (torch.autograd.grad(x.pow(2).sum(), list(named.values())) for x in outputs)
    for name, ours, theirs in zip(named, found, wanted, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, name


def test_memory_grows_with_the_row_and_not_with_its_square(monkeypatch):
    """Scores exist for some tokens at a time."""
    monkeypatch.setattr(block_choice, "PRODUCTS", 1 << 14)
    mixer, peaks, largest = make(block_length=64), [], []
    for tokens in (512, 1024):
        context = SequenceContext(index_losses=[])
        with LiveBytes() as live:
            output = mixer(hidden_of(rows=1, tokens=tokens), sequence_context=context)[0]
            (output.sum() + context.index_losses[0]).backward()
        peaks.append(live.peak)
        largest.append(live.largest)
    assert peaks[1] < 2.2 * peaks[0] and largest[1] < 2.2 * largest[0], (peaks, largest)


# --- in a model ---------------------------------------------------------------------------------------------

STUDENTS = {
    "gated": ({"window": 5, "top_k": 2}, (), "qwen2"),
    "gated_parts_keep_first": ({"window": 5, "top_k": 1, "index_part": 2}, (0,), "qwen3"),
    "gated_shift": ({"window": 5, "top_k": 1, "key_shift": 0.5, "qk_norm": True}, (), "qwen2"),
    "gated_scaled": (
        {"window": 5, "top_k": 1, "log_position_scale": True, "training_length": 4},
        (),
        "qwen2",
    ),
    "published_rope_keep_middle": (PUBLISHED | {"top_k": 1, "rope": True}, (1,), "llama_biased"),
}


@pytest.fixture(params=STUDENTS, scope="module")
def student(request) -> PreTrainedModel:
    options, keep, family = STUDENTS[request.param]
    return student_of(
        "sparse", SparseAttentionOptions(**{"block_length": 4, "pool_blocks": 40, **options}), keep, family
    )


class TestInAModel(mixer_checks.InAModel):
    """Sparse attention."""


@pytest.mark.parametrize("rope", [False, True])
def test_it_learns(rope):
    mixer_checks.assert_it_learns(
        "sparse", SparseAttentionOptions(block_length=4, window=5, top_k=1, rope=rope)
    )


def test_it_comes_back_from_disk(tmp_path):
    options = SparseAttentionOptions(block_length=4, top_k=2, rope=True)
    mixer_checks.assert_it_comes_back_from_disk("sparse", options, tmp_path / "student")


def test_padding_within_a_document_counts_for_no_block():
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


def test_the_cache_is_made_once():
    """Its bytes are those of the first token after fifty times its capacity, at once and token by token."""
    options = SparseAttentionOptions(block_length=2, window=3, top_k=2, pool_blocks=12)
    model = student_of("sparse", options)
    cache, sizes = DynamicCache(config=model.config), []
    with torch.no_grad():
        for tokens in (1, 23, 24, 1, 50 * 24, 1, 1):
            model(random_ids(2, tokens), past_key_values=cache, use_cache=True)
            sizes.append(cache_bytes_per_row(cache))
    assert len(set(sizes)) == 1, sizes
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes_per_row(cache) == 0


@pytest.mark.parametrize(
    "options, key",
    [
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"pool_blocks": 9}, "pool_blocks=9 must be at least 10"),
        ({"index_part": 3}, "index_part=3 must divide student.mixers.sparse.block_length=64"),
        ({"selector": "best"}, "selector='best' is unknown"),
    ],
    ids=lambda given: str(given)[:20],
)
def test_wrong_options_are_refused_with_their_key(options, key):
    with pytest.raises(ValueError, match=f"student.mixers.sparse.{key}"):
        SparseAttentionOptions(**{"window": 64, **options})
