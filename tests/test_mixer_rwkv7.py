"""The RWKV-7 mixer against its published formulas, token by token in float64; its start."""

import itertools

import pytest
import torch
from plain_rwkv7 import PlainRWKV7
from tiny import (
    ARWKV,
    FAMILIES,
    HEAD_SIZE,
    convert,
    disturb,
    packed_ids,
    student_config,
    tiny_student,
    tiny_teacher,
)
from torch import Tensor, nn

from models.architectures import attention_modules
from models.backbone import SequenceContext, document_positions
from models.mixers import AttentionShape, RWKV7Mixer, RWKV7Options
from models.mixers.low_rank import LowRank, rounded_rank
from models.mixers.rwkv7 import GATES
from models.mixers.token_shift import last_token, previous_token

WIDTH, TOKENS = 2 * HEAD_SIZE, 21
GROUPED = AttentionShape(WIDTH, 2, 1, HEAD_SIZE)
SHAPES = {
    "plain": AttentionShape(WIDTH, 2, 2, HEAD_SIZE),
    "grouped": AttentionShape(WIDTH, 4, 2, HEAD_SIZE),
    "biases": AttentionShape(
        WIDTH, 2, 1, HEAD_SIZE, query_bias=True, key_bias=True, value_bias=True, output_bias=True
    ),
    "norms": AttentionShape(48, 2, 1, HEAD_SIZE, query_norm=True, key_norm=True, norm_eps=1e-3),
    "filled_up": AttentionShape(WIDTH, 4, 2, 24),
    "divided": AttentionShape(WIDTH, 4, 2, 256, query_norm=True, key_norm=True),
}


def make(
    shape: AttentionShape = GROUPED, noise: float = 0.0, index: int = 1, first: bool = True, **options
) -> RWKV7Mixer:
    torch.manual_seed(0)
    mixer = RWKV7Mixer(shape, RWKV7Options(**options), layer_index=index, layer_count=3, first=first)
    disturb(mixer, noise)
    return mixer


def hidden_of(width: int, rows: int = 2, tokens: int = TOKENS, seed: int = 5) -> Tensor:
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))


def rotary(positions: Tensor, size: int = HEAD_SIZE) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B,T,N] as a Hugging Face decoder hands them to attention."""
    frequency = 1e4 ** (-torch.arange(0, size, 2) / size)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


FLAVOURS = {
    "radlads": {},
    "arwkv": ARWKV,
    "no_gate_no_rope": {"gate": "none", "rope": False},
    "full_gate_residual": {"gate": "full", "value_residual": True},
    "shift_only": {"token_shift": True, "gate": "full"},
    "bonus_raw": {"bonus": True, "written_key": "raw", "rate_range": 2.0},
    "norm_only": {"group_norm": True, "gate": "none"},
    "own_keys": {"grouped_kv": False},
    "induction": {"induction_layers": [1], "induction_heads": 2, "induction_features": "linear"},
    "induction_everything": {"induction_layers": [0, 1], "induction_heads": 1, **ARWKV},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_mixer_computes_the_published_formulas(flavour, shape):
    mixer = make(SHAPES[shape], noise=0.15, first=False, **FLAVOURS[flavour])
    hidden = hidden_of(SHAPES[shape].hidden_size)
    positions = rotary(torch.arange(TOKENS).expand(2, -1), SHAPES[shape].head_size)
    kv_states = mixer.kv_heads * mixer.state_count // mixer.shape.heads
    first_value = torch.randn(2, TOKENS, kv_states, mixer.state_size)
    residual = FLAVOURS[flavour].get("value_residual", False)
    with torch.no_grad():
        found, nothing = mixer(hidden, positions, sequence_context=SequenceContext(first_value=first_value))
    assert nothing is None and found.dtype == torch.float32
    for row in range(2):
        plain_first = first_value[row].flatten(1) if residual else None
        wanted = PlainRWKV7(mixer, tuple(table[row] for table in positions))(hidden[row], plain_first)
        assert (found[row].double() - wanted).norm() / wanted.norm() < 2e-5


@pytest.mark.parametrize(
    "option, other", [("rope", False), ("gate", "none"), ("rate_range", 2.0), ("backend", "chunked")]
)
def test_every_option_but_the_backend_changes_the_result(option, other):
    hidden, positions = hidden_of(WIDTH), rotary(torch.arange(TOKENS).expand(2, -1))
    with torch.no_grad():
        plain, changed = (
            make(noise=0.15, **options)(hidden, positions)[0] for options in ({}, {option: other})
        )
    if option == "backend":
        torch.testing.assert_close(plain, changed, atol=1e-4, rtol=1e-4)
    elif (
        option != "gate"
    ):  # without the gate's own parameters the noise falls elsewhere: shown by the formulas
        assert (plain - changed).abs().max() > 1e-2


# --- the start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_at_the_start_the_gate_is_exactly_one(gate):
    mixer, hidden = make(gate=gate), hidden_of(WIDTH)
    if gate == "none":
        assert mixer.gate is None
        return
    with torch.no_grad():
        assert (mixer.gate(10 * hidden) == 1).all()
        open_gate = mixer(hidden)[0]
        mixer.gate = None
        assert torch.equal(mixer(hidden)[0], open_gate), "the transferred output path is not intact"


@pytest.mark.parametrize("gate", ["low", "full"])
def test_the_gate_learns_from_its_start(gate):
    mixer = make(gate=gate)
    mixer(hidden_of(WIDTH))[0].pow(2).sum().backward()
    last = mixer.gate.up.weight if gate == "low" else mixer.gate.weight
    assert last.grad.abs().max() > 0


def captured_operator_inputs(mixer: RWKV7Mixer, hidden: Tensor, monkeypatch) -> dict[str, Tensor]:
    """What the mixer hands to the operator."""
    seen: dict[str, Tensor] = {}

    def spy(r, log_w, k, v, a, b, **options):
        seen.update(r=r, log_w=log_w, k=k, v=v, a=a, b=b)
        return torch.zeros_like(v), torch.zeros(len(v), v.shape[2], v.shape[3], v.shape[3])

    monkeypatch.setattr(RWKV7Mixer, "over_rows", staticmethod(spy))
    with torch.no_grad():
        mixer(hidden)
    return seen


@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["start", "later"])
@pytest.mark.parametrize("rate_range", [1.0, 2.0])
def test_keys_have_unit_norm_and_what_is_removed_is_added_back(noise, rate_range, monkeypatch):
    mixer = make(SHAPES["biases"], noise=noise, rate_range=rate_range)
    seen = captured_operator_inputs(mixer, 30 * hidden_of(WIDTH), monkeypatch)
    removed_share = -torch.expm1(seen["log_w"])  # 1 - decay, also where the decay is almost 1
    ones = torch.ones(seen["k"].shape[:3])
    torch.testing.assert_close(seen["a"].norm(dim=-1), ones)
    rate = -seen["b"] / seen["a"]
    torch.testing.assert_close((seen["k"] / (removed_share + rate)).norm(dim=-1), ones, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["k"], -seen["a"] * (removed_share + rate), atol=1e-4, rtol=1e-4)
    assert seen["k"].norm(dim=-1).max() < rate_range + 0.46
    assert rate.min() >= -1e-4 and rate.max() <= rate_range + 1e-3
    if noise == 0.0:
        torch.testing.assert_close(rate, torch.full_like(rate, rate_range / 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_decay_lies_in_its_range_and_starts_as_published(index, monkeypatch):
    mixer = make(index=index)
    start = captured_operator_inputs(mixer, hidden_of(WIDTH), monkeypatch)["log_w"].exp()
    assert 0.545 < start.min() and start.max() < 1
    assert (start == start[:1, :1]).all(), "the data-dependent part is off at the start"
    place = torch.arange(WIDTH) / (WIDTH - 1)
    published = torch.exp(
        -torch.exp(-torch.nn.functional.softplus(-(-6.5 + 5 * place ** (0.85 + (index / 2) ** 0.5))) - 0.5)
    )
    torch.testing.assert_close(start[0, 0].flatten(), published, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        mixer.decay.bias.copy_(torch.linspace(-60, 60, WIDTH))
    extreme = captured_operator_inputs(mixer, hidden_of(WIDTH), monkeypatch)["log_w"].exp()
    assert extreme.min() >= 0.545 and extreme.max() <= 1


def test_a_rate_of_two_can_exchange_and_a_rate_of_one_cannot():
    """S (I - rate k k^T) has the eigenvalue 1 - rate along k: below 0 only beyond 1 (arXiv 2411.12537)."""
    for rate_range, lowest in ((1.0, 0.0), (2.0, -1.0)):
        mixer = make(rate_range=rate_range)
        with torch.no_grad():
            mixer.rate.bias.fill_(50.0)
            rate = rate_range * torch.sigmoid(mixer.rate(hidden_of(WIDTH)))
        assert (1 - rate).min().item() == pytest.approx(lowest, abs=1e-6)


def test_switched_off_parts_have_no_parameters_and_start_neutral():
    radlads = dict(make(first=False).named_parameters())
    assert not any(
        name.split(".")[0] in ("shift_mix", "bonus", "norm", "residual", "removed_key_scale")
        for name in radlads
    )
    arwkv, hidden = make(first=False, **ARWKV), hidden_of(WIDTH)
    assert (arwkv.shift_mix == 0).all() and (arwkv.bonus == 0).all() and (arwkv.written_key_mix == 1).all()
    assert (arwkv.removed_key_scale == 0.85).all()
    share = torch.sigmoid(arwkv.residual(hidden))
    torch.testing.assert_close(share, torch.full_like(share, 0.018), atol=1e-3, rtol=0)
    assert make(first=True, **ARWKV).residual is None, "the first layer has nothing to mix in"


@pytest.mark.parametrize("rank, wanted", [(1.0, 32), (47.0, 32), (49.0, 64), (107.8, 96), (418.4, 416)])
def test_ranks_are_the_nearest_multiple_of_32(rank, wanted):
    assert rounded_rank(rank) == wanted


def test_low_rank_parameters_start_at_their_bias_and_learn_from_there():
    part = LowRank(16, 32, 8, torch.tanh, bias=torch.arange(8.0))
    output = part(torch.randn(3, 16))
    assert (output == torch.arange(8.0)).all()
    output.pow(2).sum().backward()
    assert part.down.weight.grad.abs().max() > 0
    product = part.up.weight @ part.up.weight.T
    torch.testing.assert_close(product, 0.01 * torch.eye(8), atol=1e-6, rtol=1e-5)


# --- in a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_inherits_its_projections_biases_and_norms(family):
    teacher = tiny_teacher(family)
    student, _ = convert(teacher, student_config())
    for attention, mixer in zip(
        attention_modules(teacher).values(), attention_modules(student).values(), strict=True
    ):
        for ours, theirs in (
            ("receptance", "q_proj"),
            ("key", "k_proj"),
            ("value", "v_proj"),
            ("output", "o_proj"),
        ):
            assert_same(getattr(mixer, ours), getattr(attention, theirs))
        if family == "qwen3":
            assert_same(mixer.receptance_norm, attention.q_norm)
            assert_same(mixer.key_norm, attention.k_norm)
            assert mixer.receptance_norm.eps == attention.q_norm.variance_epsilon
        else:
            assert mixer.receptance_norm is None and mixer.key_norm is None


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("options", [{}, ARWKV], ids=["radlads", "arwkv"])
def test_every_parameter_of_every_mixer_gets_a_gradient(options):
    student = tiny_student(tiny_teacher(), **options)
    student(torch.arange(24)[None]).logits.pow(2).mean().backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_the_value_residual_carries_the_first_layers_value():
    teacher, ids = tiny_teacher(), torch.arange(24)[None]
    student = tiny_student(teacher, value_residual=True)
    first, *later = attention_modules(student).values()
    assert first.residual is None and all(mixer.residual is not None for mixer in later)
    seen = []
    later[-1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["sequence_context"].first_value), with_kwargs=True
    )
    hidden = []
    first.value.register_forward_hook(lambda module, args, output: hidden.append(output))
    with torch.no_grad():
        student(ids)
    assert torch.equal(seen[0].flatten(2), hidden[0])


def test_nothing_of_one_pass_is_left_for_the_next():
    student, ids = tiny_student(tiny_teacher(), **ARWKV), torch.arange(24)[None]
    with torch.no_grad():
        before = student(ids).logits
        student(ids.flip(1))
        assert torch.equal(student(ids).logits, before)
    assert not any(
        isinstance(value, SequenceContext) for module in student.modules() for value in vars(module).values()
    )


@pytest.mark.parametrize("options", [{}, ARWKV], ids=["radlads", "arwkv"])
def test_documents_and_padding_are_separate_texts(options):
    mixer, documents = make(noise=0.15, **options), packed_ids([[-3, 7, 5, 6], [4, 9, -2, 6]])
    hidden = hidden_of(WIDTH)
    with torch.no_grad():
        context = SequenceContext(document_ids=documents)
        found, _ = mixer(hidden, rotary(document_positions(documents)), sequence_context=context)
        for row, document in itertools.product(range(2), range(3)):
            place = documents[row] == document
            length = int(place.sum())
            alone, _ = mixer(hidden[row, place][None], rotary(torch.arange(length)[None]))
            torch.testing.assert_close(found[row, place], alone[0], atol=1e-5, rtol=1e-4)


def test_no_token_sees_the_future():
    mixer, hidden = make(noise=0.15, **ARWKV), hidden_of(WIDTH)
    changed = hidden.clone()
    changed[:, 11:] += 1.0
    with torch.no_grad():
        a, b = mixer(hidden)[0], mixer(changed)[0]
    assert torch.equal(a[:, :11], b[:, :11]) and (a[:, 11:] != b[:, 11:]).any(-1).all()


def test_token_shift_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]])
    documents = packed_ids([[-1, 2, -1, 1, 1]])
    documents[0, 4] = 0  # the first document goes on after the padding
    last = torch.tensor([[9.0]])
    assert previous_token(hidden, None, None).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert previous_token(hidden, None, last).flatten().tolist() == [9, 1, 2, 3, 4, 5]
    found = previous_token(hidden, documents, last)[0, :, 0]
    assert [found[i].item() for i in (1, 2, 4, 5)] == [9, 2, 3, 0]
    assert last_token(hidden, None, None).item() == 6
    assert last_token(hidden, packed_ids([[2, 2, -2]]), last).item() == 4
    assert last_token(hidden, packed_ids([[-6]]), last).item() == 9


@pytest.mark.parametrize(
    "options, key",
    [
        ({"gate": "high"}, "student.mixers.rwkv7.gate"),
        ({"written_key": "long"}, "student.mixers.rwkv7.written_key"),
        ({"rate_range": 0.0}, "student.mixers.rwkv7.rate_range"),
        ({"rate_range": 2.1}, "student.mixers.rwkv7.rate_range"),
    ],
)
def test_wrong_options_are_refused_with_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        RWKV7Options(**options)
