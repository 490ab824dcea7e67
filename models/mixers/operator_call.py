"""One way to call a recurrent operator, over rows of tokens or for one more token of each.

Shape letters: B rows, T tokens, H heads, N head size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.segments import token_codes
from models.sequence_state import writable


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

    Args:
        over_rows: such as kernels.wkv7.wkv7.
        one_token: the same for one token of each row, with the state changed in place.
        inputs: r, log_w, k, v, ... of the operator, [B,T,H,N]. Where v has 16 bits, all but log_w are rounded
            to them: kernels then move half the memory, and sum up in float32 all the same.
        state: [B,H,N,N] before the call, or None.
        document_ids: [B,T] or None.
        backend: of the operator.
        bonus: arguments that have no tokens.

    Returns:
        [B,T,H,N] and the state after the call.
    """
    r, log_w, k, v, *more = inputs
    inputs = (r.to(v.dtype), log_w, k.to(v.dtype), v, *(x.to(v.dtype) for x in more))
    if state is None or v.shape[1] > 1 or torch.is_grad_enabled() or not writable(state):
        return over_rows(*inputs, state=state, document_ids=document_ids, backend=backend, **bonus)
    codes = None if document_ids is None else token_codes(document_ids)[:, 0]
    now = (x[:, 0] for x in inputs)
    return one_token(*now, state, codes=codes, backend=backend, **bonus)[:, None], state
