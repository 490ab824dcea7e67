"""Elementwise work around WKV-7, fused: what prepares its inputs, what follows its output, and the token
shift.

Each part has a definition in plain torch and a Triton kernel that reads and writes every tensor once, forward
and backward. The Triton ones have not been measured on a GPU, so nothing takes them unless they are named.

Shape letters: B rows, T tokens, D hidden width, H heads, G key/value heads, N head size.
"""

from collections.abc import Callable

from torch import Tensor

from kernels.fused import reference, triton

__all__ = ["finish", "prepare", "shift"]
PREPARE = {"reference": reference.prepare, "triton": triton.prepare}
FINISH = {"reference": reference.finish, "triton": triton.finish}
SHIFT = {"reference": reference.shift, "triton": triton.shift}


def prepare(
    decay: Tensor,
    rate: Tensor,
    key: Tensor,
    *,
    rate_range: float = 1.0,
    removed_scale: Tensor | None = None,
    written_mix: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's inputs from projections: with σ the logistic function and the key repeated to H heads,

        log_w = -e^-0.5 σ(decay) ;  η = rate_range σ(rate) ;  κ = (key ⊙ removed_scale) / its norm per head
        k = κ ⊙ (1 - w + η), with the scales key ⊙ (1 + (η - 1) ⊙ written_mix) ;  a = -κ ;  b = κ ⊙ η

    Args:
        decay, rate: [B,T,H,N] before the logistic function; float32, or float64 for "reference".
        key: [B,T,G,N] in any floating dtype; neighbouring heads share one.
        rate_range: the largest rate.
        removed_scale, written_mix: [H,N], both or neither.
        backend: "reference" or "triton".

    Returns:
        log_w, k, a, b: [B,T,H,N], dtype as `decay`.
    """
    return _named(PREPARE, backend)(decay, rate, key, removed_scale, written_mix, rate_range)


def finish(
    y: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    r: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bonus: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """The operator's output, ready for the output projection: (norm(y) + (Σ_n r k bonus) v) ⊙ gate.

    Args:
        y: [B,T,H,N].
        norm_weight, norm_bias: [H·N] of a norm over each head, or None for no norm.
        norm_eps: added to the variance.
        r, k, v: [B,T,H,N], given with a bonus.
        bonus: [H,N] weight of the current token, or None.
        gate: [B,T,H·N] or None.
        backend: "reference" or "triton".

    Returns:
        [B,T,H·N].
    """
    return _named(FINISH, backend)(y, norm_weight, norm_bias, r, k, v, bonus, gate, norm_eps)


def shift(hidden: Tensor, previous: Tensor, mixes: Tensor, *, backend: str = "reference") -> list[Tensor]:
    """Mixes of each token with the one before it: hidden + (previous - hidden) ⊙ mix for each mix.

    Args:
        hidden, previous: [B,T,D].
        mixes: [6,D].
        backend: "reference" or "triton".

    Returns:
        Six times [B,T,D].
    """
    return _named(SHIFT, backend)(hidden, previous, mixes)


def _named(table: dict[str, Callable], backend: str) -> Callable:
    """The implementation that was asked for, never another one."""
    if backend not in table:
        raise ValueError(f"unknown backend {backend!r} of a fused part; choose one of: {', '.join(table)}")
    return table[backend]
