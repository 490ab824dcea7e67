"""Lists of blocks: what an entry means.

An entry m >= 0 is a block that is attended; -1 is none; below that, -2 - m is a block that is only watched.

Shape letters: B rows, T tokens, J lists of a token, K entries of a list, M blocks.
"""

import torch
from torch import Tensor

NONE = -1
LARGEST_SHARE = 1e6  # of a watched block, which may have any multiple of what is attended


def watched(blocks: Tensor) -> Tensor:
    """Entries that ask for a block's share but do not attend to it; NONE stays."""
    return torch.where(blocks >= 0, -2 - blocks, blocks)


def listed_blocks(blocks: Tensor, count: int) -> Tensor:
    """[B,T,J,M] bool: which blocks are attended.

    Args:
        blocks: [B,T,J,K] int32.
        count: M.
    """
    found = torch.zeros(*blocks.shape[:-1], count + 1, dtype=torch.bool, device=blocks.device)
    return found.scatter_(-1, torch.where(blocks >= 0, blocks, count).long(), True)[..., :count]
