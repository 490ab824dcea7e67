"""What a sweep leaves behind: `sweep.csv`, `sweep.md` and the table for the terminal."""

import csv
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from reports.summary import write_text
from reports.sweep_plot import sweep_plot
from reports.sweep_trials import FINISHED, Sweep, Trial, short_names
from reports.table import MISSING, format_seconds, markdown_table

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = ("loss", "kl", "top1_agreement", "copy_gain")  # of the last stage
HEADINGS = ("loss", "KL\n(nats)", "top-1", "copy gain\n(nats)", "time")
PATTERNS = {"loss": ".3f", "kl": ".3f", "top1_agreement": ".1%", "copy_gain": ".2f"}


def write_sweep(folder: str | Path, sweep: Sweep) -> None:
    """Writes `sweep.csv`, `sweep.md` and, if something is measured, `sweep.png` into the sweep's folder."""
    folder = Path(folder)
    write_text(folder / "sweep.csv", sweep_csv(sweep))
    picture = sweep_plot(folder / "sweep.png", sweep) if sweep.measured else None
    write_text(folder / "sweep.md", sweep_markdown(sweep, title=f"Sweep {folder.name}", picture=picture))


def sweep_csv(sweep: Sweep) -> str:
    """Returns one line per trial, numbers with all their digits, nothing where a number is missing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "status", *sweep.swept, "stage", *FIGURES, "seconds", sweep.metric_key, "reason"]
    )
    for trial in sweep.trials:
        settings = [trial.overrides.get(key, "") for key in sweep.swept]
        figures = [trial.stage.get(name) for name in FIGURES]
        facts = [
            trial.stage.get("name"),
            *figures,
            trial.seconds,
            trial.metric,
            " ".join(trial.reason.split()),
        ]
        writer.writerow([trial.name, trial.status, *settings, *facts])
    return text.getvalue()


def sweep_markdown(sweep: Sweep, *, title: str, picture: Path | None = None) -> str:
    """Returns the page of a sweep: table, picture, what became of the trials without a figure.

    Args:
        sweep: as read.
        title: first line of the page.
        picture: the plot, in the same folder.
    """
    names = short_names(sweep.swept)
    header = (
        "trial",
        "overrides",
        "status",
        "loss",
        "KL (nats/token)",
        "top-1 agreement",
        "copy gain (nats)",
        "time",
    )
    rows = [_row(trial, sweep, names) for trial in sweep.trials]
    swept = ", ".join(f"`{key}`" for key in sweep.swept) or "nothing"
    parts = [
        f"# {title}",
        f"{totals_line(sweep)} Swept: {swept}.",
        markdown_table((*header, f"`{sweep.metric_key}`"), rows),
        "Held-out figures after the last stage; time is that of all stages.",
    ]
    if picture is not None:
        parts.append(f"![{sweep.metric_key} of the trials]({picture.name})")
    failures = failure_lines(sweep)
    if failures:
        parts += ["## Without a result", "\n".join(f"* {line}" for line in failures)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sweep_table(sweep: Sweep, *, title: str = "Sweep") -> "Table":
    """Returns the table for a terminal, the best trial in bold, failed trials in red."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    look = {"box": SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "padding": 0}
    table = Table(title=title, title_justify="left", **look)
    table.add_column("trial", no_wrap=True)
    table.add_column("overrides", overflow="fold", min_width=16)
    table.add_column("status", no_wrap=True)
    # A number that has a column of its own is not shown twice: the lines of a log file have 80 columns.
    extra = sweep.metric_key not in {f"stages.-1.{name}" for name in FIGURES}
    narrow = re.sub(r"([._])", r"\1\n", sweep.metric_key)
    for heading in (*HEADINGS, narrow)[: len(HEADINGS) + extra]:
        table.add_column(heading, justify="right", no_wrap=True)
    names = short_names(sweep.swept)
    for trial in sweep.trials:
        style = "bold" if trial is sweep.best else None if trial.status == FINISHED else "red"
        name, *cells = (escape(cell) for cell in _row(trial, sweep, names)[: len(table.columns)])
        table.add_row(name.replace("_", "\n"), *cells, style=style)  # <date>_<time>/<number> on two lines
    return table


def totals_line(sweep: Sweep) -> str:
    """Returns one sentence: what became of the trials, and which is best."""
    statuses = dict.fromkeys(trial.status for trial in sweep.trials)
    counts = ", ".join(f"{sweep.count(status)} {status}" for status in statuses)
    plural = "trial" if len(sweep.trials) == 1 else "trials"
    line = f"{len(sweep.trials)} {plural}: {counts}."
    if sweep.best is None:
        return line
    wanted = "largest" if sweep.maximize else "smallest"
    return f"{line} Best ({wanted} {sweep.metric_key}): trial {sweep.best.name}, {sweep.best.metric:.4g}."


def failure_lines(sweep: Sweep) -> list[str]:
    """Returns a line for each trial without a result: which one, what became of it, and why."""
    lines = []
    for trial in sweep.trials:
        if trial.status != FINISHED:
            lines.append(f"trial {trial.name} {trial.status}" + (f": {trial.reason}" if trial.reason else ""))
    return lines


def _row(trial: Trial, sweep: Sweep, names: dict[str, str]) -> list[str]:
    """The cells of a trial; without swept keys all its settings are shown."""
    shown = {key: trial.overrides.get(key) for key in sweep.swept} or trial.overrides
    settings = [f"{names.get(key, key)}={_value(value)}" for key, value in shown.items() if value is not None]
    figures = [_number(trial.stage.get(name), PATTERNS[name]) for name in FIGURES]
    metric = _number(trial.metric, ".4g")
    return [trial.name, " ".join(settings), trial.status, *figures, format_seconds(trial.seconds), metric]


def _number(value: float | None, pattern: str) -> str:
    return MISSING if value is None else format(value, pattern)


def _value(text: str) -> str:
    """A value as given, a long decimal number cut to four digits."""
    try:
        return text if len(text) < 8 else f"{float(text):.4g}"
    except ValueError:
        return text
