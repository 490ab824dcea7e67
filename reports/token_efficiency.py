"""The table and picture of how many tokens recipes need until their student is near enough to the teacher."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import numpy as np

from reports.plots import COLOURS, DASHES, _figure, _save, _token_scale

TICKS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # nats/token


class Curve(NamedTuple):
    """One run's held-out KL over training.

    Args:
        name: of its folder.
        tokens: trained on so far, ascending.
        kl: KL(teacher || student) in nats/token at each.
    """

    name: str
    tokens: np.ndarray
    kl: np.ndarray

    def tokens_until(self, level: float) -> float | None:
        """Tokens at which the KL first is at or below `level`; None where it never is.

        Read off the line between two measurements, on a log scale of the KL.
        """
        below = np.flatnonzero(self.kl <= level)
        if not len(below):
            return None
        after = int(below[0])
        if after == 0:
            return float(self.tokens[0])
        high, low = math.log(self.kl[after - 1]), math.log(self.kl[after])
        share = (high - math.log(level)) / (high - low)
        return float(self.tokens[after - 1] + share * (self.tokens[after] - self.tokens[after - 1]))


def efficiency_plot(path: str | Path, recipes: Mapping[str, Sequence[Curve]], level: float) -> Path:
    """Draws every run's KL over its tokens, a colour per recipe, and the level.

    Args:
        path: the PNG to write.
        recipes: recipe -> its runs.
        level: nats/token.
    """
    curves = [curve for runs in recipes.values() for curve in runs]
    scale, unit = _token_scale([float(curve.tokens[-1]) for curve in curves])
    figure, axes = _figure("Tokens to a student", f"training tokens ({unit})", "held-out KL (nats/token)")
    for index, (name, runs) in enumerate(recipes.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        for number, curve in enumerate(runs):
            label = f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})" if number == 0 else None
            axes.plot(curve.tokens / scale, curve.kl, linewidth=1.4, alpha=0.8, label=label, **style)
        reached = [tokens for curve in runs if (tokens := curve.tokens_until(level)) is not None]
        axes.plot([tokens / scale for tokens in reached], [level] * len(reached), "o", color=style["color"])
    axes.axhline(level, color="#444444", linewidth=1, label=f"level: {level:g}")
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    ticks = [tick for tick in TICKS if _shown(tick, curves)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    return _save(figure, path)


def _shown(value: float, curves: Sequence[Curve]) -> bool:
    return min(curve.kl.min() for curve in curves) <= value <= max(curve.kl.max() for curve in curves)


def efficiency_table(recipes: Mapping[str, Sequence[Curve]], level: float) -> list[tuple[str, str, str, str]]:
    """Rows (recipe, tokens of each run, geometric mean, times fewer than the first recipe).

    A run that ends above the level counts with all its tokens, and what rests on it is marked as a bound: the
    mean as too small, and with it how many times fewer tokens the others need.
    """
    means: dict[str, tuple[float, bool]] = {}
    rows = []
    for name, runs in recipes.items():
        each = [curve.tokens_until(level) for curve in runs]
        spent = [tokens or float(curve.tokens[-1]) for tokens, curve in zip(each, runs, strict=True)]
        mean, bound = means[name] = geometric_mean(spent), None in each
        first, first_is_bound = means[next(iter(recipes))]
        ratio = "–" if bound else f"{'> ' * first_is_bound}{first / mean:.2f} x"
        words = ["not reached" if tokens is None else f"{tokens / 1e6:.3f} M" for tokens in each]
        rows.append((name, ", ".join(words), f"{'> ' * bound}{mean / 1e6:.3f} M", ratio))
    return rows
