"""WKV-6, the gated linear attention of RWKV-6 (arXiv 2404.05892): the one entry, `wkv6`."""

import torch
from torch import Tensor

from kernels.arguments import HEAD_SIZES, check_arguments, check_kind, unsupported, without_autocast
from kernels.dispatch import Backend, chosen_name
from kernels.segments import token_codes
from kernels.wkv6 import chunked, reference

__all__ = ["BACKENDS", "HEAD_SIZES", "wkv6"]
BACKENDS = (
    Backend("chunked", unsupported, chunked.run, "matrix products in plain torch, any device and dtype"),
    Backend("reference", unsupported, reference.run, "token by token, the definition"),
)
RUN = {backend.name: backend.run for backend in BACKENDS}


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
        backend: "auto" or one of "chunked", "reference". A named backend never falls back.

    Returns:
        y [B,T,H,N] in r's dtype, and the state after the last token, dtype as `state`.

    Raises:
        ValueError: wrong shape, dtype, device or backend name.
    """
    inputs = {"r": r, "log_w": log_w, "k": k, "v": v}
    dtype = check_arguments("wkv6", inputs, state, document_ids)
    heads, size = r.shape[2:]
    if u is not None:
        if u.shape != (heads, size):
            raise ValueError(f"wkv6: u must be [H,N] = {(heads, size)}, got {tuple(u.shape)}")
        check_kind("wkv6", "u", u, r)
        u = u.to(dtype)
    device = r.device.type
    run = RUN[chosen_name("wkv6", backend, device, r.dtype, size)]
    if state is None:
        state = torch.zeros(r.shape[0], heads, size, size, dtype=dtype, device=r.device)
    codes = None if document_ids is None else token_codes(document_ids)
    with without_autocast(device):
        y, state = run(*(x.to(dtype) for x in inputs.values()), u, state, codes)
    return y.to(r.dtype), state
