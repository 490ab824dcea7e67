"""The result table of a run: one row per stage, the teacher last, for the terminal and for `report.md`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "stage",
    "loss",
    "perplexity",
    "KL (nats/token)",
    "top-1 agreement",
    "gap recovered",
    "copy gain (nats)",
    "tokens",
    "time",
)
TERMINAL_HEADINGS = (
    "stage",
    "loss",
    "perplexity",
    "KL\n(nats)",
    "top-1\nagreement",
    "gap\nrecovered",
    "copy gain\n(nats)",
    "tokens",
    "time",
)
MISSING = "–"


def summary_rows(summary: Mapping) -> list[list[str]]:
    """Returns the cells of the table, one list per row in the order of `COLUMNS`.

    Args:
        summary: the contents of `summary.json` (see `reports.summary`). A positive copy gain is followed by
            its share of the teacher's; tokens and time are those of the stage alone.
    """
    teacher = summary["teacher"]
    rows = [_stage_row(stage, teacher) for stage in summary["stages"]]
    if teacher is not None:
        loss, ppl = _number(teacher["loss"], ".3f"), _perplexity(teacher["perplexity"])
        gain = _number(teacher["copy_gain"], ".2f")
        rows.append(["teacher", loss, ppl, MISSING, MISSING, MISSING, gain, MISSING, MISSING])
    return rows


def summary_table(summary: Mapping, *, title: str = "Result on held-out text") -> "Table":
    """Returns the table for a terminal, the last stage (what the run produced) in bold.

    Args:
        summary: the contents of `summary.json`.
        title: text above the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title,
        caption=totals_line(summary),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
        show_edge=False,
    )
    # Headings on two lines and narrow cells keep the table within the 80 columns of a log file.
    for heading in TERMINAL_HEADINGS:
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    last_stage = len(summary["stages"]) - 1
    for index, row in enumerate(summary_rows(summary)):
        is_teacher = index > last_stage
        if is_teacher:
            table.add_section()
        table.add_row(*row, style="bold" if index == last_stage else "cyan" if is_teacher else None)
    return table


def summary_markdown(summary: Mapping) -> str:
    """Returns the same table in Markdown, ending with a newline."""
    return markdown_table(COLUMNS, summary_rows(summary), numbers=True) + f"\n{totals_line(summary)}\n"


def totals_line(summary: Mapping) -> str:
    """Returns one sentence with the tokens and the time of all stages together."""
    tokens = sum(stage["tokens"] or 0 for stage in summary["stages"])
    seconds = sum(stage["seconds"] or 0 for stage in summary["stages"])
    return f"All stages: {format_tokens(tokens)} tokens in {format_seconds(seconds)}; seed {summary['seed']}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: bool = False) -> str:
    """Returns a Markdown table, ending with a newline.

    Args:
        header: names of the columns.
        rows: cells, turned into text; `|` and line breaks inside a cell are made harmless.
        numbers: whether all columns but the first hold numbers, which are aligned right.
    """
    lines = [header, ["---"] + ["---:" if numbers else "---"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def format_tokens(tokens: float | None) -> str:
    """Returns a count in three digits with k, M or B behind it: 614_400 becomes `614 k`."""
    if tokens is None:
        return MISSING
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Rounded to three digits first, or 999,999 would be shown as 1000 k.
        if float(f"{tokens:.3g}") >= limit:
            scaled = tokens / limit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    return f"{tokens:.0f}"


def format_seconds(seconds: float | None) -> str:
    """Returns a duration as a person says it: `0.4s`, `42s`, `5m 23s`, `3h 04m`."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return "0s" if seconds == 0 else f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h {minutes % 60:02d}m"


def _stage_row(stage: Mapping, teacher: Mapping | None) -> list[str]:
    gain = _number(stage["copy_gain"], ".2f")
    if (stage["copy_gain"] or 0) > 0 and teacher is not None and (teacher["copy_gain"] or 0) > 0:
        gain += f" ({stage['copy_gain'] / teacher['copy_gain']:.0%})"
    return [
        stage["name"],
        _number(stage["loss"], ".3f"),
        _perplexity(stage["perplexity"]),
        _number(stage["kl"], ".3f"),
        _number(stage["top1_agreement"], ".1%"),
        _number(stage["gap_recovered"], ".1%"),
        gain,
        format_tokens(stage["tokens"]),
        format_seconds(stage["seconds"]),
    ]


def _number(value: float | None, pattern: str) -> str:
    return MISSING if value is None else format(value, pattern)


def _perplexity(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
