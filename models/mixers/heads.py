"""What mixers share: the teacher's projections and heads, rotary positions, output gates, and the decoding
state of recurrent ones.

Shape letters: B rows, T tokens, D hidden width, H heads, G key/value heads, N head size.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from kernels import fused
from kernels.segments import token_codes
from models.backbone import SequenceContext
from models.mixers.base import AttentionShape, Mixer
from models.mixers.low_rank import rounded_rank
from models.mixers.token_shift import last_token
from models.sequence_state import RecurrentCacheLayer, recurrent_layer

GATES = ("none", "low", "full")


class HeadMixer(Mixer):
    """A mixer over the teacher's heads: its four projections, and its q/k norms where it has them.

    Args:
        shape: head counts, biases and norms of the attention that it replaces.
        options: the flavour; has `rope`.
        layer_index: of the decoder layer, from 0.

    Raises:
        ValueError: for a head size that the mixer does not have.
    """

    def __init__(self, shape: AttentionShape, options: Any, layer_index: int):
        super().__init__()
        if shape.head_size not in self.head_sizes:
            raise ValueError(
                f"student.layer_plan: {self.name} needs a head size in {self.head_sizes}; the "
                f"teacher has {shape.head_size}. Keep attention in its layers."
            )
        self.shape, self.options, self.layer_index = shape, options, layer_index
        width, inner = shape.hidden_size, shape.heads * shape.head_size
        kv_inner = shape.kv_heads * shape.head_size
        self.receptance = nn.Linear(width, inner, bias=shape.query_bias)
        self.key = nn.Linear(width, kv_inner, bias=shape.key_bias)
        self.value = nn.Linear(width, kv_inner, bias=shape.value_bias)
        self.output = nn.Linear(inner, width, bias=shape.output_bias)
        self.receptance_norm = nn.RMSNorm(shape.head_size, eps=shape.norm_eps) if shape.query_norm else None
        self.key_norm = nn.RMSNorm(shape.head_size, eps=shape.norm_eps) if shape.key_norm else None

    def project_heads(
        self, inputs: dict[str, Tensor], position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Receptance [B,T,H,N] (read scale N^-1/2 included), key and value [B,T,G,N].

        Args:
            inputs: what the projections `r`, `k` and `v` read, [B,T,D].
            position_embeddings: cosine and sine [B or 1,T,N], used with `rope`.
        """
        receptance = self.split(self.receptance(inputs["r"]))
        key = self.split(self.key(inputs["k"]))
        if self.receptance_norm is not None:
            receptance = self.receptance_norm(receptance)
        if self.key_norm is not None:
            key = self.key_norm(key)
        if self.options.rope and position_embeddings is not None:
            receptance, key = rotate(receptance, position_embeddings), rotate(key, position_embeddings)
        return receptance * self.shape.head_size**-0.5, key, self.split(self.value(inputs["v"]))

    def split(self, flat: Tensor) -> Tensor:
        """[B,T,heads·N] -> [B,T,heads,N]."""
        return flat.unflatten(-1, (-1, self.shape.head_size))


class RecurrentMixer(HeadMixer):
    """A mixer whose decoding memory is a state, and whose heads may end in a norm and a gate.

    Its options also have `gate`, `group_norm` and `backend`; `add_ending` makes the parts that they ask for.

    Attributes:
        over_rows: the operator over rows of tokens, such as kernels.wkv7.wkv7.
        one_token: the same for one token of each row, with the state changed in place.
    """

    over_rows: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    one_token: ClassVar[Callable[..., Tensor]]

    def add_ending(self) -> None:
        """Makes the output gate and the norm over each head's output."""
        shape = self.shape
        inner = shape.heads * shape.head_size
        self.gate = output_gate(self.options.gate, shape.hidden_size, inner)
        self.norm = (
            nn.GroupNorm(shape.heads, inner, eps=shape.head_size * 1e-5) if self.options.group_norm else None
        )

    @property
    def elementwise(self) -> str:
        """Backend of the elementwise parts: Triton's, not measured on a GPU yet, where it is named for the
        operator."""
        return "triton" if self.options.backend == "triton" else "reference"

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
        """The operator over the row; for one more token of a text, in place on the decoding state.

        Args:
            inputs: r, log_w, k, v, ... of the operator, [B,T,H,N]. Where v has 16 bits, all but log_w are
                rounded to them: kernels then move half the memory, and sum up in float32 all the same.
            memory: as from `recall`.
            context: documents and padding of the row.
            bonus: arguments that have no tokens.

        Returns:
            [B,T,H,N] and the state [B,H,N,N] after the call.
        """
        r, log_w, k, v, *more = inputs
        inputs = (r.to(v.dtype), log_w, k.to(v.dtype), v, *(x.to(v.dtype) for x in more))
        backend = self.options.backend
        state = memory.state if memory is not None else None
        if state is None or v.shape[1] > 1 or torch.is_grad_enabled() or not _writable(state):
            ids = context.document_ids
            return self.over_rows(*inputs, state=state, document_ids=ids, backend=backend, **bonus)
        codes = None if context.document_ids is None else token_codes(context.document_ids)[:, 0]
        now = (x[:, 0] for x in inputs)
        return self.one_token(*now, state, codes=codes, backend=backend, **bonus)[:, None], state

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


def _writable(state: Tensor) -> bool:
    """Whether a state may be changed in place here: one made in inference mode may not outside of it."""
    return torch.is_inference_mode_enabled() or not state.is_inference()


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


def output_gate(kind: str, width: int, inner: int) -> nn.Module | None:
    """A gate of one of GATES."""
    if kind == "none":
        return None
    return (
        FullGate(width, inner)
        if kind == "full"
        else LowRankGate(width, rounded_rank(0.6 * width**0.8), inner)
    )


def rotate(heads: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on [B,T,heads,N], in the half-split layout of Hugging Face
    decoders."""
    cosine, sine = (table[:, :, None] for table in position_embeddings)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


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
