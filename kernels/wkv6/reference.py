"""WKV-6, one token at a time in plain torch: the definition every other backend is judged against."""

import torch
from torch import Tensor

from kernels.segments import RESET, blank_padding


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of RWKV-6 (arXiv 2404.05892) token by token; autograd gives the gradients.

    Args:
        r, log_w, k, v: [B,T,H,N], all of one dtype (float32 or float64).
        u: [H,N] of the same dtype, or None.
        state: [B,H,N_k,N_v] of the same dtype.
        codes: [B,T] int8 (kernels.segments) or None.

    Returns:
        y [B,T,H,N] and the state after the last token.
    """
    r, log_w, k, v = blank_padding(codes, r, log_w, k, v)
    resets = None if codes is None else (codes == RESET)[:, :, None, None, None].unbind(1)
    rows = [x.unsqueeze(-2).unbind(1) for x in (r, v)]  # [B,H,1,N] each; unbind keeps autograd linear in T
    columns = [x.unsqueeze(-1).unbind(1) for x in (log_w.exp(), k)]  # [B,H,N,1]
    outputs = []
    for t, (r_t, v_t, w_t, k_t) in enumerate(zip(*rows, *columns, strict=True)):
        if resets is not None:
            state = state.masked_fill(resets[t], 0)
        before, added = state, k_t * v_t
        state = w_t * before + added
        outputs.append(r_t @ (state if u is None else before + u.unsqueeze(-1) * added))
    return torch.cat(outputs, dim=-2).transpose(1, 2), state


def step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor | None, state: Tensor, codes: Tensor | None
) -> Tensor:
    """One token of every row, `state` [B,H,N_k,N_v] changed in place.

    Args:
        r, log_w, k, v: [B,H,N] in the state's dtype.
        u: [H,N] or None.
        state: as in `run`, contiguous.
        codes: [B] int8 (kernels.segments) or None.

    Returns:
        y [B,H,N].
    """
    y, after = run(
        *(x[:, None] for x in (r, log_w, k, v)), u, state, None if codes is None else codes[:, None]
    )
    state.copy_(after)
    return y[:, 0]
