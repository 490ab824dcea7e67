"""What eval.py leaves behind: a table for the terminal, `eval.json` and `eval.md`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.summary import write_text
from reports.table import MISSING, markdown_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number, and the teacher's beside it.

    Args:
        name: key in `eval.json`.
        label: in tables, with the unit.
        value: the model's.
        teacher: the teacher's, or None where there is none or it has no meaning.
        pattern: how it is written.
        chance: the score of guessing; 0 where nothing is known.
        error, teacher_error: standard errors, where they are known.
    """

    name: str
    label: str
    value: float
    teacher: float | None = None
    pattern: str = ".4f"
    chance: float = 0.0
    error: float | None = None
    teacher_error: float | None = None

    @property
    def difference(self) -> float | None:
        """The model's less the teacher's."""
        return None if self.teacher is None else self.value - self.teacher

    @property
    def relative(self) -> float | None:
        """The model's as a share of the teacher's, both above chance; None where the teacher's is not."""
        if self.teacher is None or not self.teacher > self.chance:
            return None
        return (self.value - self.chance) / (self.teacher - self.chance)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot: its file below the run folder, its heading, and what to look for in it."""

    file: str
    heading: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a suite has found out.

    Args:
        figures: rows of the table.
        explanation: of the figures, for the page.
        by_position: metric -> value at each position of the row; NaN where nothing was measured.
        per_layer: a record for each decoder layer.
        pictures: that have been drawn.
        details: further sections of `eval.json`.
    """

    figures: Sequence[Figure]
    explanation: str
    by_position: Mapping[str, Sequence[float]] = field(default_factory=dict)
    per_layer: Sequence[Mapping[str, Any]] = ()
    pictures: Sequence[Picture] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_teacher(self) -> bool:
        """Whether some figure has the teacher's beside it."""
        return any(figure.teacher is not None for figure in self.figures)


def figures_table(findings: Findings, *, title: str) -> "Table":
    """The table for a terminal."""
    from rich.table import Table

    header, *rows = _cells(findings)
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(header):
        kind = {"justify": "right", "no_wrap": True} if index else {"overflow": "fold"}
        table.add_column(heading, **kind)
    for row in rows:
        table.add_row(*row)
    return table


def write_eval(folder: Path, findings: Findings, *, model: str, teacher: str | None, suite: str) -> None:
    """Writes `eval.json` and `eval.md`.

    `eval.json` is one object: `model`, `teacher` (folder or null), `suite`; `figures`, `teacher_figures`,
    `difference` (model - teacher) and `relative` (model / teacher, above chance where that is known), each
    name -> number or null; `by_position`, metric -> list by position in the row, null where nothing was
    measured; `per_layer`, a list; and the suite's own sections.

    Args:
        folder: of the evaluation.
        findings: what there is to tell.
        model, teacher, suite: what was measured, and how.
    """
    figures = findings.figures
    facts = {"model": model, "teacher": teacher, "suite": suite}
    facts["figures"] = {figure.name: figure.value for figure in figures}
    for section, attribute in (
        ("teacher_figures", "teacher"),
        ("difference", "difference"),
        ("relative", "relative"),
    ):
        known = {figure.name: getattr(figure, attribute) for figure in figures if figure.teacher is not None}
        facts[section] = known
    facts |= {"by_position": findings.by_position, "per_layer": findings.per_layer, **findings.details}
    write_text(folder / "eval.json", json.dumps(_plain(facts), indent=1, allow_nan=False) + "\n")
    write_text(folder / "eval.md", eval_page(findings, model=model, teacher=teacher, suite=suite))


def eval_page(findings: Findings, *, model: str, teacher: str | None, suite: str) -> str:
    """The page: table, explanation, pictures and layers, in Markdown."""
    header, *rows = _cells(findings)
    named = f"`{teacher}`" if teacher else "none"
    parts = [
        f"# Evaluation: {suite}\n",
        f"Model: `{model}`  \nTeacher: {named}\n",
        markdown_table(header, rows, numbers=True),
        f"{findings.explanation}\n",
    ]
    for picture in findings.pictures:
        parts.append(f"## {picture.heading}\n\n![{picture.heading}]({picture.file})\n\n{picture.note}\n")
    return "\n".join(parts)


def _cells(findings: Findings) -> list[list[str]]:
    """The header and the rows of the table."""
    if not findings.has_teacher:
        rows = [[figure.label, _written(figure, figure.value, figure.error)] for figure in findings.figures]
        return [["figure", "model"], *rows]
    header = ["figure", "model", "teacher", "difference", "relative"]
    return [header, *([figure.label, *_numbers(figure)] for figure in findings.figures)]


def _numbers(figure: Figure) -> list[str]:
    if figure.teacher is None:
        return [_written(figure, figure.value, figure.error), "", "", ""]
    relative = MISSING if figure.relative is None else f"{figure.relative:.1%}"
    signed = f"{figure.difference:+{figure.pattern}}"
    written = [
        _written(figure, figure.value, figure.error),
        _written(figure, figure.teacher, figure.teacher_error),
    ]
    return [*written, signed, relative]


def _written(figure: Figure, value: float, error: float | None) -> str:
    spread = "" if error is None else f" ± {error:{figure.pattern}}"
    return f"{value:{figure.pattern}}{spread}"


def _plain(value: Any) -> Any:
    """The same with None in the place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
