"""How many tokens recipes need until their student is as near to the teacher as a fixed level asks.

    python -m pipeline.token_efficiency level=0.4 published=<folder> ours=<folder>

Each folder is a run, or a sweep whose trials are runs with several seeds. The runs must have measured
themselves while they trained (`stage.<name>.validate_every_steps`): `metrics.csv` then holds a curve.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from callbacks.metrics_csv import read_metrics
from reports.token_efficiency import Curve, efficiency_plot, efficiency_table

METRIC = "validation_kl"
USAGE = "python -m pipeline.token_efficiency level=<nats/token> <recipe>=<run or sweep folder> ..."


def read_curves(folder: Path) -> list[Curve]:
    """The curves of a run, or of every run below a sweep's folder.

    Raises:
        ValueError: there is no measured run.
    """
    tables = (
        [folder / "metrics.csv"]
        if (folder / "metrics.csv").exists()
        else sorted(folder.glob("*/metrics.csv"))
    )
    curves = [_curve(table) for table in tables]
    found = [curve for curve in curves if len(curve.tokens)]
    if not found:
        raise ValueError(
            f"{folder} holds no run with a {METRIC}; train with stage.<name>.validate_every_steps above 0."
        )
    return found


def _curve(table: Path) -> Curve:
    points = {r["tokens"]: r["value"] for r in read_metrics(table) if r["metric"].endswith(f"/{METRIC}")}
    tokens = np.array(sorted(points), dtype=np.float64)
    return Curve(table.parent.name, tokens, np.array([points[count] for count in sorted(points)]))


def compare(arguments: Sequence[str], picture: Path) -> None:
    """Reads, prints and draws what the command line names.

    Raises:
        ValueError: for an argument that is no `name=value`, a missing level, or a folder without curves.
    """
    pairs = [argument.split("=", 1) for argument in arguments]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"write {USAGE}")
    values = dict(pairs)
    level = float(values.pop("level", "nan"))
    if not level > 0 or not values:
        raise ValueError(f"write {USAGE}")
    recipes = {name: read_curves(Path(folder)) for name, folder in values.items()}
    table = Table(title=f"Tokens until the held-out KL is {level:g} nats/token")
    for heading in ("recipe", "each run", "geometric mean", "times fewer"):
        table.add_column(heading)
    for row in efficiency_table(recipes, level):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"Picture: {efficiency_plot(picture, recipes, level)}", markup=False, highlight=False)


if __name__ == "__main__":
    try:
        compare(sys.argv[1:], Path("outputs/token_efficiency.png"))
    except ValueError as problem:
        sys.stderr.write(f"Error: {problem}\n")
        raise SystemExit(2) from problem
