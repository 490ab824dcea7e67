"""Kept attention with options: its definition, its start, decoding, and the teacher's own module where there
are none."""

import math

import attention_checks
import mixer_checks
import pytest
import torch
from attention_checks import GROUPED, SHAPES, TOKENS, WIDTH, assert_equal_with_gradients, hidden_of, rotary
from mixer_checks import assert_close, student_of
from tiny import (
    HEAD_SIZE,
    LAYERS,
    PARENTS,
    LiveBytes,
    convert,
    disturb,
    packed_batch,
    packed_ids,
    random_ids,
    tiny_teacher,
)
from transformers import DynamicCache, PreTrainedModel

from models.architectures import attention_modules
from models.backbone import SequenceContext, hidden_states
from models.config import StudentConfig
from models.conversion import restore_attention
from models.layer_plan import LayerPlan
from models.mixers import KeptAttentionMixer, KeptAttentionOptions, RWKV7Options, kept_attention
from models.mixers.heads import GATES, position_scale
from models.objectives import Align
from models.sequence_state import cache_bytes_per_row
from models.student_folder import Student, load_student, save_student

HALO = {"rope": False, "gate": "full", "log_position_scale": True, "training_length": 8}
FLAVOURS = {
    "halo": HALO,
    "low_gate": {"gate": "low"},
    "scaled_rope": {"log_position_scale": True, "training_length": 5},
    "no_positions": {"rope": False},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries in every row."""
    monkeypatch.setattr(kept_attention, "QUERY_BLOCK", 7)


def make(shape=GROUPED, noise=0.1, **options) -> KeptAttentionMixer:
    return attention_checks.make(KeptAttentionMixer, shape, noise, **options)


def plain(mixer: KeptAttentionMixer, hidden: torch.Tensor) -> torch.Tensor:
    def factor(position: int) -> float:
        scale = math.log(position + 1) / math.log(mixer.options.training_length)
        return max(1.0, scale) if mixer.options.log_position_scale else 1.0

    causal = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
    return attention_checks.plain(mixer, hidden, causal, factor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_mixer_computes_its_definition(flavour, shape):
    mixer, hidden = make(SHAPES[shape], **FLAVOURS[flavour]), hidden_of(SHAPES[shape].hidden_size, rows=1)
    found, nothing = mixer(hidden, rotary(torch.arange(TOKENS)[None]))
    assert nothing is None
    assert_equal_with_gradients(mixer, found[0], plain(mixer, hidden[0]))


def test_documents_in_blocks_are_the_same_definition():
    """Masked blocks, forward and backward, with padding between two documents."""
    mixer, hidden = make(**HALO), hidden_of(rows=1)
    ids = packed_ids([[-4, 17, -2, 22]])
    places = [slice(4, 21), slice(23, 45)]
    positions = torch.cat([torch.arange(n) for n in (4, 17, 2, 22)])[None]
    found = mixer(hidden, rotary(positions), sequence_context=SequenceContext(document_ids=ids))[0][0]
    wanted = torch.cat([plain(mixer, hidden[0, place]) for place in places])
    assert_equal_with_gradients(mixer, torch.cat([found[place] for place in places]), wanted)


def test_queries_grow_beyond_the_trained_length_only():
    factors = position_scale(torch.arange(64)[None], 8).flatten()
    assert (factors[:8] == 1).all(), "exactly"
    torch.testing.assert_close(factors[[8, 63]], torch.tensor([9.0, 64.0]).log() / math.log(8))


# --- in a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PARENTS)
def test_with_a_new_gate_it_is_the_teacher(family):
    """The gate starts at exactly 1, so the student still is its teacher, windows and score caps too."""
    teacher, documents, ids = tiny_teacher(family), packed_ids([[-3, 20, 17], [40]]), random_ids(2, 40)
    for gate in set(GATES) - {"none"}:
        student, rows = convert(teacher, mixer_checks.config_of("attention", KeptAttentionOptions(gate=gate)))
        assert {row.source for row in rows if "moved" in row.action}
        with torch.no_grad():
            found, wanted = (hidden_states(model.eval(), ids, documents) for model in (student, teacher))
            assert_close(found[documents >= 0], wanted[documents >= 0])
            found, wanted = (hidden_states(model, ids[:, :16]) for model in (student, teacher))
            assert_close(mixer_checks.in_calls(student, ids[:, :16], [5, 1, 8, 1, 1], None), wanted)
        assert_close(found, wanted)


@pytest.mark.parametrize(
    "options", [None, {}, {"training_length": 7}, {"gate": "none", "rope": True}], ids=str
)
def test_without_options_the_teachers_module_stays(options):
    teacher, ids = tiny_teacher("qwen3"), random_ids(2, 30)
    mixers = {} if options is None else {"attention": KeptAttentionOptions(**options)}
    config = StudentConfig(layer_plan=LayerPlan(mixer="attention"), mixers=mixers)
    student, rows = convert(teacher, config)
    assert [type(m) for m in attention_modules(student).values()] == [
        type(m) for m in attention_modules(teacher).values()
    ]
    assert {row.action for row in rows} == {"kept"} and config.replaced(["attention", "rwkv7"]) == [1]
    with torch.no_grad():
        assert torch.equal(student.eval()(ids).logits, teacher(ids).logits)


@pytest.fixture(params=FLAVOURS, scope="module")
def student(request) -> PreTrainedModel:
    family = {"halo": "qwen3", "scaled_rope": "llama_biased"}.get(request.param, "qwen2")
    return student_of("attention", KeptAttentionOptions(**FLAVOURS[request.param]), family=family)


class TestInAModel(mixer_checks.InAModel):
    """Kept attention, changed."""


def test_it_learns():
    mixer_checks.assert_it_learns("attention", KeptAttentionOptions(**HALO))


@pytest.mark.parametrize("gate", ["low", "full"])
def test_aligning_what_is_already_aligned_changes_nothing(gate):
    """A loss of zero has gradients, and they are finite."""
    teacher, batch = tiny_teacher(), packed_batch([[-3, 21, 14], [38]])
    student, _ = convert(teacher, mixer_checks.config_of("attention", KeptAttentionOptions(gate=gate)))
    loss = Align()(student, teacher, batch).total
    loss.backward()
    assert loss < 1e-5
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_memory_grows_with_the_row_and_not_with_its_square(monkeypatch):
    """Where documents need a mask, one block's exists at a time."""
    monkeypatch.setattr(kept_attention, "QUERY_BLOCK", 16)
    mixer, largest = make(), []
    for tokens in (256, 512):
        ids = packed_ids([[tokens - 20, 20]])
        with LiveBytes() as live:
            context = SequenceContext(document_ids=ids)
            mixer(hidden_of(rows=1, tokens=tokens), sequence_context=context)[0].sum().backward()
        largest.append(live.largest)
    assert largest[1] < 2.2 * largest[0], largest


def test_the_cache_grows_by_keys_and_values():
    model = student_of("attention", KeptAttentionOptions(**HALO))
    cache, sizes = DynamicCache(config=model.config), []
    with torch.no_grad():
        for tokens in (16, 1):
            model(random_ids(2, tokens), past_key_values=cache, use_cache=True)
            sizes.append(cache_bytes_per_row(cache))
    per_token = 2 * HEAD_SIZE * 4 + 8
    assert sizes == [LAYERS * (16 * per_token + 3 * 8), LAYERS * (17 * per_token + 3 * 8)]


# --- given back by a selection ------------------------------------------------------------------------------


def selected_config(kept: str = "attention") -> StudentConfig:
    mixers = {"attention": KeptAttentionOptions(**HALO), "rwkv7": RWKV7Options(value_residual=True)}
    return StudentConfig(layer_plan=LayerPlan(kept=kept), mixers=mixers)


@pytest.mark.parametrize("kept", ["attention", "sliding_window", "sparse"])
def test_kept_layers_get_what_the_config_has_for_them(kept, tmp_path):
    teacher, config, ids = tiny_teacher("qwen3"), selected_config(kept), random_ids(2, 24)
    student, _ = convert(teacher, config)
    disturb(student, 0.05)
    restore_attention(student, teacher, [0, 2], trainable=True, config=config)
    for index in (0, 2):
        mixer, theirs = attention_modules(student)[index], attention_modules(teacher)[index]
        assert mixer.name == kept and all(p.requires_grad for p in mixer.parameters())
        assert torch.equal(mixer.key.weight, theirs.k_proj.weight)
        assert torch.equal(mixer.receptance_norm.weight, theirs.q_norm.weight)
    assert attention_modules(student)[1].residual is None, "it is the first RWKV-7 layer now"
    plan = [kept, "rwkv7", kept]
    save_student(tmp_path / "student", Student(student, plan, config), mixer_checks.NoTokenizer())
    loaded = load_student(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(ids).logits, student.eval()(ids).logits)


def test_a_student_remembers_what_a_later_selection_gives_back(tmp_path):
    """A run that is resumed before its selection, or one that goes on with its student."""
    config = selected_config()
    student, _ = convert(tiny_teacher(), config)
    save_student(tmp_path / "student", Student(student, ["rwkv7"] * 3, config), mixer_checks.NoTokenizer())
    loaded = load_student(tmp_path / "student").config
    assert loaded.layer_plan.kept == "attention"
    assert loaded.options("attention") == config.options("attention")


@pytest.mark.parametrize(
    "options, key",
    [
        ({"gate": "high"}, "student.mixers.attention.gate"),
        ({"training_length": 1}, "training_length=1 must be"),
    ],
)
def test_wrong_options_are_refused_with_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        KeptAttentionOptions(**options)


def test_widths_are_the_shapes():
    assert make().receptance.weight.shape == (4 * HEAD_SIZE, WIDTH)
