"""Heads beside a mixer's own that find what followed an earlier occurrence of the current token.

An induction head (arXiv 2209.11895) looks for what followed an earlier occurrence of the current token.
Softmax does that with queries and keys that hardly resemble each other, because it can be sharp; a linear
read cannot. So these heads look in a plainer way: each token is stored under its predecessor's key, and
receptance and key are the same features of the hidden state. Read with the current token, the state answers
with what came after its like.

How many tokens it can tell apart grows with the directions that keys have. A projection has at most D of
them, however many heads share it; its cosine has as many as there are heads and channels, and the products
of two such keys approach a Gaussian kernel of the hidden states (random Fourier features, Rahimi and Recht,
2007). The head size is the largest that the operator has: the delta rule keeps the keys of one head apart.

Shape letters: B rows, T tokens, D hidden width, M heads, N head size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import fused
from kernels.wkv7 import wkv7, wkv7_step
from models.backbone import SequenceContext
from models.mixers.base import wide
from models.mixers.low_rank import LowRank, rounded_rank
from models.mixers.operator_call import run_operator
from models.mixers.token_shift import last_token, previous_token
from models.sequence_state import RecurrentCacheLayer

HEAD_SIZE = 128
START_RATE = 0.2  # in-context learning rate: old tokens must survive the writing of new ones
START_DECAY = -8.2  # bias; half of a token is left after 4,000 others


class Features(NamedTuple):
    """What keys are of projected hidden states: a function, and its period (radians; 0 where it has none)."""

    of: Callable[[Tensor], Tensor]
    turn: float


FEATURES = {"cosine": Features(torch.cos, 2 * math.pi), "linear": Features(torch.positive, 0.0)}


class InductionBank(nn.Module):
    """Maps hidden states [B,T,D] to [B,T,D] with a state of M·N·N numbers per row; 0 at the start.

    Args:
        width: D.
        heads: M.
        features: of FEATURES, what a key is of the projected hidden state.
        backend: of the wkv7 operator.
    """

    def __init__(self, width: int, heads: int, features: str, backend: str):
        super().__init__()
        inner, rank = heads * HEAD_SIZE, rounded_rank(1.8 * width**0.5)
        (self.features, self.turn), self.backend = FEATURES[features], backend
        self.match, self.value = nn.Linear(width, inner), nn.Linear(width, inner)
        self.output = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.output.weight)
        rate = torch.logit(torch.full((inner,), START_RATE))
        self.decay = LowRank(width, rank, inner, torch.tanh, bias=torch.full((inner,), START_DECAY))
        self.rate = LowRank(width, rank, inner, None, bias=rate)

    def forward(
        self, hidden: Tensor, context: SequenceContext, memory: RecurrentCacheLayer | None, elementwise: str
    ) -> Tensor:
        """What the heads add to the mixer's output.

        Args:
            hidden: [B,T,D].
            context: documents and padding of the row.
            memory: decoding state of the layer, read and advanced; None where nothing is decoded.
            elementwise: backend of what stands around the operator.
        """
        match, ids = self.features(wide(self.match(hidden))), context.document_ids
        last = None if memory is None else memory.last_match
        log_decay, written, a, b = fused.prepare(
            _split(wide(self.decay(hidden))),
            _split(wide(self.rate(hidden))),
            _split(previous_token(match, ids, last)),
            backend=elementwise,
        )
        receptance = F.normalize(_split(match), dim=-1)
        operands = (receptance, log_decay, written, _split(self.value(hidden)), a, b)
        state = None if memory is None else memory.bank_state
        mixed, state = run_operator(wkv7, wkv7_step, operands, state, ids, self.backend)
        if memory is not None:
            memory.bank_state, memory.last_match = state, last_token(match, ids, last)
        return self.output(mixed.flatten(2).to(self.output.weight.dtype))


def _split(flat: Tensor) -> Tensor:
    """[B,T,M·N] -> [B,T,M,N]."""
    return flat.unflatten(-1, (-1, HEAD_SIZE))
