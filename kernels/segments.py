"""Turns document ids into the per-token codes every recurrent backend understands."""

import torch
from torch import Tensor

NORMAL, RESET, PADDING = 0, 1, 2


def token_codes(document_ids: Tensor) -> Tensor:
    """Say for every token whether it continues a document, starts a new one, or is padding.

    Args:
        document_ids: [B,T] integers; the document of each token, negative where the token is padding.

    Returns:
        [B,T] int8: RESET where the id differs from that of the previous real token of the row (never at the
        row's first real token, which continues whatever state the caller passed), PADDING at negative ids,
        else NORMAL.
    """
    if document_ids.shape[1] == 1:  # decoding: nothing to reset, and every operation counts
        return (document_ids < 0).to(torch.int8) * PADDING
    real = document_ids >= 0
    positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    last_real = torch.where(real, positions, -1).cummax(dim=1).values
    previous = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    previous_id = document_ids.gather(1, previous.clamp(min=0))
    reset = real & (previous >= 0) & (document_ids != previous_id)
    return torch.where(real, reset.to(torch.int8), PADDING).to(torch.int8)


def blank_padding(codes: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Zero the padding tokens of inputs [B,T,H,N] (codes [B,T] int8 or None).

    A token whose every input is zero (log decay included) leaves the state as it is, reads zero, and gets
    zero gradients, whatever stood in its place before, NaN included.
    """
    if codes is None:
        return inputs
    padding = (codes == PADDING)[:, :, None, None]
    return tuple(x.masked_fill(padding, 0) for x in inputs)
