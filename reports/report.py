"""The page a run leaves behind: `report.md`, with the table, the pictures and what the numbers depend on."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

from reports.plots import (
    alignment_heat_map,
    decoding_cost,
    layer_scores,
    loss_against_tokens,
    loss_by_position,
)
from reports.summary import write_text
from reports.table import MISSING, format_tokens, markdown_table, summary_markdown

# File in `plots/`, its heading in the page, what to look for in it; in the order of the page.
PICTURES = (
    ("loss.png", "Loss against tokens", "The closer the student ends to the dotted line, the less was lost."),
    ("layer_scores.png", "Layer selection", "The layers with the highest scores keep attention."),
    ("alignment_align.png", "Alignment", "Every replaced layer should darken towards the right."),
    (
        "loss_by_position.png",
        "Loss by position",
        "A gap that opens to the right means that the student uses distant context less well.",
    ),
    (
        "decoding_cost.png",
        "Decoding cost",
        "Attention pays for its context with every token; a recurrent layer does not.",
    ),
)
EXPLANATION = (
    "Held-out text. Loss, KL and copy gain in nats per token; the gap is that between the loss right after "
    "weight transfer and the teacher's; copy gain is the loss on the first minus the loss on the second copy "
    "of a repeated passage; tokens and time are those of each stage alone."
)
SECRET_KEY = re.compile(r"(^|_)(key|token|secret|password|credentials?)$", re.IGNORECASE)
DIGEST_KEYS = ("teacher", "student", "stages", "data", "seed")


def draw_plots(
    run_folder: str | Path,
    *,
    summary: Mapping,
    rows: Sequence[Mapping],
    loss_metrics: Sequence[str] = (),
    positions: Mapping | None = None,
    decoding: Mapping | None = None,
    scores: Mapping | None = None,
) -> list[Path]:
    """Draws every picture for which there is data into `<run folder>/plots`.

    Args:
        run_folder: folder of the run.
        summary: the contents of `summary.json`.
        rows: metric rows of the run, `{stage, step, tokens, metric, value}`.
        loss_metrics: metrics that are cross-entropies, drawn beside the held-out losses.
        positions: keyword arguments of `loss_by_position`.
        decoding: keyword arguments of `decoding_cost`.
        scores: keyword arguments of `layer_scores`.

    Returns:
        The files written, in the order of the page.
    """
    folder = Path(run_folder) / "plots"
    drawn = []
    if any(stage["loss"] is not None for stage in summary["stages"]):
        teacher_loss = summary["teacher"]["loss"] if summary["teacher"] is not None else None
        numbers = {"stages": summary["stages"], "teacher_loss": teacher_loss}
        drawn.append(loss_against_tokens(folder / "loss.png", rows=rows, metrics=loss_metrics, **numbers))
    if scores is not None:
        drawn.append(layer_scores(folder / "layer_scores.png", **scores))
    if any(row["stage"] == "align" and row["metric"].endswith("/alignment") for row in rows):
        drawn.append(alignment_heat_map(folder / "alignment_align.png", rows=rows))
    if positions is not None:
        drawn.append(loss_by_position(folder / "loss_by_position.png", **positions))
    if decoding is not None:
        drawn.append(decoding_cost(folder / "decoding_cost.png", **decoding))
    return drawn


def write_report(
    run_folder: str | Path,
    summary: Mapping,
    *,
    title: str,
    command: str | Sequence[str],
    config: Mapping,
    transfer: Sequence[Mapping] = (),
    scores: Mapping | None = None,
) -> Path:
    """Writes `<run folder>/report.md` from the summary, the pictures in `plots` and `environment.json`.

    Args:
        run_folder: folder of the run.
        summary: the contents of `summary.json`.
        title: first line of the page.
        command: the command that made the run, as a line or as arguments, without secrets.
        config: the composed configuration as plain dictionaries; only `teacher`, `student`, `stages`, `data`
            and `seed` are shown, so that credentials of loggers never reach the page.
        transfer: rows of one table that accounts for the teacher's tensors, such as
            `{"action": "copied", "tensors": 31, "parameters": 2_100_000}`; all rows have the same keys.
        scores: of layers, `scores`, `kept` and `label` as for `layer_scores`; they become a table.
    """
    folder = Path(run_folder)
    line = command if isinstance(command, str) else shlex.join(command)
    parts = [
        f"# {title}",
        headline(summary),
        f"```\n{line}\n```",
        "## Result",
        summary_markdown(summary),
        EXPLANATION,
        *_pictures(folder),
        *_scores(scores),
        "## Configuration",
        markdown_table(("key", "value"), list(_digest(config))),
        *_student(summary["student"]),
        "## Kernels",
        markdown_table(
            ("operator", "backend", "reason"),
            [(name, choice["backend"], choice["reason"]) for name, choice in summary["kernels"].items()],
        ),
    ]
    if transfer:
        header = list(transfer[0])
        cells = [[row[key] for key in header] for row in transfer]
        parts += ["## Weight transfer", markdown_table(header, cells, numbers=True)]
    parts += _environment(folder / "environment.json")
    return write_text(folder / "report.md", "\n\n".join(part.strip("\n") for part in parts) + "\n")


def headline(summary: Mapping) -> str:
    """Returns the result in one sentence: how far from the teacher the last stage ended."""
    if not summary["stages"] or summary["stages"][-1]["loss"] is None:
        return "No stage was measured."
    last, teacher = summary["stages"][-1], summary["teacher"]
    if teacher is None or teacher["loss"] is None:
        text = f"After stage {last['name']} the held-out loss is {last['loss']:.3f} nats/token"
        if last.get("accuracy") is not None:
            text += f", and {last['accuracy']:.1%} of the values asked for are right"
        return text + "."
    difference = last["loss"] - teacher["loss"]
    side = "above" if difference >= 0 else "below"
    text = (
        f"After stage {last['name']} the student's held-out loss is {abs(difference):.3f} nats "
        f"{side} the teacher's"
    )
    if last["top1_agreement"] is not None:
        text += f", both prefer the same token at {last['top1_agreement']:.1%} of the positions"
    if last["copy_gain"] is not None and (teacher["copy_gain"] or 0) > 0:
        text += (
            f", and {max(last['copy_gain'] / teacher['copy_gain'], 0):.0%} of the teacher's copy gain is kept"
        )
    return text + "."


def _pictures(folder: Path) -> Iterator[str]:
    for name, heading, explanation in PICTURES:
        if (folder / "plots" / name).exists():
            yield f"## {heading}"
            yield f"![{heading}](plots/{name})"
            yield explanation


def _scores(scores: Mapping | None) -> Iterator[str]:
    """The numbers by which layers have been chosen, best first."""
    if scores is None:
        return
    ranked = sorted(enumerate(scores["scores"]), key=lambda pair: -pair[1])
    rows = [(layer, f"{score:.4g}", "yes" if layer in scores["kept"] else "") for layer, score in ranked]
    yield "## Scores of layers"
    yield markdown_table(("layer", scores["label"], "keeps attention"), rows, numbers=True)


def _digest(config: Mapping) -> Iterator[tuple[str, str]]:
    for key in DIGEST_KEYS:
        if key in config:
            yield from _flatten(key, config[key])


def _flatten(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, text) for each value that is set and not named like a secret."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not SECRET_KEY.search(str(key)):
                yield from _flatten(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flatten(f"{name}[{index}]", item)
    elif value is not None:
        yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _student(student: Mapping) -> Iterator[str]:
    yield "## Student"
    numbers = count()  # an inserted layer, `+sparse`, has none
    plan = ", ".join(
        entry if entry.startswith("+") else f"{next(numbers)} {entry}" for entry in student["layer_plan"]
    )
    state = student["state_bytes_per_row"]
    rows = [
        ("parameters", format_tokens(student["parameters"])),
        ("decoding state of one row", MISSING if state is None else f"{state / 2**20:.2f} MiB"),
        ("mixer of each layer", plan),
    ]
    yield markdown_table(("student", "value"), rows)


def _environment(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    environment = json.loads(path.read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    git = environment["git"]
    code = MISSING if git is None else git["commit"] + (" with uncommitted changes" if git["dirty"] else "")
    processors = f"{environment['cpu_count']} processors, {environment['torch_threads']} torch threads"
    rows = [
        ("python", environment["python"]),
        ("platform", environment["platform"]),
        ("processors", processors),
        ("accelerators", ", ".join(environment["accelerators"]) or "none"),
        ("packages", packages),
        ("code", code),
    ]
    yield "## Environment"
    yield markdown_table(("environment", "value"), rows)
