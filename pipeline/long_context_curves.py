"""Figures of `suite=long_context` of several models, each trained with several seeds: a table and a picture.

    python -m pipeline.long_context_curves part=mqar trained=64 sparse=<folder> rwkv7=<folder>,<folder>
    python -m pipeline.long_context_curves part=copies trained=512 hybrid=<folder> inserted=<folder>

Each folder is an evaluation of one seed, `python eval.py model=<run> suite=long_context`, or what a sweep of
such evaluations has left, `python eval.py -m model=<run>,<run> suite=long_context`. `trained` is the largest
number of pairs (mqar) or the row length (copies) that training has shown.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from reports.long_context_plot import Seeds, gains_of_models, recall_of_models

USAGE = (
    "python -m pipeline.long_context_curves part=mqar|copies trained=<number> <model>=<folder>,<folder> ..."
)


class Part(NamedTuple):
    """What is told of a part of the suite.

    Attributes:
        cell: what names a cell of the part in eval.json, and a column of the table.
        title: of the table.
        pattern: how a value is written.
        draw: (path, models=, trained=) -> the picture.
        with_teacher: whether the teacher of the first evaluation is told too.
    """

    cell: dict[str, str]
    title: str
    pattern: str
    draw: Callable[..., Path]
    with_teacher: bool


PARTS = {
    "mqar": Part({"row_length": "tokens", "pairs": "pairs"}, "Right values", ".1%", recall_of_models, False),
    "copies": Part({"row_length": "tokens"}, "Copy gain (nats/token)", ".3f", gains_of_models, True),
}


def evaluations(folder: Path) -> list[Path]:
    """The folder, or those of the evaluations below it."""
    return (
        [folder] if (folder / "eval.json").is_file() else sorted(p.parent for p in folder.glob("*/eval.json"))
    )


def read_seeds(part: str, folders: Sequence[Path], who: str = "model") -> Seeds:
    """What names a cell -> the value in each evaluation.

    Raises:
        ValueError: a folder holds no such evaluation, or not the same cells as the first.
    """
    found: Seeds = {}
    number = 0
    for folder in folders:
        measured = [_cells(part, path, who) for path in evaluations(folder)]
        if not any(measured):
            raise ValueError(f"{folder} holds no evaluation of {part}; write one with suite.parts=[{part}].")
        for cells in filter(None, measured):
            number += 1
            for cell in cells:
                found.setdefault(tuple(cell[key] for key in PARTS[part].cell), []).append(cell["mean"])
            if any(len(values) != number for values in found.values()):
                raise ValueError(f"{folder} has other row lengths or numbers of pairs than {folders[0]}.")
    return found


def _cells(part: str, folder: Path, who: str) -> list[dict[str, Any]]:
    return json.loads((folder / "eval.json").read_text()).get(part, {}).get(who, [])


def compare(arguments: Sequence[str], folder: Path) -> None:
    """Reads, prints and draws what the command line names.

    Args:
        arguments: as in the module's text.
        folder: of the picture.

    Raises:
        ValueError: for an argument that is no `name=value`, or a folder without an evaluation.
    """
    pairs = [argument.split("=", 1) for argument in arguments]
    values = dict(pair for pair in pairs if len(pair) == 2)
    name, trained = values.pop("part", ""), values.pop("trained", "")
    if len(values) + 2 != len(pairs) or name not in PARTS or not trained.isdigit() or not values:
        raise ValueError(f"write {USAGE}")
    part, given = PARTS[name], {model: [Path(x) for x in of.split(",")] for model, of in values.items()}
    models = {model: read_seeds(name, folders) for model, folders in given.items()}
    if part.with_teacher:
        first = evaluations(next(iter(given.values()))[0])[:1]
        models |= {"teacher": read_seeds(name, first, "teacher")}
    table = Table(title=f"{part.title}: mean over seeds (lowest, highest)")
    for heading in (*part.cell.values(), *models):
        table.add_column(heading, justify="right")
    for cell in sorted({cell for found in models.values() for cell in found}):
        told = [_told(found.get(cell, []), part.pattern) for found in models.values()]
        table.add_row(*(f"{value:,}" for value in cell), *told)
    console = Console()
    console.print(table)
    picture = part.draw(folder / f"{name}.png", models=models, trained=int(trained))
    console.print(f"Picture: {picture}", markup=False, highlight=False)


def _told(values: Sequence[float], pattern: str) -> str:
    if not values:
        return "–"
    mean = format(sum(values) / len(values), pattern)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{pattern}}, {max(values):{pattern}})"


if __name__ == "__main__":
    try:
        compare(sys.argv[1:], Path("outputs"))
    except ValueError as problem:
        sys.stderr.write(f"Error: {problem}\n")
        raise SystemExit(2) from problem
