"""Sums of log decays within a chunk, made by adding up only: no digits cancel, no exponent is above 0, and
minus infinity is a decay like any other."""

from torch import Tensor
from torch.nn.functional import pad


def sum_until(log_w: Tensor) -> Tensor:
    """[...,C,N] -> [...,C,N]: of the tokens up to each one, itself included."""
    return log_w.cumsum(-2)


def sum_before(log_w: Tensor) -> Tensor:
    """[...,C,N] -> [...,C,N]: of the tokens before each one."""
    return pad(log_w, (0, 0, 1, -1)).cumsum(-2)


def sum_after(log_w: Tensor) -> Tensor:
    """[...,C,N] -> [...,C,N]: of the tokens after each one."""
    return pad(log_w, (0, 0, -1, 1)).flip(-2).cumsum(-2).flip(-2)
