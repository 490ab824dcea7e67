"""The contract of `summary.json`: the numbers of a run, for people and for other programs.

Units: losses, KL and copy gain in nats/token; tokens and seconds are those of the stage alone, not running
totals. `None` (JSON null) stands for a number that was not measured or has no meaning, such as the KL of a
run without a teacher. A loss that has diverged stays what it is: `NaN` and `Infinity` are written in Python's
JSON spelling.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

STAGE_NUMBERS = (
    "loss",
    "perplexity",
    "kl",
    "top1_agreement",
    "gap_recovered",
    "copy_gain",
    "tokens",
    "seconds",
    "tokens_per_second",
)
TEACHER_NUMBERS = ("loss", "perplexity", "copy_gain")
SECTIONS = ("teacher", "stages", "kernels", "student", "seed")


def perplexity(loss: float) -> float:
    """Returns exp(loss) of a loss in nats/token, infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def gap_recovered(loss: float, transfer_loss: float | None, teacher_loss: float | None) -> float | None:
    """Returns the share of the loss gap right after weight transfer that has been closed.

    Args:
        loss: loss of the student now, nats/token.
        transfer_loss: loss of the student right after weight transfer, nats/token, or None if unknown.
        teacher_loss: loss of the teacher, nats/token, or None if there is no teacher.

    Returns:
        (transfer_loss - loss) / (transfer_loss - teacher_loss): 0 right after transfer, 1 at the teacher's
        loss; None if one of the ends is unknown or the two coincide.
    """
    if transfer_loss is None or teacher_loss is None or transfer_loss == teacher_loss:
        return None
    return (transfer_loss - loss) / (transfer_loss - teacher_loss)


def stage_entry(
    *,
    name: str,
    loss: float,
    tokens: int,
    seconds: float,
    kl: float | None = None,
    top1_agreement: float | None = None,
    copy_gain: float | None = None,
    transfer_loss: float | None = None,
    teacher_loss: float | None = None,
) -> dict:
    """Builds one element of `summary["stages"]`, with the numbers that follow from the others filled in.

    Args:
        name: name of the stage.
        loss: mean next-token cross-entropy on the validation split after the stage, nats/token.
        tokens: training tokens of this stage alone.
        seconds: wall-clock seconds of this stage alone.
        kl: KL(teacher || student) on the same tokens, nats/token.
        top1_agreement: share of positions where teacher and student prefer the same token, 0 to 1.
        copy_gain: loss on the first minus loss on the second copy of a repeated passage, nats/token.
        transfer_loss: loss right after weight transfer, for the recovered gap.
        teacher_loss: loss of the teacher, for the recovered gap.
    """
    return {
        "name": name,
        "loss": loss,
        "perplexity": perplexity(loss),
        "kl": kl,
        "top1_agreement": top1_agreement,
        "gap_recovered": gap_recovered(loss, transfer_loss, teacher_loss),
        "copy_gain": copy_gain,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
    }


def validate_summary(summary: Mapping) -> None:
    """Checks a summary against the contract; further keys are allowed anywhere.

    Raises:
        ValueError: a required key is missing or holds the wrong kind of value; the message names the key.
    """
    _require_keys(summary, SECTIONS, "summary")
    if summary["teacher"] is not None:
        _require_numbers(summary["teacher"], TEACHER_NUMBERS, "teacher")
    if not isinstance(summary["stages"], list):
        raise ValueError(f"summary: 'stages' must be a list, got {type(summary['stages']).__name__}")
    names = []
    for index, stage in enumerate(summary["stages"]):
        _require_numbers(stage, STAGE_NUMBERS, f"stages[{index}]")
        if not isinstance(stage.get("name"), str) or not stage["name"]:
            raise ValueError(
                f"summary: 'stages[{index}].name' must be a non-empty string, got {stage.get('name')!r}"
            )
        names.append(stage["name"])
    if len(set(names)) != len(names):
        raise ValueError(f"summary: two stages share a name ({', '.join(names)}); give every stage its own")
    _require_mapping(summary["kernels"], "kernels")
    for operator, choice in summary["kernels"].items():
        _require_keys(choice, ("backend", "reason"), f"kernels.{operator}")
    _require_keys(summary["student"], ("parameters", "state_bytes_per_row", "layer_plan"), "student")


def write_summary(path: str | Path, summary: Mapping) -> Path:
    """Writes a checked summary so that a reader sees the old file or the whole new one, never a part.

    Floats are written with the shortest digits that read back to the same value.

    Args:
        path: the file to write, usually `<run folder>/summary.json`.
        summary: `{"teacher", "stages", "kernels", "student", "seed"}`, plain Python numbers only.

    Raises:
        ValueError: the summary breaks the contract (see `validate_summary`).
    """
    validate_summary(summary)
    return write_text(path, json.dumps(dict(summary), indent=2) + "\n")


def read_summary(path: str | Path) -> dict:
    """Reads and checks a `summary.json`.

    Raises:
        ValueError: the file is not JSON or breaks the contract.
    """
    try:
        summary = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a summary: {error}") from error
    validate_summary(summary)
    return summary


def write_text(path: str | Path, text: str) -> Path:
    """Replaces a text file in one step: written beside it, flushed to disk, renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _require_mapping(value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"summary: '{where}' must be a mapping, got {type(value).__name__}")


def _require_keys(value: object, keys: tuple[str, ...], where: str) -> None:
    _require_mapping(value, where)
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"summary: '{where}' lacks {', '.join(missing)}")


def _require_numbers(value: object, keys: tuple[str, ...], where: str) -> None:
    _require_keys(value, keys, where)
    for key in keys:
        number = value[key]
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(
                f"summary: '{where}.{key}' must be a plain Python number or None, "
                f"got {type(number).__name__}; convert tensors and arrays with float()"
            )
