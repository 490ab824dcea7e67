"""WKV-7, the generalised delta rule of RWKV-7 (arXiv 2503.14456): the one entry, `wkv7`."""

from contextlib import nullcontext

import torch
from torch import Tensor

from kernels.dispatch import Backend, chosen_name
from kernels.segments import token_codes
from kernels.wkv7 import chunked, cpu, reference

HEAD_SIZES = (32, 64, 128)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _supports(device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
    """What no backend can do, as a reason, else None (arguments as in kernels/dispatch.py)."""
    if head_size not in HEAD_SIZES:
        return f"head size {head_size} is not one of {HEAD_SIZES}"
    return (
        None if dtype in DTYPES else f"{dtype} is not a floating type of float64, float32, bfloat16, float16"
    )


def _supports_cpu(device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
    """The same for the C++ backend."""
    return _supports(device_type, dtype, head_size) or cpu.supports(device_type, dtype)


BACKENDS = (
    Backend("cpu", _supports_cpu, cpu.run, "compiled C++, the fastest on CPU", cpu.library),
    Backend("chunked", _supports, chunked.run, "matrix products in plain torch, any device and dtype"),
    Backend("reference", _supports, reference.run, "token by token, the definition"),
)
RUN = {backend.name: backend.run for backend in BACKENDS}


def _check(inputs: dict[str, Tensor], state: Tensor | None, document_ids: Tensor | None) -> torch.dtype:
    """Refuse wrong shapes, dtypes and devices; returns the dtype to compute in (float64 or float32)."""
    r = inputs["r"]
    if r.dim() != 4 or r.shape[3] not in HEAD_SIZES or 0 in r.shape:
        raise ValueError(
            f"wkv7: r must be [B,T,H,N], none empty, head size N in {HEAD_SIZES}; got {tuple(r.shape)}"
        )
    double = r.dtype == torch.float64
    for name, x in inputs.items():
        if x.shape != r.shape:
            raise ValueError(
                f"wkv7: {name} has shape {tuple(x.shape)} where r has {tuple(r.shape)}; they must agree"
            )
        if x.device != r.device:
            raise ValueError(f"wkv7: {name} is on {x.device} and r on {r.device}; move them to one device")
        if x.dtype not in DTYPES or (x.dtype == torch.float64) != double:
            raise ValueError(
                f"wkv7: {name} is {x.dtype} and r {r.dtype}; use float64 for all, or float32/bf16/fp16"
            )
    batch, tokens, heads, size = r.shape
    dtype = torch.float64 if double else torch.float32
    if state is not None:
        if state.shape != (batch, heads, size, size):
            expected = (batch, heads, size, size)
            raise ValueError(f"wkv7: state must be [B,H,N_k,N_v] = {expected}, got {tuple(state.shape)}")
        if state.dtype != dtype or state.device != r.device:
            raise ValueError(
                f"wkv7: state must be {dtype} on {r.device}, got {state.dtype} on {state.device}"
            )
    if document_ids is not None:
        if document_ids.shape != (batch, tokens):
            raise ValueError(
                f"wkv7: document_ids must be [B,T] = {(batch, tokens)}, got {tuple(document_ids.shape)}"
            )
        if document_ids.dtype not in (torch.int32, torch.int64) or document_ids.device != r.device:
            raise ValueError(f"wkv7: document_ids must be int32 on {r.device}, got {document_ids.dtype}")
    return dtype


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
    dtype = _check(inputs, state, document_ids)
    device = r.device.type
    run = RUN[chosen_name("wkv7", backend, device, r.dtype, r.shape[3])]
    if state is None:
        state = torch.zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3], dtype=dtype, device=r.device)
    codes = None if document_ids is None else token_codes(document_ids)
    # Inside autocast the matrix products of the torch backends would silently run in 16 bits.
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        y, state = run(*(x.to(dtype) for x in inputs.values()), state, codes)
    return y.to(r.dtype), state
