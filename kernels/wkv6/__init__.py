"""WKV-6, the gated linear attention of RWKV-6 (arXiv 2404.05892): the one entry, `wkv6`."""

import torch
from torch import Tensor

from kernels.arguments import (
    as_taken,
    check_arguments,
    check_kind,
    check_step,
    without_autocast,
)
from kernels.case import HEAD_SIZES, MANY_UNITS, anything
from kernels.dispatch import Backend, chosen_name
from kernels.segments import token_codes
from kernels.wkv6 import chunked, cpu, cuda, fla, reference, triton

__all__ = ["BACKENDS", "HEAD_SIZES", "wkv6", "wkv6_step"]
BACKENDS = (
    Backend(
        "cuda",
        cuda.supports,
        cuda.run,
        "one scan forward and two backward, checked on this device before first use",
        cuda.prepare,
        native=True,
        step=cuda.step,
    ),
    Backend(
        "triton",
        triton.supports,
        triton.run,
        "chunks as matrix products on tensor cores",
        triton.prepare,
        native=True,
        held_back=triton.HELD_BACK,
        step=triton.step,
    ),
    Backend(
        "fla",
        fla.supports,
        fla.run,
        "flash-linear-attention's chunked Triton kernels",
        fla.prepare,
        native=True,
        held_back=fla.HELD_BACK,
    ),
    Backend("cpu", cpu.supports, cpu.run, "compiled C++, the fastest on CPU", cpu.prepare, step=cpu.step),
    Backend(
        "chunked",
        anything,
        chunked.run,
        "matrix products in plain torch, any device and dtype",
        step=reference.step,
    ),
    Backend("reference", anything, reference.run, "token by token, the definition", step=reference.step),
)
TABLE = {backend.name: backend for backend in BACKENDS}


def wkv6(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    u: Tensor | None = None,
    state: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = diag(w_t) S_{t-1} + k_t v_t^T, per row and head, read by r.

    Without u the current token is read like every other (RAD-RWKV6, arXiv 2505.03005): y_t = r_t^T S_t. With
    u it is read through a bonus (as published): y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T).

    Args:
        r, log_w, k, v: [B,T,H,N], N in 32, 64, 128, any T >= 1; log_w is the log of the decay, <= 0, minus
            infinity included. float64 throughout, or any mix of float32, bfloat16 and float16 (computed in
            float32).
        u: [H,N] or None.
        state: [B,H,N_k,N_v] (key-major) float32, float64 when the inputs are; None means zeros. It
            continues into the row's first document.
        document_ids: [B,T] int32 or None. The state is set to zero where the id differs from that of the
            previous real token; -1 marks padding, which leaves the state as it is, gives y = 0 and gets
            zero gradients.
        backend: "auto" or one of "cuda" (CUDA and HIP), "triton", "fla" (flash-linear-attention), "cpu"
            (C++), "chunked", "reference". A named backend never falls back.

    Returns:
        y [B,T,H,N] in r's dtype, and the state after the last token, dtype as `state`.

    Raises:
        ValueError: wrong shape, dtype, device or backend name.
    """
    inputs = {"r": r, "log_w": log_w, "k": k, "v": v}
    dtype = check_arguments("wkv6", inputs, state, document_ids)
    batch, _, heads, size = r.shape
    u = _checked_bonus(u, r, dtype)
    device = r.device.type
    chosen = TABLE[chosen_name("wkv6", backend, device, r.dtype, size, batch * heads >= MANY_UNITS)]
    if state is None:
        state = torch.zeros(batch, heads, size, size, dtype=dtype, device=r.device)
    codes = None if document_ids is None else token_codes(document_ids)
    with without_autocast(device):
        y, state = chosen.run(*as_taken(inputs, chosen.native, dtype), u, state, codes)
    return y.to(r.dtype), state


def wkv6_step(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    u: Tensor | None = None,
    codes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of every row, as `wkv6` with T = 1, without gradients: `state` is changed in place.

    Args:
        r, log_w, k, v: [B,H,N]; dtypes as for `wkv6`.
        state: [B,H,N_k,N_v] as for `wkv6`, contiguous.
        u: [H,N] or None.
        codes: [B] int8 (kernels.segments): 1 clears the row's state first, 2 is padding; None where all are
            0.
        backend: "auto" or a name, as for `wkv6`.

    Returns:
        y [B,H,N] in r's dtype.

    Raises:
        ValueError, BuildError: as `wkv6`.
    """
    inputs = {"r": r, "log_w": log_w, "k": k, "v": v}
    dtype = check_step("wkv6", inputs, state, codes)
    batch, heads, size = r.shape
    u = _checked_bonus(u, r, dtype)
    device = r.device.type
    many = batch * heads >= MANY_UNITS
    chosen = TABLE[chosen_name("wkv6", backend, device, r.dtype, size, many, step=True)]
    with torch.no_grad(), without_autocast(device):
        return chosen.step(*as_taken(inputs, chosen.native, dtype), u, state, codes).to(r.dtype)


def _checked_bonus(u: Tensor | None, r: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The bonus in the dtype to compute in; ValueError where it does not fit r [...,H,N]."""
    if u is None:
        return None
    if u.shape != r.shape[-2:]:
        raise ValueError(f"wkv6: u must be [H,N] = {tuple(r.shape[-2:])}, got {tuple(u.shape)}")
    check_kind("wkv6", "u", u, r)
    return u.to(dtype)
