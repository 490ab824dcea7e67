"""One way to call a recurrent operator, over rows of tokens or for one more token of each.

Shape letters: B rows, T tokens, H heads, N head size, P the head size of the operator.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.case import HEAD_SIZES
from kernels.segments import token_codes
from models.sequence_state import writable


def operator_size(size: int) -> int:
    """P for a head size N: the smallest that the operators have, and that it fits into."""
    return next(known for known in HEAD_SIZES if known >= size)


def run_operator(
    over_rows: Callable[..., tuple[Tensor, Tensor]],
    one_token: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    state: Tensor | None,
    document_ids: Tensor | None,
    backend: str,
    **bonus: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator over the row; for one more token of a text, in place on the decoding state.

    Heads whose size the operator does not have are filled up with zeros, which change nothing.

    Args:
        over_rows: such as kernels.wkv7.wkv7.
        one_token: the same for one token of each row, with the state changed in place.
        inputs: r, log_w, k, v, ... of the operator, [B,T,H,N]. Where v has 16 bits, all but log_w are rounded
            to them: kernels then move half the memory, and sum up in float32 all the same.
        state: [B,H,P,P] before the call, or None.
        document_ids: [B,T] or None.
        backend: of the operator.
        bonus: arguments that have no tokens, [H,N].

    Returns:
        [B,T,H,N] and the state after the call.
    """
    size = inputs[0].shape[-1]
    if empty := operator_size(size) - size:
        inputs = [F.pad(x, (0, empty)) for x in inputs]
        bonus = {name: x if x is None else F.pad(x, (0, empty)) for name, x in bonus.items()}
        filled, state = run_operator(over_rows, one_token, inputs, state, document_ids, backend, **bonus)
        return filled[..., :size], state
    r, log_w, k, v, *more = inputs
    inputs = (r.to(v.dtype), log_w, k.to(v.dtype), v, *(x.to(v.dtype) for x in more))
    if state is None or v.shape[1] > 1 or torch.is_grad_enabled() or not writable(state):
        return over_rows(*inputs, state=state, document_ids=document_ids, backend=backend, **bonus)
    codes = None if document_ids is None else token_codes(document_ids)[:, 0]
    now = (x[:, 0] for x in inputs)
    return one_token(*now, state, codes=codes, backend=backend, **bonus)[:, None], state
