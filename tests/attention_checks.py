"""Softmax attention in float64, one document and one query at a time: what the tests of attention mixers
compare with."""

from collections.abc import Callable

import torch
from tiny import HEAD_SIZE, disturb
from torch import Tensor

from models.mixers import AttentionShape
from models.mixers.heads import HeadMixer
from models.mixers.softmax import SoftmaxMixer

WIDTH, TOKENS = 2 * HEAD_SIZE, 45
GROUPED = AttentionShape(WIDTH, 4, 2, HEAD_SIZE)
SHAPES = {
    "grouped": GROUPED,
    "biases": AttentionShape(
        WIDTH, 2, 2, HEAD_SIZE, query_bias=True, key_bias=True, value_bias=True, output_bias=True
    ),
    "norms": AttentionShape(48, 2, 1, HEAD_SIZE, query_norm=True, key_norm=True, norm_eps=1e-3),
}


def make(kind: type[HeadMixer], shape: AttentionShape = GROUPED, noise: float = 0.1, **options) -> HeadMixer:
    """A mixer away from its start."""
    torch.manual_seed(0)
    mixer = kind(shape, kind.options_class(**options), layer_index=1, layer_count=3, first=False)
    disturb(mixer, noise)
    return mixer


def hidden_of(width: int = WIDTH, rows: int = 2, tokens: int = TOKENS) -> Tensor:
    """[rows,tokens,width] float32."""
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(5))


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B,T,N] as a Hugging Face decoder hands them to attention."""
    frequency = 1e4 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


def plain_heads(mixer: HeadMixer, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Query [T,H,N], unscaled, key and value [T,G,N] of one document [T,D] in float64; cosine and sine
    [1,T,N] turn the first two where the mixer's options have `rope`."""
    weights = {name: parameter.double() for name, parameter in mixer.named_parameters()}
    cosine, sine = (table[0].double()[:, None] for table in positions)

    def heads(name: str) -> Tensor:
        flat = hidden.double() @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
        parts = flat.unflatten(1, (-1, mixer.shape.head_size))
        if f"{name}_norm.weight" in weights:
            scale = (parts.pow(2).mean(-1, keepdim=True) + mixer.shape.norm_eps).sqrt()
            parts = parts / scale * weights[f"{name}_norm.weight"]
        if name == "value" or not mixer.options.rope:
            return parts
        half = mixer.shape.head_size // 2
        return parts * cosine + torch.cat([-parts[..., half:], parts[..., :half]], -1) * sine

    return heads("receptance"), heads("key"), heads("value")


def plain(mixer: SoftmaxMixer, hidden: Tensor, visible: Tensor, factor: Callable[[int], float]) -> Tensor:
    """One document [T,D] -> [T,D] by the definition.

    Args:
        mixer: whose weights and options count.
        hidden: of the document's tokens.
        visible: [T,T] bool, which key each query sees.
        factor: position -> what the query is multiplied with.
    """
    size, sharing = mixer.shape.head_size, mixer.shape.heads // mixer.shape.kv_heads
    weights = {name: parameter.double() for name, parameter in mixer.named_parameters()}
    query, key, value = plain_heads(mixer, hidden, rotary(torch.arange(len(hidden))[None]))
    factors = torch.tensor([factor(position) for position in range(len(hidden))], dtype=torch.float64)
    mixed = []
    for head in range(mixer.shape.heads):
        scores = factors[:, None] * (query[:, head] @ key[:, head // sharing].T) / size**0.5
        mixed.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[:, head // sharing])
    flat = torch.cat(mixed, 1)
    if mixer.options.gate == "full":
        flat = flat * 2 * (hidden.double() @ weights["gate.weight"].T).sigmoid()
    if mixer.options.gate == "low":
        middle = (hidden.double() @ weights["gate.down.weight"].T).sigmoid()
        flat = flat * (1 + middle @ weights["gate.up.weight"].T)
    return flat @ weights["output.weight"].T + weights.get("output.bias", 0.0)


def assert_equal_with_gradients(mixer: SoftmaxMixer, found: Tensor, wanted: Tensor) -> None:
    """Two results of one mixer, and the gradients of all its parameters that they have."""
    assert (found.double() - wanted).norm() / wanted.norm() < 2e-6
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(x.pow(2).sum(), parameters) for x in (found, wanted))
    for name, a, b in zip(names, ours, theirs, strict=True):
        if name == "key.bias":  # a shift of all scores of a query: no gradient but for the rotation
            assert (a - b).abs().max() < 1e-4 * b.abs().max() + 1e-4
            continue
        assert (a - b).norm() / b.norm() < 1e-5, name
