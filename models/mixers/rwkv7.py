"""RWKV-7 time mixing in the place of attention: the RADLADS flavour (arXiv 2505.03005), and the ARWKV one
(2501.15570).

Shape letters: B rows, T tokens, D hidden width, H heads, G key/value heads, N head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache

from kernels import fused
from kernels.wkv7 import BACKENDS, wkv7, wkv7_step
from models.backbone import SequenceContext
from models.mixers.base import AttentionShape, wide
from models.mixers.heads import GATES, RecurrentMixer, check_choice, decay_bias
from models.mixers.induction_bank import FEATURES, InductionBank
from models.mixers.low_rank import LowRank, rounded_rank
from models.mixers.token_shift import previous_token
from models.sequence_state import RecurrentCacheLayer

WRITTEN_KEYS = ("unit", "raw")


@dataclass(frozen=True, kw_only=True)
class RWKV7Options:
    """The flavour of the mixer. The defaults are RADLADS; ARWKV is token_shift, bonus, group_norm,
    written_key=raw.

    Args:
        rope: rotate receptance and key as the teacher rotates query and key.
        gate: `none`, `low` rank or `full` rank; starts at exactly 1 everywhere, so the transferred output
            path is whole.
        value_residual: later layers mix in the first RWKV layer's value.
        token_shift: mix each token with its predecessor; starts at no mixing.
        bonus: extra weight on the current token; starts at 0.
        group_norm: normalise each head's output.
        written_key: `unit` writes a unit-norm key times (1 - decay + rate), so that what is removed is added
            back; `raw` is the published RWKV-7 form with learned key scales.
        rate_range: the in-context learning rate lies in (0, rate_range); 2 allows negative eigenvalues.
        grouped_kv: query heads share keys and values as the teacher's do; otherwise each has its own copy,
            and a state of its own to fill.
        induction_layers: layers with a bank of heads of their own that find what followed an earlier
            occurrence of the current token (mixers/induction_bank.py); stage `calibrate` adds those where the
            teacher does that, and starts their banks.
        induction_heads: heads of such a bank, of size 128; how many tokens it tells apart grows with them,
            and so does its state.
        induction_features: a bank's keys are the `cosine` of projected hidden states, or these (`linear`),
            where heads beyond hidden size / 128 add nothing.
        backend: of the wkv7 operator: auto, or a name of docs/kernels.md; `triton` also fuses what
            stands around it (kernels/fused).
    """

    rope: bool = True
    gate: str = "low"
    value_residual: bool = False
    token_shift: bool = False
    bonus: bool = False
    group_norm: bool = False
    written_key: str = "unit"
    rate_range: float = 1.0
    grouped_kv: bool = True
    induction_layers: Sequence[int] = ()
    induction_heads: int = 16
    induction_features: str = "cosine"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_choice("student.mixers.rwkv7.gate", self.gate, GATES)
        check_choice("student.mixers.rwkv7.written_key", self.written_key, WRITTEN_KEYS)
        check_choice("student.mixers.rwkv7.induction_features", self.induction_features, FEATURES)
        check_choice("kernel.wkv7", self.backend, ("auto", *(backend.name for backend in BACKENDS)))
        if not 0 < self.rate_range <= 2:
            raise ValueError(f"student.mixers.rwkv7.rate_range={self.rate_range} must lie in (0, 2].")
        object.__setattr__(self, "induction_layers", tuple(self.induction_layers))  # a file gives a list
        if self.induction_heads < 1:
            raise ValueError(
                f"student.mixers.rwkv7.induction_heads={self.induction_heads} must be at least 1; leave "
                "layers out of induction_layers instead."
            )


class RWKV7Mixer(RecurrentMixer):
    """Maps hidden states [B,T,D] to [B,T,D] with a state of H·N·N numbers per row instead of keys and values.

    Args:
        shape: head counts, biases and norms of the attention that it replaces.
        options: the flavour.
        layer_index: of the decoder layer, from 0.
        layer_count: decoder layers of the model.
        first: whether it is the first RWKV layer, whose value others may mix in.

    Raises:
        ValueError: for a head size that the operator does not have.
    """

    name = "rwkv7"
    operator = "wkv7"
    over_rows, one_token = staticmethod(wkv7), staticmethod(wkv7_step)
    options_class = RWKV7Options

    def __init__(
        self, shape: AttentionShape, options: RWKV7Options, *, layer_index: int, layer_count: int, first: bool
    ):
        super().__init__(shape, options, layer_index, None if options.grouped_kv else shape.heads)
        width, inner = shape.hidden_size, shape.heads * shape.head_size
        kv_inner = self.kv_heads * shape.head_size
        rank = rounded_rank(1.8 * width**0.5)
        start = decay_bias(inner, layer_index, layer_count)
        self.decay = LowRank(width, rank, inner, torch.tanh, bias=start)
        self.rate = LowRank(width, rank, inner, None, bias=torch.zeros(inner))
        mixes = options.value_residual and not first
        value_rank = rounded_rank(1.3 * width**0.5)
        # The bias -4 lets 2 % of the first value through at the start.
        self.residual = (
            LowRank(width, value_rank, kv_inner, None, bias=torch.full((kv_inner,), -4.0)) if mixes else None
        )
        self.add_ending()
        self.shift_mix = nn.Parameter(torch.zeros(6, width)) if options.token_shift else None
        self.bonus = nn.Parameter(torch.zeros(self.state_count, self.state_size)) if options.bonus else None
        raw = options.written_key == "raw"
        self.removed_key_scale = (
            nn.Parameter(torch.full((self.state_count, self.state_size), 0.85)) if raw else None
        )
        self.written_key_mix = nn.Parameter(torch.ones(self.state_count, self.state_size)) if raw else None
        self.induction = (
            InductionBank(width, options.induction_heads, options.induction_features, options.backend)
            if layer_index in options.induction_layers
            else None
        )

    def become_first(self) -> None:
        """Drops the value residual: this layer's value is now the first."""
        self.residual = None

    def drawn(self) -> None:
        """A token shift begins with as much of the token before as of the token itself."""
        if self.shift_mix is not None:
            self.shift_mix.fill_(0.5)

    def mix(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        context: SequenceContext,
    ) -> Tensor:
        """As `Mixer.mix`."""
        memory = self.recall(cache, context)
        inputs = self._inputs(hidden, context, memory)
        receptance, key, value = self.project_heads(inputs, positions)
        value = self._mix_first_value(value, inputs["v"], context)
        value = self.repeat_kv(value)
        if self.state_count > self.shape.heads:  # `prepare` repeats keys, but not those of divided heads
            key = self.repeat_kv(key)
        log_decay, written, a, b = fused.prepare(
            self.by_state(wide(self.decay(inputs["w"]))),
            self.by_state(wide(self.rate(inputs["a"]))),
            key,
            rate_range=self.options.rate_range,
            removed_scale=self.removed_key_scale,
            written_mix=self.written_key_mix,
            backend=self.elementwise,
        )
        operands = (receptance, log_decay, written, value, a, b)
        mixed, state = self.run_operator(operands, memory, context)
        self.remember(memory, state, hidden, context, shifts=self.shift_mix is not None)
        bonus = None if self.bonus is None else (receptance, written, value, self.bonus)
        output = self.finish(mixed, bonus, inputs["g"])
        if self.induction is None:
            return output
        return output + self.induction(hidden, context, memory, self.elementwise)

    def _inputs(
        self, hidden: Tensor, context: SequenceContext, memory: RecurrentCacheLayer | None
    ) -> dict[str, Tensor]:
        """What each projection reads: the hidden state, mixed with its predecessor's if there is a token
        shift."""
        names = "rwkvag"
        if self.shift_mix is None:
            return dict.fromkeys(names, hidden)
        last = memory.last_hidden if memory is not None else None
        previous = previous_token(hidden, context.document_ids, last)
        mixed = fused.shift(hidden, previous, self.shift_mix, backend=self.elementwise)
        return dict(zip(names, mixed, strict=True))

    def _mix_first_value(self, value: Tensor, hidden: Tensor, context: SequenceContext) -> Tensor:
        """Adds the first RWKV layer's value, where the layer has a value residual."""
        if context.first_value is None:
            context.first_value = value
        if self.residual is None:
            return value
        first = context.first_value.detach() if context.local_gradients else context.first_value
        return value + (first - value) * self.by_state(torch.sigmoid(self.residual(hidden)))
