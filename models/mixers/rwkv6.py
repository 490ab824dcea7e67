"""RWKV-6 time mixing in the place of attention, in the RADLADS flavour (RAD-RWKV6, arXiv 2505.03005).

Shape letters: B rows, T tokens, D hidden width, H heads, G key/value heads, N head size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from kernels.wkv6 import BACKENDS, wkv6, wkv6_step
from models.backbone import SequenceContext
from models.mixers.base import AttentionShape, wide
from models.mixers.heads import GATES, RecurrentMixer, check_choice, decay_bias
from models.mixers.low_rank import LowRank, rounded_rank
from models.mixers.token_shift import previous_token

LARGEST_RATE = 5.0  # a decay of e^-5 in one token; the published bound
WRITTEN_KEYS = ("unit", "raw", "published")


@dataclass(frozen=True, kw_only=True)
class RWKV6Options:
    """The flavour of the mixer. The defaults are RAD-RWKV6, but for the unit norm of the written key.

    Args:
        rope: rotate receptance and key as the teacher rotates query and key.
        gate: `none`, `low` rank or `full` rank, or `silu` (full rank, as published); starts at 1 everywhere,
            so the transferred output path is whole.
        token_shift: mix each token with its predecessor, by how much depends on both; starts at no mixing.
        bonus: read the current token with a weight of its own per channel, and the state as it was before it
            (published RWKV-6); starts at 1. Otherwise the current token is read like every other.
        group_norm: normalise each head's output.
        written_key: `unit` writes a unit-norm key times (1 - decay), `raw` the key as projected times
            (1 - decay), `published` the key as projected.
        backend: of the wkv6 operator: auto, or a name of docs/kernels.md.
    """

    rope: bool = True
    gate: str = "full"
    token_shift: bool = True
    bonus: bool = False
    group_norm: bool = False
    written_key: str = "unit"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_choice("student.mixers.rwkv6.gate", self.gate, GATES)
        check_choice("student.mixers.rwkv6.written_key", self.written_key, WRITTEN_KEYS)
        check_choice("kernel.wkv6", self.backend, ("auto", *(backend.name for backend in BACKENDS)))


class DynamicShift(nn.Module):
    """Token shift whose mix depends on the data (ddlerp, arXiv 2404.05892).

    With x' the token before x, the input of each part z in r, w, k, v, g is
        x_z = x + (x' - x) ⊙ (μ_z + tanh(m A_z) B_z),    m = x + (x' - x) ⊙ μ
    where μ, μ_z and A_z are 0 at the start: x_z = x.

    Args:
        width: D.
    """

    parts = "rwkvg"

    def __init__(self, width: int):
        super().__init__()
        self.common = nn.Parameter(torch.zeros(width))
        rank = 32 if width < 4096 else 64  # as published
        self.mixes = nn.ModuleDict(
            {part: LowRank(width, rank, width, torch.tanh, bias=torch.zeros(width)) for part in self.parts}
        )

    def forward(self, hidden: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """Two times [B,T,D] -> part -> [B,T,D]."""
        change = previous - hidden
        mixed = hidden + change * self.common
        return {part: hidden + change * mix(mixed) for part, mix in self.mixes.items()}


class RWKV6Mixer(RecurrentMixer):
    """Maps hidden states [B,T,D] to [B,T,D] with a state of H·N·N numbers per row instead of keys and values.

        log w = max(-exp(w0 + tanh(x_w A) B), -5) ;  k = k0 ⊙ (1 - w) ;  out = (y ⊙ g) W_o

    Args:
        shape: head counts, biases and norms of the attention that it replaces.
        options: the flavour.
        layer_index: of the decoder layer, from 0.
        layer_count: decoder layers of the model.
        first: makes no difference here.

    Raises:
        ValueError: for a head size that the operator does not have.
    """

    name = "rwkv6"
    operator = "wkv6"
    over_rows, one_token = staticmethod(wkv6), staticmethod(wkv6_step)
    options_class = RWKV6Options

    def __init__(
        self, shape: AttentionShape, options: RWKV6Options, *, layer_index: int, layer_count: int, first: bool
    ):
        super().__init__(shape, options, layer_index)
        width, inner = shape.hidden_size, shape.heads * shape.head_size
        start = decay_bias(inner, layer_index, layer_count)
        self.decay = LowRank(width, rounded_rank(1.8 * width**0.5), inner, torch.tanh, bias=start)
        self.shift = DynamicShift(width) if options.token_shift else None
        self.bonus = nn.Parameter(torch.ones(self.state_count, self.state_size)) if options.bonus else None
        self.add_ending()

    def mix(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        context: SequenceContext,
    ) -> Tensor:
        """As `Mixer.mix`."""
        memory = self.recall(cache, context)
        inputs = dict.fromkeys(DynamicShift.parts, hidden)
        if self.shift is not None:
            last = memory.last_hidden if memory is not None else None
            inputs = self.shift(hidden, previous_token(hidden, context.document_ids, last))
        receptance, key, value = self.project_heads(inputs, positions)
        log_decay = self._log_decay(inputs["w"])
        key = wide(key)
        if self.options.written_key == "unit":
            key = F.normalize(key, dim=-1, eps=1e-6)
        written = self.repeat_kv(key)
        if self.options.written_key != "published":
            written = written * -torch.expm1(log_decay)
        operands = (receptance, log_decay, written, self.repeat_kv(value))
        mixed, state = self.run_operator(operands, memory, context, u=self.bonus)
        self.remember(memory, state, hidden, context, shifts=self.shift is not None)
        return self.finish(mixed, None, inputs["g"])

    def _log_decay(self, hidden: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H,N], from -5 to 0; bounded before the exponential, so that no gradient is 0 x
        infinity."""
        exponent = wide(self.decay(hidden)).clamp(max=math.log(LARGEST_RATE))
        return self.by_state(-exponent.exp())
