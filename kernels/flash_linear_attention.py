"""What the two adapters of flash-linear-attention (the package fla-core, optional) share.

Its operators take the log of the decay and states [N,H,K,V] like ours, but documents as one row of sequences
without padding, each with a state of its own. They multiply matrices in 16 bits or TF32, and take finite log
decays only.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.case import Case
from kernels.jit_build import BuildError
from kernels.segments import PADDING, RESET
from kernels.self_check import verify

HELD_BACK = "a peer for comparison; not run by this project on a GPU yet"


def supports(case: Case) -> str | None:
    """Why flash-linear-attention cannot run a case, or None."""
    if case.device_type != "cuda":
        return f"flash-linear-attention runs on GPUs, not on {case.device_type}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return (
            f"flash-linear-attention rounds its matrix products to 16 bits or TF32, which {case.dtype} is not"
        )
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install 'fla-core[cuda]>=0.6')"
    return None


def prepare(op: str, run: Callable, case: Case) -> None:
    """Import the package and hold `run` against the definition; raises BuildError."""
    try:
        importlib.import_module("fla.ops")
    except (ImportError, RuntimeError) as error:
        raise BuildError(
            f"flash-linear-attention cannot be imported: {error}; choose another backend"
        ) from error
    verify(op, "fla", run, case, "16-bit", native=True)


def by_document(
    operator: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    state: Tensor,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Hand rows with documents and padding to an operator that takes sequences laid end to end.

    Args:
        operator: (*inputs [1,M,H,N], initial_state [S,H,N,N], cu_seqlens [S+1] int64) -> y [1,M,H,N] and the
            states [S,H,N,N] after each of the S sequences. Without codes: inputs [B,T,H,N], a state per row,
            cu_seqlens None.
        inputs: [B,T,H,N] each.
        state: [B,H,N,N].
        codes: [B,T] int8 (kernels.segments) or None.

    Returns:
        y [B,T,H,N] and the state [B,H,N,N] after each row's last token.
    """
    if codes is None:
        return operator(*inputs, initial_state=state, cu_seqlens=None)
    batch, tokens = codes.shape
    real = (codes != PADDING).flatten().nonzero().squeeze(1)
    blank = inputs[0].new_zeros(batch * tokens, *inputs[0].shape[2:])
    if len(real) == 0:
        return blank.unflatten(0, (batch, tokens)), state
    row = real // tokens
    opens_row = torch.ones_like(row, dtype=torch.bool)
    opens_row[1:] = row[1:] != row[:-1]
    begins = (opens_row | (codes.flatten()[real] == RESET)).nonzero().squeeze(1)
    bounds = torch.cat([begins, begins.new_tensor([len(real)])])
    owner = row[begins]
    continues = opens_row[begins][:, None, None, None]
    closes_row = torch.ones_like(owner, dtype=torch.bool)
    closes_row[:-1] = owner[1:] != owner[:-1]
    y, states = operator(
        *(x.flatten(0, 1)[real][None] for x in inputs),
        initial_state=torch.where(continues, state[owner], 0),
        cu_seqlens=bounds,
    )
    y = blank.index_copy(0, real, y[0]).unflatten(0, (batch, tokens))
    return y, state.index_copy(0, owner[closes_row], states[closes_row])
