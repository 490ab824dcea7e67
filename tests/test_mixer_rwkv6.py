"""The RWKV-6 mixer against its formulas, token by token in float64; its start; decoding."""

import math

import mixer_checks
import pytest
import torch
from mixer_checks import student_of
from omegaconf import OmegaConf
from tiny import FAMILIES, HEAD_SIZE, convert, disturb, tiny_teacher
from torch import Tensor
from transformers import PreTrainedModel

from models.config import StudentConfig
from models.decoding import decoding_cost
from models.layer_plan import LayerPlan
from models.mixers import AttentionShape, RWKV6Mixer, RWKV6Options
from models.mixers.heads import GATES
from pipeline.results import chosen_kernels

WIDTH, TOKENS = 2 * HEAD_SIZE, 21
GROUPED = AttentionShape(WIDTH, 4, 2, HEAD_SIZE)
SHAPES = {
    "grouped": GROUPED,
    "biases": AttentionShape(
        WIDTH, 2, 2, HEAD_SIZE, query_bias=True, key_bias=True, value_bias=True, output_bias=True
    ),
    "norms": AttentionShape(48, 2, 1, HEAD_SIZE, query_norm=True, key_norm=True, norm_eps=1e-3),
    "filled_up": AttentionShape(WIDTH, 4, 2, 24),
    "divided": AttentionShape(WIDTH, 4, 2, 256, query_norm=True, key_norm=True),
}
PUBLISHED = {"rope": False, "gate": "silu", "bonus": True, "group_norm": True, "written_key": "published"}
FLAVOURS = {
    "rad": {},
    "published": PUBLISHED,
    "published_with_raw_keys": PUBLISHED | {"gate": "full", "written_key": "raw"},
    "raw_low_gate": {"written_key": "raw", "gate": "low"},
    "bonus_without_shift": {"bonus": True, "token_shift": False, "gate": "none"},
}


def make(shape: AttentionShape = GROUPED, noise: float = 0.0, index: int = 1, **options) -> RWKV6Mixer:
    torch.manual_seed(0)
    mixer = RWKV6Mixer(shape, RWKV6Options(**options), layer_index=index, layer_count=3, first=False)
    disturb(mixer, noise)
    return mixer


def hidden_of(width: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, TOKENS, width, generator=torch.Generator().manual_seed(5))


def rotary(size: int = HEAD_SIZE) -> tuple[Tensor, Tensor]:
    """Cosine and sine [1,T,N] as a Hugging Face decoder hands them to attention."""
    frequency = 1e4 ** (-torch.arange(0, size, 2) / size)
    angle = (torch.arange(TOKENS)[:, None] * frequency).repeat(1, 2)[None]
    return angle.cos(), angle.sin()


class PlainRWKV6:
    """RWKV-6 (arXiv 2404.05892) and its RADLADS form (arXiv 2505.03005) with a mixer's weights, in float64,
    for one row, head by head and token by token."""

    def __init__(self, mixer: RWKV6Mixer):
        self.shape, self.options = mixer.shape, mixer.options
        self.parts = -(-self.shape.head_size // 128)  # states of a head; enough for the sizes that tests take
        self.size = self.shape.head_size // self.parts
        self.weights = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}

    def __call__(self, hidden: Tensor) -> Tensor:
        x = hidden.double()
        previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        inputs = {part: self.lerp(x, previous, part) for part in "rwkvg"}
        rate = torch.exp(self.low_rank("decay", inputs["w"]))
        decay = torch.exp(torch.maximum(-rate, torch.tensor(-5.0)))
        receptance, key, value = (
            inputs[part] @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)
            for part, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
        )
        size, sharing = self.shape.head_size, self.shape.heads // self.shape.kv_heads
        heads = []
        for head in range(self.shape.heads):
            own, group = (slice(i * size, (i + 1) * size) for i in (head, head // sharing))
            r = self.turned(receptance[:, own], "receptance_norm") * size**-0.5
            k = self.turned(key[:, group], "key_norm")
            parts = (r, decay[:, own], k, value[:, group])
            for part, own in enumerate(zip(*(x.split(self.size, dim=1) for x in parts), strict=True)):
                heads.append(self.one_head(head * self.parts + part, *own))
        output = torch.cat(heads, 1) * self.gate(inputs["g"])
        return output @ self.weights["output.weight"].T + self.weights.get("output.bias", 0.0)

    def one_head(self, head: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = self.size
        state, outputs = torch.zeros(size, size, dtype=torch.float64), []
        for token in range(len(r)):
            written = k[token] / k[token].norm() if self.options.written_key == "unit" else k[token]
            if self.options.written_key != "published":
                written = written * (1 - w[token])
            added = torch.outer(written, v[token])
            before, state = state, torch.diag(w[token]) @ state + added
            if self.options.bonus:
                y = r[token] @ (before + torch.diag(self.weights["bonus"][head]) @ added)
            else:
                y = r[token] @ state
            if self.options.group_norm:
                y = (y - y.mean()) / (y.var(unbiased=False) + size * 1e-5).sqrt()
                own = slice(head * size, (head + 1) * size)
                y = y * self.weights["norm.weight"][own] + self.weights["norm.bias"][own]
            outputs.append(y)
        return torch.stack(outputs)

    def lerp(self, x: Tensor, previous: Tensor, part: str) -> Tensor:
        if not self.options.token_shift:
            return x
        mixed = x + (previous - x) * self.weights["shift.common"]
        return x + (previous - x) * self.low_rank(f"shift.mixes.{part}", mixed)

    def low_rank(self, name: str, hidden: Tensor) -> Tensor:
        middle = torch.tanh(hidden @ self.weights[f"{name}.down.weight"].T)
        return self.weights[f"{name}.bias"] + middle @ self.weights[f"{name}.up.weight"].T

    def turned(self, heads: Tensor, norm: str) -> Tensor:
        if f"{norm}.weight" in self.weights:
            scale = (heads.pow(2).mean(1, keepdim=True) + self.shape.norm_eps).sqrt()
            heads = heads / scale * self.weights[f"{norm}.weight"]
        if not self.options.rope:
            return heads
        cosine, sine = (table[0].double() for table in rotary(self.shape.head_size))
        half = self.shape.head_size // 2
        return heads * cosine + torch.cat([-heads[:, half:], heads[:, :half]], 1) * sine

    def gate(self, hidden: Tensor) -> Tensor | float:
        if self.options.gate == "none":
            return 1.0
        if self.options.gate == "full":
            return 2 * (hidden @ self.weights["gate.weight"].T).sigmoid()
        if self.options.gate == "silu":
            opened = hidden @ self.weights["gate.weight"].T + self.weights["gate.bias"]
            return opened * opened.sigmoid()
        return 1 + (hidden @ self.weights["gate.down.weight"].T).sigmoid() @ self.weights["gate.up.weight"].T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_mixer_computes_its_formulas(flavour, shape):
    mixer = make(SHAPES[shape], noise=0.15, **FLAVOURS[flavour])
    hidden = hidden_of(SHAPES[shape].hidden_size)
    with torch.no_grad():
        found, nothing = mixer(hidden, rotary(SHAPES[shape].head_size))
    assert nothing is None and found.dtype == torch.float32
    for row in range(2):
        wanted = PlainRWKV6(mixer)(hidden[row])
        assert (found[row].double() - wanted).norm() / wanted.norm() < 2e-5


def test_the_named_backend_is_used(monkeypatch):
    seen = captured_operator_inputs(make(backend="reference"), hidden_of(WIDTH), monkeypatch)
    assert seen["backend"] == "reference"


# --- the start ----------------------------------------------------------------------------------------------


def captured_operator_inputs(mixer: RWKV6Mixer, hidden: Tensor, monkeypatch) -> dict[str, object]:
    """What the mixer hands to the operator."""
    seen: dict[str, object] = {}

    def spy(r, log_w, k, v, **options):
        seen.update(r=r, log_w=log_w, k=k, v=v, **options)
        return torch.zeros_like(v), torch.zeros(len(v), v.shape[2], v.shape[3], v.shape[3])

    monkeypatch.setattr(RWKV6Mixer, "over_rows", staticmethod(spy))
    with torch.no_grad():
        mixer(hidden)
    return seen


@pytest.mark.parametrize("gate", GATES)
def test_at_the_start_the_gate_is_one_and_no_token_is_shifted(gate):
    mixer, hidden = make(gate=gate), hidden_of(WIDTH)
    with torch.no_grad():
        before = mixer(hidden)[0]
        mixer.gate = mixer.shift = None
        assert torch.equal(mixer(hidden)[0], before)


@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["start", "later"])
def test_the_written_key_has_the_norm_of_what_decays(noise, monkeypatch):
    """A channel that forgets a share writes as much: k = unit x (1 - w)."""
    seen = captured_operator_inputs(make(noise=noise), 30 * hidden_of(WIDTH), monkeypatch)
    unit = seen["k"] / -torch.expm1(seen["log_w"])
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(unit.shape[:3]), atol=1e-4, rtol=1e-4)
    assert seen["u"] is None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_decay_starts_as_published_and_is_bounded(index, monkeypatch):
    mixer = make(index=index)
    start = captured_operator_inputs(mixer, hidden_of(WIDTH), monkeypatch)["log_w"]
    inner = 4 * HEAD_SIZE
    place = torch.arange(inner) / (inner - 1)
    published = -torch.exp(-6.5 + 5 * place ** (0.85 + (index / 2) ** 0.5))
    torch.testing.assert_close(start[1, 3].flatten(), published, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        mixer.decay.bias.copy_(torch.linspace(-200, 200, inner))
    extreme = captured_operator_inputs(mixer, hidden_of(WIDTH), monkeypatch)["log_w"]
    assert extreme.max() <= 0 and extreme.min() == pytest.approx(-5, abs=1e-5)


def test_beyond_the_bound_no_gradient_is_nan():
    mixer = make()
    with torch.no_grad():
        mixer.decay.bias.fill_(200.0)
    mixer(hidden_of(WIDTH))[0].pow(2).sum().backward()
    gradients = [p.grad for p in mixer.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    assert (mixer.decay.bias.grad == 0).all()


def test_switched_off_parts_have_no_parameters():
    names = {name.split(".")[0] for name, _ in make(token_shift=False, gate="none").named_parameters()}
    assert names == {"receptance", "key", "value", "output", "decay"}
    assert (make(bonus=True).bonus == 1).all(), "the current token starts as every other"


@pytest.mark.parametrize(
    "options, key",
    [
        ({"gate": "high"}, "student.mixers.rwkv6.gate"),
        ({"written_key": "long"}, "student.mixers.rwkv6.written_key"),
        ({"backend": "fast"}, "kernel.wkv6='fast' is unknown; choose one of auto, .*chunked, reference"),
    ],
)
def test_wrong_options_are_refused_with_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        RWKV6Options(**options)


def test_an_unsupported_head_size_is_refused():
    with pytest.raises(
        ValueError, match="rwkv6 needs a head size up to 512 .* multiple of 8; the teacher has 20"
    ):
        make(AttentionShape(WIDTH, 4, 2, 20))


# --- in a model ---------------------------------------------------------------------------------------------

STUDENTS = {
    "rad": ({}, (), "qwen2"),
    "published_keep_first": (PUBLISHED, (0,), "qwen3"),
    "unshifted_keep_middle": ({"token_shift": False, "gate": "low"}, (1,), "llama_biased"),
}


@pytest.fixture(params=STUDENTS, scope="module")
def student(request) -> PreTrainedModel:
    options, keep, family = STUDENTS[request.param]
    return student_of("rwkv6", RWKV6Options(**options), keep, family)


class TestInAModel(mixer_checks.InAModel):
    """RWKV-6."""


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_it_learns(flavour):
    mixer_checks.assert_it_learns("rwkv6", RWKV6Options(**FLAVOURS[flavour]))


def test_it_comes_back_from_disk(tmp_path):
    mixer_checks.assert_it_comes_back_from_disk("rwkv6", RWKV6Options(**PUBLISHED), tmp_path / "student")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_inherits_what_every_family_has(family):
    names = dict(student_of("rwkv6", RWKV6Options(), family=family).named_parameters())
    own = {name.split(".", 4)[4] for name in names if name.startswith("model.layers.1.self_attn.")}
    assert ("receptance.bias" in own) == (family in ("qwen2", "qwen2_tied", "llama_biased"))
    assert ("key_norm.weight" in own) == (family == "qwen3")


def test_the_state_does_not_grow():
    model = student_of("rwkv6", RWKV6Options())
    cost = decoding_cost({"student": model}, [16, 64], tokens=1)["student"]
    assert cost["state_bytes"] == [3 * (2 * HEAD_SIZE * HEAD_SIZE + WIDTH) * 4] * 2


RUN = OmegaConf.create(
    {"trainer": {"accelerator": "cpu", "precision": "32-true"}, "data": {"rows_per_device": 4}}
)


def test_a_run_names_the_operators_that_its_student_uses():
    plans = {
        "wkv6": ["rwkv6"] * 3,
        "sparse_attention wkv6 wkv7": ["rwkv7", "rwkv6", "sparse"],
        "sparse_attention": ["sparse", "attention", "attention"],
    }
    for wanted, plan in plans.items():
        config = StudentConfig(layer_plan=LayerPlan(layers=plan))
        found = chosen_kernels(convert(tiny_teacher(), config)[0], RUN)
        assert list(found) == wanted.split()
        assert all(choice["backend"] and choice["reason"] for choice in found.values())
    named = chosen_kernels(student_of("rwkv6", RWKV6Options(backend="reference")), RUN)
    assert named == {"wkv6": {"backend": "reference", "reason": "named in the config"}}
    assert chosen_kernels(tiny_teacher(), RUN) == {}


def test_the_decay_bias_is_what_its_half_life_says():
    """log 2 / exp(w0) tokens: hundreds at one end, a few at the other."""
    bias = make(index=2).decay.bias
    assert math.log(2) / bias[0].exp() > 400 and math.log(2) / bias[-1].exp() < 4
