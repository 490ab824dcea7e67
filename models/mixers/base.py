"""What every mixer is: a module that stands where the teacher has its attention.

Shape letters: B rows, T tokens, D hidden width, H heads, G key/value heads, N head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache

from models.backbone import SequenceContext


@dataclass(frozen=True)
class AttentionShape:
    """The attention that a mixer replaces, as far as a mixer must know it.

    Args:
        hidden_size: D.
        heads, kv_heads, head_size: H, G, N; G divides H.
        query_bias, key_bias, value_bias, output_bias: which projections have biases.
        query_norm, key_norm: whether queries and keys go through an RMSNorm before they are rotated.
        norm_eps: its epsilon.
        norm_scope: `head`, one norm over N for each head, or `width`, one norm over all heads.
        norm_offset: what is added to its weight.
        read_scale: factor of q · k before the softmax; None means N^-1/2.
        rotated: whether queries and keys are rotated at all.
        rotation: which channels turn together: `half` or `interleaved` (mixers/heads.py).
        window: last tokens that a token sees, itself among them; None means all.
        score_cap: c, where scores s enter the softmax as c tanh(s / c); None means as they are.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    query_bias: bool = False
    key_bias: bool = False
    value_bias: bool = False
    output_bias: bool = False
    query_norm: bool = False
    key_norm: bool = False
    norm_eps: float = 1e-6
    norm_scope: str = "head"
    norm_offset: float = 0.0
    read_scale: float | None = None
    rotated: bool = True
    rotation: str = "half"
    window: int | None = None
    score_cap: float | None = None


def wide(tensor: Tensor) -> Tensor:
    """In float32, or as it is where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Mixer(nn.Module):
    """Base of all mixers; `student_mixers` finds them by this class.

    A new one implements `mix`. Its projections `receptance`, `key`, `value`, `output` and the norms
    `receptance_norm`, `key_norm` receive the teacher's weights.
    """

    name: ClassVar[str]  # as layer plans call it
    operator: ClassVar[str | None] = None  # of kernels/, that it runs on; its options then have `backend`
    options_class: ClassVar[type[Any]]
    head_sizes: ClassVar[range]
    layer_index: int

    @classmethod
    def check_head_size(cls, size: int) -> None:
        """Refuses a teacher's head size that the mixer does not have."""
        if size not in cls.head_sizes:
            raise ValueError(
                f"student.layer_plan: {cls.name} needs a head size up to {cls.head_sizes[-1]} that is a "
                f"multiple of {cls.head_sizes.step}; the teacher has {size}. Keep attention in its layers."
            )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        sequence_context: SequenceContext | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """What a decoder layer calls, by keyword, in the place of attention.

        Args:
            hidden_states: [B,T,D], the teacher layer's normalised input.
            position_embeddings: cosine and sine [B or 1,T,N].
            past_key_values: decoding cache; read and advanced.
            sequence_context: documents and padding of the row, and the first RWKV layer's value.

        Returns:
            [B,T,D] and None (in the place of attention weights).
        """
        context = sequence_context or SequenceContext()
        return self.mix(hidden_states, position_embeddings, past_key_values, context), None

    def mix(
        self,
        hidden: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        context: SequenceContext,
    ) -> Tensor:
        """Mixes along the row: [B,T,D] -> [B,T,D]; arguments as in `forward`."""
        raise NotImplementedError

    def drawn(self) -> None:
        """Called when the projections have been drawn at random: what else belongs to such a start."""

    @property
    def operator_heads(self) -> tuple[int, int]:
        """How many heads its operator is given for each row, and their size."""
        raise NotImplementedError

    def become_first(self) -> None:
        """Drops what only a later mixer has, because the mixers before it have gone."""
