"""The picture of a sweep: which settings made the number better.

One swept setting: the number against its value, a point per trial and the mean over seeds. Two settings on
a grid: a heat map of means. More, or values that a search has drawn: one panel per setting. Seeds alone: a
point each and their mean.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reports.plots import COLOURS, _figure, _save
from reports.sweep_trials import Sweep, Trial, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED = "seed"
MARKERS = "osD^vP*<"
FAILURE_COLOUR = "#B00020"
MAXIMUM_SEEDS = len(MARKERS)  # more are drawn alike
MAXIMUM_CELLS = 12  # values of one setting in a heat map
MAXIMUM_PANELS = 6
UNSET = "(default)"


def sweep_plot(path: str | Path, sweep: Sweep) -> Path:
    """Draws the number that the trials are compared by against what was swept.

    Args:
        path: the PNG to write.
        sweep: as read; trials without a number are marked where their settings are.

    Raises:
        ValueError: no trial has a finite number.
    """
    if not sweep.measured:
        raise ValueError(f"sweep plot: no trial has a finite {sweep.metric_key}")
    keys = [key for key in sweep.swept if key != SEED] or [SEED]
    if len(keys) == 2 and is_grid(sweep, keys):
        return _heat_map(path, sweep, keys)
    return _panels(path, sweep, keys)


def is_grid(sweep: Sweep, keys: Sequence[str]) -> bool:
    """Whether most combinations of the values of two keys were tried, and there are few values of each."""
    cells = {tuple(_value(trial, key) for key in keys) for trial in sweep.trials}
    columns, rows = (len(_values(sweep, key)) for key in keys)
    return max(columns, rows) <= MAXIMUM_CELLS and 2 * len(cells) > columns * rows


def _panels(path: str | Path, sweep: Sweep, keys: Sequence[str]) -> Path:
    """One panel per key, at most six: a point per trial, and the mean where a value has several."""
    shown, names = keys[:MAXIMUM_PANELS], short_names(keys)
    label = (
        sweep.metric_key
        if len(keys) <= MAXIMUM_PANELS
        else f"{sweep.metric_key} (first {MAXIMUM_PANELS} settings)"
    )
    width = 8.0 if len(shown) == 1 else min(4.0 * len(shown), 16.0)
    figure, axes = _figure("", "", "", columns=len(shown), width=width)
    panels = [axes] if len(shown) == 1 else list(axes)
    for panel, key in zip(panels, shown, strict=True):
        _draw_key(panel, sweep, key)
        panel.set_xlabel(key if len(shown) == 1 else names[key])
    panels[0].set_ylabel(label)
    figure.suptitle(_title(sweep), fontsize=12)
    handles = panels[0].get_legend_handles_labels()
    if handles[0]:
        panels[0].legend(framealpha=0.9)
    return _save(figure, path)


def _draw_key(axes: "Axes", sweep: Sweep, key: str) -> None:
    """The number of each trial against its value of one key."""
    places = _place_values(axes, sweep, key)
    groups = defaultdict(list)
    for trial in sweep.measured:
        groups[places[_value(trial, key)]].append(trial.metric)
    _draw_mean(axes, sweep, key, groups)
    for number, (seed, trials) in enumerate(_by_seed(sweep, key).items()):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        x = [places[_value(trial, key)] for trial in trials]
        name = f"seed {seed}" if seed is not None else None
        axes.scatter(x, [trial.metric for trial in trials], s=42, alpha=0.85, zorder=2, label=name, **look)
    ring = {"s": 150, "facecolors": "none", "edgecolors": "black", "linewidths": 1.4, "zorder": 3}
    axes.scatter(places[_value(sweep.best, key)], sweep.best.metric, label="best", **ring)
    axes.margins(y=0.1)
    lost = sorted({places[_value(trial, key)] for trial in sweep.trials if trial not in sweep.measured})
    if lost:
        cross = {"color": FAILURE_COLOUR, "transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(lost, [0.0] * len(lost), "X", zorder=4, label="no result", **cross)


def _draw_mean(axes: "Axes", sweep: Sweep, key: str, groups: dict[float, list[float]]) -> None:
    """Joins the means of numbers by a line, marks those of words; of seeds there is one mean for all."""
    style = {"color": "#444444", "linewidth": 1.4, "zorder": 1}
    if key == SEED:
        mean = float(np.mean([trial.metric for trial in sweep.measured]))
        axes.axhline(mean, label=f"mean: {mean:.4g}", **style)
    elif len(groups) < len(sweep.measured):
        order = sorted(groups)
        means = [np.mean(groups[place]) for place in order]
        if all(isinstance(value, float) for value in _values(sweep, key)):
            axes.plot(order, means, label="mean", **style)
        else:
            ends = np.array(order)
            axes.hlines(means, ends - 0.2, ends + 0.2, label="mean", **style)


def _heat_map(path: str | Path, sweep: Sweep, keys: Sequence[str]) -> Path:
    """Means over the trials of each pair of values, written into the cells."""
    columns, rows = (_values(sweep, key) for key in keys)
    cells = defaultdict(list)
    for trial in sweep.measured:
        cells[_value(trial, keys[1]), _value(trial, keys[0])].append(trial.metric)
    means = np.array([[np.mean(cells[r, c]) if cells[r, c] else np.nan for c in columns] for r in rows])
    tried = {(_value(trial, keys[1]), _value(trial, keys[0])) for trial in sweep.trials}
    figure, axes = _figure(_title(sweep), keys[0], keys[1])
    colours = "viridis" if sweep.maximize else "viridis_r"  # bright is good
    image = axes.imshow(means, cmap=colours, aspect="auto")
    middle = (np.nanmax(means) + np.nanmin(means)) / 2
    for (row, column), mean in np.ndenumerate(means):
        numbers = cells[rows[row], columns[column]]
        bright = (mean > middle) == sweep.maximize
        text = f"{mean:.4g}" + (f"\nmean of {len(numbers)}" if len(numbers) > 1 else "")
        if not numbers:
            text = "no result" if (rows[row], columns[column]) in tried else "not tried"
        colour = FAILURE_COLOUR if not numbers else "black" if bright else "white"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), [_text(value) for value in columns])
    axes.set_yticks(range(len(rows)), [_text(value) for value in rows])
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=sweep.metric_key)
    return _save(figure, path)


def _title(sweep: Sweep) -> str:
    wanted = "larger" if sweep.maximize else "smaller"
    trials = f"{len(sweep.trials)} {'trial' if len(sweep.trials) == 1 else 'trials'}"
    if len(sweep.measured) < len(sweep.trials):
        trials = f"{len(sweep.measured)} of {trials} have a result"
    return f"{trials}; {wanted} is better"


def _by_seed(sweep: Sweep, key: str) -> dict[object, list[Trial]]:
    """The measured trials of each seed; of all together where seeds are not swept, or too many."""
    groups = defaultdict(list)
    for trial in sweep.measured:
        groups[trial.overrides.get(SEED)].append(trial)
    if SEED not in sweep.swept or key == SEED or len(groups) > MAXIMUM_SEEDS:
        return {None: sweep.measured}
    return dict(groups)


def _place_values(axes: "Axes", sweep: Sweep, key: str) -> dict[object, float]:
    """Where each value of a key stands on the x axis, numbers by size, words side by side."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = _values(sweep, key)
    if not all(isinstance(value, float) for value in values):
        axes.set_xticks(range(len(values)), [_text(value) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        return {value: float(index) for index, value in enumerate(values)}
    if values[0] > 0 and values[-1] >= 8 * values[0] or _even_ratios(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value)))
        axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= 8:
        axes.set_xticks(values, [_text(value) for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
    return {value: value for value in values}


def _even_ratios(values: Sequence[float]) -> bool:
    """Whether three or more numbers each are the same multiple, at least 1.5, of the one before."""
    if len(values) < 3 or values[0] <= 0:
        return False
    ratios = np.divide(values[1:], values[:-1])
    return bool(np.allclose(ratios, ratios[0], rtol=0.05) and ratios[0] >= 1.5)


def _values(sweep: Sweep, key: str) -> list:
    """The values of a key in all trials: numbers by size, others in the order of the trials."""
    values = list(dict.fromkeys(_value(trial, key) for trial in sweep.trials))
    return sorted(values) if all(isinstance(value, float) for value in values) else values


def _value(trial: Trial, key: str) -> float | str:
    """A trial's value of a key, as a number where it is a finite one."""
    text = trial.overrides.get(key, UNSET)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if np.isfinite(number) else text


def _text(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value
