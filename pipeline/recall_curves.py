"""Recall of several models, each trained with several seeds, over the number of pairs and the row length.

    python -m pipeline.recall_curves trained=64 hybrid=<folder>,<folder> rwkv7=<folder>,<folder>

Each folder is an evaluation of one seed: `python eval.py model=<run> suite=long_context suite.parts=[mqar]`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reports.long_context_plot import Recall, recall_of_models

USAGE = "python -m pipeline.recall_curves trained=<pairs> <model>=<folder>,<folder> ..."


def read_recall(folders: Sequence[Path]) -> Recall:
    """(row length, pairs) -> the share of right values in each evaluation.

    Raises:
        ValueError: a folder holds no such evaluation, or not the same row lengths and pairs as the first.
    """
    found: Recall = {}
    for number, folder in enumerate(folders):
        path = folder / "eval.json"
        cells = json.loads(path.read_text()).get("mqar", {}).get("model") if path.is_file() else None
        if not cells:
            raise ValueError(f"{folder} holds no evaluation of recall; write one with suite.parts=[mqar].")
        for cell in cells:
            found.setdefault((cell["row_length"], cell["pairs"]), []).append(cell["mean"])
        if any(len(values) != number + 1 for values in found.values()):
            raise ValueError(f"{folder} has other row lengths or numbers of pairs than {folders[0]}.")
    return found


def compare(arguments: Sequence[str], picture: Path) -> None:
    """Reads, prints and draws what the command line names.

    Raises:
        ValueError: for an argument that is no `name=value`, or a folder without an evaluation.
    """
    pairs = [argument.split("=", 1) for argument in arguments]
    values = dict(pair for pair in pairs if len(pair) == 2)
    trained = values.pop("trained", "")
    if len(values) + 1 != len(pairs) or not trained.isdigit() or not values:
        raise ValueError(f"write {USAGE}")
    models = {name: read_recall([Path(x) for x in given.split(",")]) for name, given in values.items()}
    table = Table(title="Right values: mean over seeds (lowest, highest)")
    for heading in ("tokens", "pairs", *models):
        table.add_column(heading, justify="right")
    for length, count in sorted({place for found in models.values() for place in found}):
        cells = [_told(found.get((length, count), [])) for found in models.values()]
        table.add_row(f"{length:,}", f"{count:,}", *cells)
    console = Console()
    console.print(table)
    console.print(
        f"Picture: {recall_of_models(picture, models=models, trained=int(trained))}",
        markup=False,
        highlight=False,
    )


def _told(shares: Sequence[float]) -> str:
    if not shares:
        return "–"
    return f"{sum(shares) / len(shares):.1%} ({min(shares):.1%}, {max(shares):.1%})"


if __name__ == "__main__":
    try:
        compare(sys.argv[1:], Path("outputs/recall.png"))
    except ValueError as problem:
        sys.stderr.write(f"Error: {problem}\n")
        raise SystemExit(2) from problem
