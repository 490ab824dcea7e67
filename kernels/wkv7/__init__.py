"""WKV-7, the generalised delta rule of RWKV-7 (arXiv 2503.14456): the one entry, `wkv7`."""

import torch
from torch import Tensor

from kernels.arguments import HEAD_SIZES, check_arguments, unsupported, without_autocast
from kernels.dispatch import Backend, chosen_name
from kernels.segments import token_codes
from kernels.wkv7 import chunked, cpu, reference

__all__ = ["BACKENDS", "HEAD_SIZES", "wkv7"]


def _supports_cpu(device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
    """What the C++ backend cannot do, as a reason, else None (arguments as in kernels/dispatch.py)."""
    return unsupported(device_type, dtype, head_size) or cpu.supports(device_type, dtype)


BACKENDS = (
    Backend("cpu", _supports_cpu, cpu.run, "compiled C++, the fastest on CPU", cpu.library),
    Backend("chunked", unsupported, chunked.run, "matrix products in plain torch, any device and dtype"),
    Backend("reference", unsupported, reference.run, "token by token, the definition"),
)
RUN = {backend.name: backend.run for backend in BACKENDS}


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T ;  y_t = r_t^T S_t, per row and head.

    Args:
        r, log_w, k, v, a, b: [B,T,H,N], N in 32, 64, 128, any T >= 1; log_w is the log of the decay, <= 0.
            float64 throughout, or any mix of float32, bfloat16 and float16 (computed in float32).
        state: [B,H,N_k,N_v] (key-major) float32, float64 when the inputs are; None means zeros. It
            continues into the row's first document.
        document_ids: [B,T] int32 or None. The state is set to zero where the id differs from that of the
            previous real token; -1 marks padding, which leaves the state as it is, gives y = 0 and gets
            zero gradients.
        backend: "auto" or one of "cpu" (C++), "chunked", "reference". A named backend never falls back.

    Returns:
        y [B,T,H,N] in r's dtype, and the state after the last token, dtype as `state`.

    Raises:
        ValueError: wrong shape, dtype, device or backend name. BuildError: the named backend cannot be built.
    """
    inputs = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    dtype = check_arguments("wkv7", inputs, state, document_ids)
    device = r.device.type
    run = RUN[chosen_name("wkv7", backend, device, r.dtype, r.shape[3])]
    if state is None:
        state = torch.zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3], dtype=dtype, device=r.device)
    codes = None if document_ids is None else token_codes(document_ids)
    with without_autocast(device):
        y, state = run(*(x.to(dtype) for x in inputs.values()), state, codes)
    return y.to(r.dtype), state
