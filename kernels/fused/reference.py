"""What stands around WKV-7 in a mixer, in plain torch: the definitions.

Shape letters: B rows, T tokens, D hidden width, H heads, G key/value heads, N head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DECAY_SCALE = math.exp(-0.5)  # keeps the decay above exp(-exp(-0.5)) = 0.545
SMALLEST_NORM = 1e-6  # a key shorter than this is divided by it


def prepare(
    decay: Tensor,
    rate: Tensor,
    key: Tensor,
    removed_scale: Tensor | None,
    written_mix: Tensor | None,
    rate_range: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kernels.fused.prepare`."""
    log_w = -DECAY_SCALE * torch.sigmoid(decay)
    rate = rate_range * torch.sigmoid(rate)
    groups = decay.shape[2] // key.shape[2]
    key = key.to(decay.dtype)
    if groups > 1:
        key = key.repeat_interleave(groups, dim=2)
    if removed_scale is None:
        unit = F.normalize(key, dim=-1, eps=SMALLEST_NORM)
        return log_w, unit * (rate - torch.expm1(log_w)), -unit, unit * rate
    unit = F.normalize(key * removed_scale, dim=-1, eps=SMALLEST_NORM)
    return log_w, key * (1 + (rate - 1) * written_mix), -unit, unit * rate


def finish(
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    r: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    bonus: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """As `kernels.fused.finish`."""
    flat = y.flatten(2)
    if norm_weight is not None:
        rows = flat.flatten(0, 1)
        flat = F.group_norm(rows, y.shape[2], norm_weight, norm_bias, norm_eps).view(flat.shape)
    if bonus is not None:
        flat = flat + ((r * k * bonus).sum(-1, keepdim=True) * v).flatten(2)
    return flat if gate is None else flat * gate


def shift(hidden: Tensor, previous: Tensor, mixes: Tensor) -> list[Tensor]:
    """As `kernels.fused.shift`."""
    change = previous - hidden
    return [hidden + change * mix for mix in mixes]
