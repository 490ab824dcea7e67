"""Token shift: each token also sees its predecessor (RWKV-7 "Goose", arXiv 2503.14456).

Shape letters: B rows, T tokens, D hidden width.
"""

import torch
from torch import Tensor


def previous_token(hidden: Tensor, document_ids: Tensor | None, last: Tensor | None) -> Tensor:
    """The hidden state of the token before each token, in the same document; zeros where there is none.

    Padding is passed over, so the result of a document does not depend on where its row is padded.

    Args:
        hidden: [B,T,D].
        document_ids: [B,T], -1 on padding; None where no token is padded and no document ends within the row.
        last: [B,D] the token before this call, or None at the start of a text.

    Returns:
        [B,T,D].
    """
    first = torch.zeros_like(hidden[:, :1]) if last is None else last[:, None].to(hidden.dtype)
    extended = torch.cat([first, hidden], dim=1)  # position t + 1 holds token t, position 0 what came before
    if document_ids is None:
        return extended[:, :-1]
    source = _last_real(document_ids)[:, :-1]
    previous = extended.gather(1, source[..., None].expand_as(hidden))
    # Position 0 continues the text before this call, whatever number its document has here.
    ids = torch.cat([document_ids[:, :1], document_ids], dim=1)
    crosses = (source > 0) & (ids.gather(1, source) != document_ids)
    return previous.masked_fill(crosses[..., None], 0.0)


def last_token(hidden: Tensor, document_ids: Tensor | None, last: Tensor | None) -> Tensor:
    """The last real token's hidden state [B,D], to be handed to the next call as `last`."""
    if document_ids is None:
        return hidden[:, -1]
    first = torch.zeros_like(hidden[:, :1]) if last is None else last[:, None].to(hidden.dtype)
    extended = torch.cat([first, hidden], dim=1)
    source = _last_real(document_ids)[:, -1:, None].expand(-1, 1, hidden.shape[-1])
    return extended.gather(1, source)[:, 0]


def _last_real(document_ids: Tensor) -> Tensor:
    """[B,T+1] int64: position t holds 1 + the index of the last real token before t, 0 where there is
    none."""
    index = torch.arange(1, document_ids.shape[1] + 1, device=document_ids.device).expand_as(document_ids)
    real = torch.where(document_ids >= 0, index, 0)
    return torch.cat([torch.zeros_like(real[:, :1]), real], dim=1).cummax(1).values
