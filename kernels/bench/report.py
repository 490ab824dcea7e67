"""The page that gpu_check writes: facts, parity, speeds against the aims, memory, decoding."""

from collections.abc import Sequence

from kernels.bench.calls import BOTH, FLA, FORWARD
from kernels.bench.checks import RIGHT, UNABLE, UNBUILT
from kernels.bench.results import Findings
from kernels.bench.sparse import table
from kernels.bench.table import Row

# The aims, forward + backward: times as fast as flash-linear-attention, by rows times heads; times the floor.
FASTER_THAN_FLA, FASTER_EVERYWHERE, TIMES_FLOOR = {256: 2.0}, 1.0, 5.0
AIMED_SHAPE = "B8 T4096 H32 N64"


def report(found: Findings, picture: str | None) -> str:
    """Markdown; `picture` is the file name of the plot beside it."""
    parts = [f"# {found.facts['device']}, {found.facts['date']}", "", "Written by `make gpu-check`.", ""]
    parts += _table(["what", "is"], found.facts.items())
    if found.notes:
        parts += ["## Not done, or stopped", "", *(f"* {_cell(note)}" for note in found.notes), ""]
    parts += ["## Parity with float64", "", *_parity(found.parity)]
    parts += ["## Speed", ""]
    if found.peaks:
        bandwidth, flops = found.peaks["bandwidth"] / 1e9, found.peaks["flops"] / 1e12
        parts += [
            f"Floors: {bandwidth:.0f} GB/s copied (both ways), {flops:.3g} TFLOP/s in matrix products.",
            "In brackets: times the floor. A backend that was wrong has no speed.",
            "",
        ]
    for op in dict.fromkeys(row.op for row in found.speed):
        for what in (FORWARD, BOTH):
            parts += [
                f"### {op}, {what} (ms)",
                "",
                *_speed([r for r in found.speed if (r.op, r.what) == (op, what)]),
            ]
    if picture:
        parts += [f"![times and floors]({picture})", ""]
    parts += ["### The aims", "", *(f"* {line}" for line in aims(found.speed)), ""]
    parts += ["## Memory kept for the backward pass (MiB beside the inputs; peak of both passes)", ""]
    for op in dict.fromkeys(row.op for row in found.speed):
        parts += [f"### {op}", "", *_memory([r for r in found.speed if (r.op, r.what) == (op, BOTH)])]
    parts += ["## Decoding: one token of every row (µs)", "", *_decode(found.decode)]
    if found.sparse:
        parts += ["## Sparse attention", "", *_sparse(found.sparse)]
    if found.tests is not None:
        last = (found.tests.strip().splitlines() or ["nothing printed"])[-1]
        parts += ["## Tests marked gpu", "", _cell(last), ""]
    return "\n".join(parts).rstrip() + "\n"


def aims(rows: Sequence[Row]) -> list[str]:
    """How the best backend of ours stands to flash-linear-attention and to the floor, forward + backward."""
    lines = []
    both = [row for row in rows if row.what == BOTH]
    for op, shape in dict.fromkeys((row.op, row.shape) for row in both):
        times = {
            row.backend: row for row in both if (row.op, row.shape) == (op, shape) and row.ms is not None
        }
        ours = min(
            (row for row in times.values() if row.backend != FLA), key=lambda row: row.ms, default=None
        )
        if ours is None:
            lines.append(f"{op} {shape}: none of ours was timed")
            continue
        if FLA not in times:
            lines.append(f"{op} {shape}: {ours.backend} is the fastest of ours; fla was not timed")
        else:
            ratio, aim = times[FLA].ms / ours.ms, FASTER_THAN_FLA.get(shape.units, FASTER_EVERYWHERE)
            verdict = "met" if ratio >= aim else "MISSED"
            lines.append(
                f"{op} {shape}: {ours.backend} is {ratio:.2f} x as fast as fla; aim {aim:g}: {verdict}"
            )
        if str(shape) == AIMED_SHAPE:
            for name, row in times.items():
                verdict = "met" if row.times_floor <= TIMES_FLOOR else "MISSED"
                lines.append(
                    f"{op} {shape}: {name} {row.times_floor:.1f} x floor; aim {TIMES_FLOOR:g}: {verdict}"
                )
    return lines or ["nothing was measured"]


def _table(head: Sequence[str], rows) -> list[str]:
    """A Markdown table and an empty line."""
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(x) for x in line) + " |" for line in lines] + [""]


def _cell(value: object) -> str:
    """Text that breaks no table."""
    return str(value).replace("|", "/").replace("\n", " ")


def _parity(rows: Sequence[dict]) -> list[str]:
    if not rows:
        return ["Nothing was checked.", ""]
    lines, failures = [], []
    for key in dict.fromkeys((row["backend"], row["op"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["backend"], row["op"], row["dtype"]) == key]
        able = [row for row in mine if row["check"] not in (UNABLE, UNBUILT)]
        right = [row for row in able if row["check"] == RIGHT]
        worst = max((row["error"] for row in right if row["error"] is not None), default=None)
        why = "" if able else f"{mine[0]['check']}: {mine[0]['reason']}"
        lines.append([*key, f"{len(right)} of {len(able)}", "" if worst is None else f"{worst:.1e}", why])
        failures += [row for row in able if row["check"] != RIGHT]
    head = ["backend", "operator", "dtype", "kinds of call right", "worst error of these", "why none"]
    shown = [f"* {row['check']}: {_kind(row)}: {_cell(row['reason'])}" for row in failures]
    more = [f"* and {len(shown) - 20} more, in the table of all"] if len(shown) > 20 else []
    return _table(head, lines) + (["Failures:", "", *shown[:20], *more, ""] if shown else [])


def _kind(row: dict) -> str:
    """A row of parity in words."""
    options = (" with bonus" if row["bonus"] else "") + (" and documents" if row["documents"] else "")
    return f"{row['backend']}, {row['op']}{options} {row['dtype']} N{row['head_size']} T{row['tokens']}"


def _grid(rows: Sequence[Row], show) -> list[str]:
    """One line for each shape, one column for each backend."""
    names = list(dict.fromkeys(row.backend for row in rows))
    cells = {(row.shape, row.backend): show(row) for row in rows}
    floors = {row.shape: row.floor_ms for row in rows}
    shapes = sorted(floors, key=lambda shape: (shape.units, shape.sequence_length))
    lines = [[s, s.units, f"{floors[s]:.3f}", *(cells.get((s, name), "") for name in names)] for s in shapes]
    return _table(["call", "rows x heads", "floor", *names], lines) + _reasons(rows)


def _speed(rows: Sequence[Row]) -> list[str]:
    return _grid(rows, lambda row: row.check if row.ms is None else f"{row.ms:.3f} ({row.times_floor:.1f})")


def _memory(rows: Sequence[Row]) -> list[str]:
    def show(row: Row) -> str:
        if row.extra_bytes is None:
            return row.check
        peak = "" if row.peak_bytes is None else f" ({row.peak_bytes / 2**20:.0f})"
        return f"{row.extra_bytes / 2**20:.0f}{peak}"

    names = list(dict.fromkeys(row.backend for row in rows))
    cells = {(row.shape, row.backend): show(row) for row in rows}
    shapes = sorted({row.shape for row in rows}, key=lambda shape: (shape.units, shape.sequence_length))
    return _table(["call", *names], [[s, *(cells.get((s, name), "") for name in names)] for s in shapes])


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why some have no speed, each reason once."""
    found = dict.fromkeys((row.backend, row.check, row.reason) for row in rows if row.check != RIGHT)
    lines = [f"* {name} {check}: {_cell(reason)}" for name, check, reason in found]
    return [*lines, ""] if lines else []


def _sparse(rows: Sequence[dict]) -> list[str]:
    """Parity in a line for each backend, what is wrong, and the times."""
    checked = [row for row in rows if "check" in row]
    lines = []
    for name in dict.fromkeys(row["backend"] for row in checked):
        mine = [row for row in checked if row["backend"] == name]
        right = sum(row["check"] == RIGHT for row in mine)
        lines.append(f"* {name}: {right} of {len(mine)} kinds of call right")
    lines += [
        f"* {row['check']}: {row['backend']}, {row['dtype']} N{row['head_size']} T{row['tokens']}: "
        f"{_cell(row['reason'])}"
        for row in checked
        if row["check"] != RIGHT
    ]
    return [*lines, "", *table([row for row in rows if "ms" in row]), ""]


def _decode(rows: Sequence[dict]) -> list[str]:
    if not rows:
        return ["Nothing was measured.", ""]

    def micro(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    lines = [
        [
            row["op"], row["rows_times_heads"], row["backend"], row["check"], micro(row["plain_us"]),
            micro(row["graph_us"]), micro(row["floor_us"]), "" if row["check"] == RIGHT else row["reason"],
        ]
        for row in rows
    ]  # fmt: skip
    return _table(
        ["operator", "rows x heads", "backend", "check", "plain", "CUDA graph", "floor", "why not"], lines
    )
