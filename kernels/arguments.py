"""What every recurrent operator accepts: the checks of its arguments, and the precision that it computes in.

Shape letters: B rows, T tokens, H heads, N head size.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels.case import DTYPES, HEAD_SIZES


def check_arguments(
    operator: str, inputs: dict[str, Tensor], state: Tensor | None, document_ids: Tensor | None
) -> torch.dtype:
    """Refuses wrong shapes, dtypes and devices.

    Args:
        operator: its name, for the message.
        inputs: by name, `r` among them; all [B,T,H,N].
        state: [B,H,N,N] or None.
        document_ids: [B,T] or None.

    Returns:
        The dtype to compute in: float64 where the inputs are, else float32.

    Raises:
        ValueError: naming the argument.
    """
    r = inputs["r"]
    if r.dim() != 4 or r.shape[3] not in HEAD_SIZES or 0 in r.shape:
        raise ValueError(
            f"{operator}: r must be [B,T,H,N], none empty, head size N in {HEAD_SIZES}; got {tuple(r.shape)}"
        )
    for name, x in inputs.items():
        if x.shape != r.shape:
            raise ValueError(
                f"{operator}: {name} has shape {tuple(x.shape)} where r has {tuple(r.shape)}; they must agree"
            )
        check_kind(operator, name, x, r)
    batch, tokens, heads, size = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is not None:
        expected = (batch, heads, size, size)
        if state.shape != expected:
            raise ValueError(
                f"{operator}: state must be [B,H,N_k,N_v] = {expected}, got {tuple(state.shape)}"
            )
        if state.dtype != dtype or state.device != r.device:
            raise ValueError(
                f"{operator}: state must be {dtype} on {r.device}, got {state.dtype} on {state.device}"
            )
    if document_ids is not None:
        if document_ids.shape != (batch, tokens):
            raise ValueError(
                f"{operator}: document_ids must be [B,T] = {(batch, tokens)}, got {tuple(document_ids.shape)}"
            )
        if document_ids.dtype not in (torch.int32, torch.int64) or document_ids.device != r.device:
            raise ValueError(
                f"{operator}: document_ids must be int32 on {r.device}, got {document_ids.dtype}"
            )
    return dtype


def check_kind(operator: str, name: str, x: Tensor, r: Tensor, first: str = "r") -> None:
    """Refuses an input on another device than `r`, which is called `first`, or of a dtype that cannot be
    mixed with its own."""
    if x.device != r.device:
        raise ValueError(
            f"{operator}: {name} is on {x.device} and {first} on {r.device}; move them to one device"
        )
    if x.dtype not in DTYPES or (x.dtype == torch.float64) != (r.dtype == torch.float64):
        raise ValueError(
            f"{operator}: {name} is {x.dtype} and {first} {r.dtype}; use float64 for all, or "
            "float32/bf16/fp16"
        )


def without_autocast(device_type: str) -> AbstractContextManager:
    """Inside autocast the matrix products of plain torch would silently run in 16 bits; here they do not."""
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if autocast else nullcontext()


def as_taken(inputs: dict[str, Tensor], native: bool, dtype: torch.dtype) -> list[Tensor]:
    """The inputs in the dtypes that a backend takes them in.

    Args:
        inputs: by name.
        native: whether it takes 16-bit inputs as they are; log_w is float32 for it all the same.
        dtype: to compute in.
    """
    kinds = {x.dtype for name, x in inputs.items() if name != "log_w"}
    alike = len(kinds) == 1 and native
    return [x if alike and name != "log_w" else x.to(dtype) for name, x in inputs.items()]


def check_step(operator: str, inputs: dict[str, Tensor], state: Tensor, codes: Tensor | None) -> torch.dtype:
    """Refuses wrong arguments of one decoding step.

    Args:
        operator: its name, for the message.
        inputs: by name, `r` among them; all [B,H,N].
        state: [B,H,N,N], contiguous: it is changed in place.
        codes: [B] int8 (kernels.segments) or None.

    Returns:
        The dtype to compute in: float64 where the inputs are, else float32.

    Raises:
        ValueError: naming the argument.
    """
    if inputs["r"].dim() != 3:
        raise ValueError(f"{operator}_step: r must be [B,H,N], got {tuple(inputs['r'].shape)}")
    dtype = check_arguments(f"{operator}_step", {n: x[:, None] for n, x in inputs.items()}, state, None)
    if not state.is_contiguous():
        raise ValueError(f"{operator}_step: state is changed in place and must be contiguous")
    if codes is not None and (codes.shape != inputs["r"].shape[:1] or codes.dtype != torch.int8):
        raise ValueError(f"{operator}_step: codes must be int8 [B], got {codes.dtype} {tuple(codes.shape)}")
    return dtype
