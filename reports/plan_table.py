"""A plan as tables: for the terminal and as Markdown."""

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

MEMORY_WORDS = {
    "teacher": "teacher's weights",
    "student": "student's weights",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "activations": "activations",
    "logits": "logits chunk",
    "gathered": "all-gather buffers",
}
STAGE_HEAD = [
    "stage",
    "tokens",
    "FLOPs per token",
    "FLOPs",
    "tokens per s",
    "time",
    "cost",
    "GB each",
    "fits",
]


def plan_tables(plan: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of the tables of a plan: its stages, and what is in a device's memory."""
    machine, total = plan["hardware"], plan["total"]
    rows = [_stage_row(stage) for stage in plan["stages"]]
    summed = ["together", "", "", "", "", _time(total["hours"]), f"{total['cost']:,.0f}"]
    rows.append([*summed, "", ""])
    names = [stage["name"] for stage in plan["stages"]]
    memory = [
        [words, *(f"{stage['memory_gb'][key]:.2f}" for stage in plan["stages"])]
        for key, words in MEMORY_WORDS.items()
    ]
    memory.append(["together", *(f"{stage['total_gb']:.2f}" for stage in plan["stages"])])
    memory.append(["there is", *(f"{machine['capacity_gb']:.2f}" for _ in names)])
    memory.append(["trained parameters", *(_count(stage["trained"]) for stage in plan["stages"])])
    return [
        (f"{machine['name']}: {machine['devices']} in use; cost in {total['currency']}", STAGE_HEAD, rows),
        ("memory of one device, GB of 1e9 bytes", ["", *names], memory),
    ]


def plan_words(plan: dict[str, Any]) -> list[str]:
    """What a plan says besides its tables: parameters, what does not fit, notes."""
    counts = plan["parameters"]
    inserted = f" and {_count(counts['inserted'])} in inserted layers" if counts["inserted"] else ""
    said = [
        f"Parameters: teacher {_count(counts['teacher'])}, student {_count(counts['student'])}, of which "
        f"{_count(counts['mixers'])} in mixers{inserted}.",
        f"Memory of a node itself at the start: {plan['host_memory_gb']:,.1f} GB, for whole models before "
        "they are spread.",
    ]
    for stage in plan["stages"]:
        if stage["fits"]:
            continue
        remedy = stage["makes_it_fit"]
        said.append(
            f"{stage['name']} does not fit. "
            + ("No switch makes it fit." if remedy is None else f"This makes it fit: {' '.join(remedy)}")
        )
    return said + plan["notes"]


def rich_tables(plan: dict[str, Any]) -> list[Table]:
    """The tables for a terminal."""
    shown = []
    for title, head, rows in plan_tables(plan):
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        for index, name in enumerate(head):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return shown


def markdown_plan(plan: dict[str, Any], command: str) -> str:
    """The whole plan as a page."""
    parts = ["# Plan", f"`{command}`"]
    for title, head, rows in plan_tables(plan):
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += ["## Besides", "\n".join(f"* {words}" for words in plan_words(plan))]
    return "\n\n".join(parts) + "\n"


def _stage_row(stage: dict[str, Any]) -> list[str]:
    return [
        stage["name"],
        _count(stage["tokens"]),
        _power(stage["flops_per_token"]),
        _power(stage["flops"]),
        f"{stage['tokens_per_second']:,.0f}",
        _time(stage["hours"]),
        f"{stage['cost']:,.0f}",
        f"{stage['total_gb']:.2f}",
        "yes" if stage["fits"] else "NO",
    ]


def _time(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _power(number: float) -> str:
    return f"{number:.2e}".replace("e+", "e")


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g}"
