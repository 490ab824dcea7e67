"""What mixers share: the teacher's projections and heads, rotary positions, output gates, and the decoding
state of recurrent ones.

Shape letters: B rows, T tokens, D hidden width, H heads, G key/value heads, N head size.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from kernels import fused
from kernels.case import HEAD_SIZES
from models.backbone import SequenceContext
from models.mixers.base import AttentionShape, Mixer
from models.mixers.low_rank import rounded_rank
from models.mixers.operator_call import operator_size, run_operator
from models.mixers.token_shift import last_token
from models.sequence_state import RecurrentCacheLayer, recurrent_layer

LARGEST = max(HEAD_SIZES)
GATES = ("none", "low", "full", "silu")
SILU_IS_ONE = 1.2784645427610738  # x σ(x) = 1


class HeadMixer(Mixer):
    """A mixer over the teacher's heads: its four projections, and its q/k norms where it has them.

    Args:
        shape: head counts, biases and norms of the attention that it replaces.
        options: the flavour; has `rope`.
        layer_index: of the decoder layer, from 0.
        kv_heads: key/value heads of the mixer itself: the teacher's G, or H, which gives each query head its
            own copy of the teacher's; None means G.

    Raises:
        ValueError: for a head size that the mixer does not have.
    """

    def __init__(self, shape: AttentionShape, options: Any, layer_index: int, kv_heads: int | None = None):
        super().__init__()
        self.check_head_size(shape.head_size)
        self.shape, self.options, self.layer_index = shape, options, layer_index
        self.kv_heads = shape.kv_heads if kv_heads is None else kv_heads
        width, inner = shape.hidden_size, shape.heads * shape.head_size
        kv_inner = self.kv_heads * shape.head_size
        self.receptance = nn.Linear(width, inner, bias=shape.query_bias)
        self.key = nn.Linear(width, kv_inner, bias=shape.key_bias)
        self.value = nn.Linear(width, kv_inner, bias=shape.value_bias)
        self.output = nn.Linear(inner, width, bias=shape.output_bias)
        self.receptance_norm = HeadNorm(shape, shape.heads) if shape.query_norm else None
        self.key_norm = HeadNorm(shape, self.kv_heads) if shape.key_norm else None

    def project_heads(
        self, inputs: dict[str, Tensor], position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Receptance [B,T,H,N] (read scale included), key and value [B,T,kv_heads,N].

        Args:
            inputs: what the projections `r`, `k` and `v` read, [B,T,D].
            position_embeddings: cosine and sine [B or 1,T,R], used with `rope` where the teacher rotates.
        """
        receptance, key, value = (
            self.split(projection(inputs[part]))
            for part, projection in (("r", self.receptance), ("k", self.key), ("v", self.value))
        )
        if self.receptance_norm is not None:
            receptance = self.receptance_norm(receptance)
        if self.key_norm is not None:
            key = self.key_norm(key)
        if self.rotates(position_embeddings):
            kind = self.shape.rotation
            receptance = rotate(receptance, position_embeddings, kind)
            key = rotate(key, position_embeddings, kind)
        return receptance * self.read_scale, key, value

    def rotates(self, position_embeddings: tuple[Tensor, Tensor] | None) -> bool:
        """Whether queries and keys are rotated."""
        return self.options.rope and self.shape.rotated and position_embeddings is not None

    @property
    def read_scale(self) -> float:
        """What the receptance is multiplied with."""
        scale = self.shape.read_scale
        return self.shape.head_size**-0.5 if scale is None else scale

    @property
    def kv_repeats(self) -> int:
        """Query heads that share one of the mixer's key/value heads."""
        return self.shape.heads // self.kv_heads

    def repeat_kv(self, heads: Tensor) -> Tensor:
        """[B,T,kv_heads,N] -> [B,T,H,N]; neighbouring query heads share a key/value head and its states."""
        if self.kv_repeats == 1:
            return heads
        grouped = heads.unflatten(2, (self.kv_heads, -1))
        return grouped.repeat_interleave(self.kv_repeats, dim=2).flatten(2, 3)

    def split(self, flat: Tensor) -> Tensor:
        """[B,T,heads·N] -> [B,T,heads,N]."""
        return flat.unflatten(-1, (-1, self.shape.head_size))


class RecurrentMixer(HeadMixer):
    """A mixer whose decoding memory is a state, and whose heads may end in a norm and a gate.

    A head larger than the operators have is divided into equal parts with a state each: from the projections
    on, each part is a head of its own, and H and N below count such parts.

    Its options also have `gate`, `group_norm` and `backend`; `add_ending` makes the parts that they ask for.

    Attributes:
        over_rows: the operator over rows of tokens, such as kernels.wkv7.wkv7.
        one_token: the same for one token of each row, with the state changed in place.
    """

    over_rows: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    one_token: ClassVar[Callable[..., Tensor]]
    head_sizes = range(8, 513, 8)

    @property
    def state_size(self) -> int:
        """Channels of one state: of a head, or of the largest equal part of it that the operators hold."""
        size = self.shape.head_size
        sizes = (size // parts for parts in range(1, size) if size % parts == 0)
        return next(part for part in sizes if part <= LARGEST)

    @property
    def state_count(self) -> int:
        """States of the layer, for each row."""
        return self.shape.heads * self.shape.head_size // self.state_size

    @property
    def operator_heads(self) -> tuple[int, int]:
        """As `Mixer.operator_heads`."""
        return self.state_count, operator_size(self.state_size)

    def by_state(self, flat: Tensor) -> Tensor:
        """[B,T,H·N] -> [B,T,H,N]."""
        return flat.unflatten(-1, (-1, self.state_size))

    def project_heads(
        self, inputs: dict[str, Tensor], position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `HeadMixer.project_heads`, divided into states."""
        receptance, key, value = super().project_heads(inputs, position_embeddings)
        return tuple(self.by_state(heads.flatten(2)) for heads in (receptance, key, value))

    def add_ending(self) -> None:
        """Makes the output gate and the norm over each head's output."""
        shape = self.shape
        inner = shape.heads * shape.head_size
        self.gate = output_gate(self.options.gate, shape.hidden_size, inner)
        self.norm = (
            nn.GroupNorm(self.state_count, inner, eps=self.state_size * 1e-5)
            if self.options.group_norm
            else None
        )

    @property
    def elementwise(self) -> str:
        """Backend of the elementwise parts: Triton's, not measured on a GPU yet, where it is named for the
        operator and has the head size."""
        fits = self.state_size in HEAD_SIZES
        return "triton" if self.options.backend == "triton" and fits else "reference"

    def finish(self, mixed: Tensor, bonus: tuple[Tensor, ...] | None, hidden: Tensor) -> Tensor:
        """Norm, bonus, gate and output projection.

        Args:
            mixed: [B,T,H,N] from the operator.
            bonus: receptance, key, value [B,T,H,N] and the weight [H,N] of the current token, or None.
            hidden: [B,T,D] that the gate reads.

        Returns:
            [B,T,D].
        """
        r, k, v, weight = bonus or (None,) * 4
        gate = None if self.gate is None else self.gate(hidden)
        norm = {}
        if self.norm is not None:
            norm = {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias, "norm_eps": self.norm.eps}
        flat = fused.finish(mixed, r=r, k=k, v=v, bonus=weight, gate=gate, backend=self.elementwise, **norm)
        return self.output(flat.to(self.output.weight.dtype))

    def recall(self, cache: Cache | None, context: SequenceContext) -> RecurrentCacheLayer | None:
        """This layer's decoding state, ready for the call, or None where nothing is decoded."""
        if cache is None:
            return None
        memory = recurrent_layer(cache, self.layer_index)
        memory.begin(context.continues)
        return memory

    def run_operator(
        self,
        inputs: tuple[Tensor, ...],
        memory: RecurrentCacheLayer | None,
        context: SequenceContext,
        **bonus: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The mixer's operator on r, log_w, k, v, ... [B,T,H,N] (mixers/operator_call.py).

        Args:
            inputs: of the operator.
            memory: as from `recall`.
            context: documents and padding of the row.
            bonus: arguments that have no tokens.

        Returns:
            [B,T,H,N] and the state [B,H,N,N] after the call.
        """
        state = None if memory is None else memory.state
        ids, backend = context.document_ids, self.options.backend
        return run_operator(self.over_rows, self.one_token, inputs, state, ids, backend, **bonus)

    def remember(
        self,
        memory: RecurrentCacheLayer | None,
        state: Tensor,
        hidden: Tensor,
        context: SequenceContext,
        shifts: bool,
    ) -> None:
        """Hands the state [B,H,N,N] after this call to the next; with a token shift also the last token of
        `hidden` [B,T,D]."""
        if memory is not None:
            last = last_token(hidden, context.document_ids, memory.last_hidden) if shifts else None
            memory.advance(state, last, hidden.shape[1])


class LowRankGate(nn.Module):
    """1 + σ(x A) B, with B = 0 at the start: exactly 1."""

    def __init__(self, width: int, rank: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, inner, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H·N]."""
        return 1 + self.up(torch.sigmoid(self.down(hidden)))


class FullGate(nn.Module):
    """2 σ(x W), with W = 0 at the start: exactly 1."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inner, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H·N]."""
        return 2 * torch.sigmoid(F.linear(hidden, self.weight))


class SiluGate(nn.Module):
    """SiLU(x W + b), the gate of RWKV-6 but for its bias, with W = 0 at the start and b such that it is 1."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inner, width))
        self.bias = nn.Parameter(torch.full((inner,), SILU_IS_ONE))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H·N]."""
        return F.silu(F.linear(hidden, self.weight, self.bias))


def output_gate(kind: str, width: int, inner: int) -> nn.Module | None:
    """A gate of one of GATES."""
    if kind == "none":
        return None
    if kind == "low":
        return LowRankGate(width, rounded_rank(0.6 * width**0.8), inner)
    return FullGate(width, inner) if kind == "full" else SiluGate(width, inner)


class HeadNorm(nn.Module):
    """The teacher's RMSNorm of queries or keys (arXiv 1910.07467), over each head or over all of them.

    Args:
        shape: of the attention.
        heads: of the queries or keys.
    """

    def __init__(self, shape: AttentionShape, heads: int):
        super().__init__()
        self.over_all, self.offset, self.eps = shape.norm_scope == "width", shape.norm_offset, shape.norm_eps
        width = heads * shape.head_size if self.over_all else shape.head_size
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))

    def forward(self, heads: Tensor) -> Tensor:
        """[B,T,heads,N] -> [B,T,heads,N]."""
        weight = self.weight + self.offset if self.offset else self.weight
        if not self.over_all:
            return F.rms_norm(heads, weight.shape, weight, self.eps)
        return F.rms_norm(heads.flatten(2), weight.shape, weight, self.eps).view_as(heads)


def rotate(heads: Tensor, position_embeddings: tuple[Tensor, Tensor], rotation: str = "half") -> Tensor:
    """Rotary positions (arXiv 2104.09864) of the first R channels of [B,T,heads,N]; the others stay.

    Args:
        heads: queries or keys.
        position_embeddings: cosine and sine [B or 1,T,R], each angle twice, in the halves of R.
        rotation: `half` turns channels i and i + R/2 together, `interleaved` channels 2i and 2i + 1.
    """
    cosine, sine = (table[:, :, None] for table in position_embeddings)
    turning, still = heads[..., : cosine.shape[-1]], heads[..., cosine.shape[-1] :]
    if rotation == "interleaved":
        cosine, sine = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in (cosine, sine))
        across = torch.stack([-turning[..., 1::2], turning[..., 0::2]], dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    turned = turning * cosine + across * sine
    return torch.cat([turned, still], dim=-1) if still.shape[-1] else turned


def position_scale(positions: Tensor, training_length: int) -> Tensor:
    """[B,T] positions in documents -> [B,T,1,1] float32 factors of queries, max(1, ln(t + 1) / ln(L0)), with
    which attention over ever more keys stays as sharp as it was (arXiv 2501.19399).

    Args:
        positions: t, from 0.
        training_length: L0, tokens up to which the factor is exactly 1.
    """
    grown = (positions + 1).float().log() / math.log(training_length)
    return grown.clamp(min=1.0)[..., None, None]


def decay_bias(inner: int, layer_index: int, layer_count: int) -> Tensor:
    """RWKV-7's start: per channel from half-lives of hundreds of tokens to a few, steeper in deeper
    layers."""
    depth = layer_index / max(layer_count - 1, 1)
    place = torch.arange(inner, dtype=torch.float32) / max(inner - 1, 1)
    return -6.5 + 5.0 * place ** (0.85 + depth**0.5)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value of a config key that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(choices)}.")
