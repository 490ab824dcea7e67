"""The benchmark suite `decoding`: what one more token costs, against the context before it."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from conf.launch import quieten
from models.config import StudentConfig
from models.conversion import build_student
from models.decoding import decoding_cost
from models.layer_plan import LayerPlan, from_file
from models.mixers import MIXERS
from models.student_folder import load_model, model_folder
from reports.plots import decoding_cost as draw_decoding_cost


@dataclass(frozen=True, kw_only=True)
class DecodingSuite:
    """Times decoding of a teacher and of students made from it; what they have learned makes no difference.

    Args:
        teacher: run folder or Hugging Face folder.
        students: name -> layer plan (models.layer_plan.LayerPlan).
        contexts: tokens in the cache, ascending.
        tokens: tokens timed at each; the median counts.
        threads: of torch.
        with_teacher: whether the teacher is timed too.
        against: the student whose time at the same context the others' is divided by, or None.

    Raises:
        ValueError: `against` names no student.
    """

    teacher: str
    students: Mapping[str, LayerPlan]
    contexts: Sequence[int]
    tokens: int
    threads: int
    with_teacher: bool = True
    against: str | None = None

    def __post_init__(self) -> None:
        if self.against is not None and self.against not in self.students:
            raise ValueError(
                f"suite.against={self.against!r} is none of suite.students: {', '.join(self.students)}."
            )

    def run(self, folder: Path, seed: int) -> None:
        """Prints the table and writes decoding.csv and decoding.png."""
        quieten()
        torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        teacher = load_model(model_folder(self.teacher))
        models = {"teacher": teacher} if self.with_teacher else {}
        models |= {name: _student(teacher, plan) for name, plan in self.students.items()}
        cost = decoding_cost(models, list(self.contexts), self.tokens)
        rows = [
            {
                "model": name,
                "context": context,
                "seconds_per_token": found["seconds_per_token"][index],
                "from_median": found["seconds_per_token"][index]
                / statistics.median(found["seconds_per_token"]),
                "against": found["seconds_per_token"][index] / cost[self.against]["seconds_per_token"][index]
                if self.against
                else None,
                "cache_bytes_per_row": found["state_bytes"][index],
            }
            for name, found in cost.items()
            for index, context in enumerate(self.contexts)
        ]
        with (folder / "decoding.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        draw_decoding_cost(folder / "decoding.png", context_lengths=list(self.contexts), models=cost)
        _show(rows, self.against)
        Console().print(f"written to {folder}")


def _student(teacher: PreTrainedModel, plan: LayerPlan) -> PreTrainedModel:
    layer_count = teacher.config.num_hidden_layers
    names = from_file(plan, layer_count).resolve(layer_count, list(MIXERS))
    return build_student(teacher, StudentConfig(layer_plan=plan), names)[0].eval()


def _show(rows: list[dict], against: str | None) -> None:
    table = Table("model", title="Decoding, one row: cost of one more token")
    last = "against the\nmodel's median" if against is None else f"against\n{against}"
    for heading in ("context\n(tokens)", "time per token\n(ms)", last, "cache\n(MiB)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['context']:,}",
            f"{row['seconds_per_token'] * 1e3:.2f}",
            f"{row['from_median'] - 1:+.1%}" if against is None else f"{row['against']:.3f} x",
            f"{row['cache_bytes_per_row'] / 2**20:.2f}",
        )
    Console().print(table)
