"""Low-rank, data-dependent parameters of RWKV mixers."""

from collections.abc import Callable

from torch import Tensor, nn


def rounded_rank(rank: float) -> int:
    """The nearest multiple of 32, at least 32."""
    return max(32, round(rank / 32) * 32)


class LowRank(nn.Module):
    """bias + activation(x A) B. A starts at 0, so at the start only the bias speaks.

    Args:
        width: D, of the input.
        rank: between A [D,rank] and B [rank,inner].
        inner: of the output.
        activation: between the two matrices, or None.
        bias: [inner] initial bias.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        inner: int,
        activation: Callable[[Tensor], Tensor] | None,
        *,
        bias: Tensor,
    ):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, inner, bias=False)
        self.bias = nn.Parameter(bias.clone())
        self.activation = activation
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[...,D] -> [...,inner]."""
        middle = self.down(hidden)
        return self.bias + self.up(middle if self.activation is None else self.activation(middle))
