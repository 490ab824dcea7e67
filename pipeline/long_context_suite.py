"""The evaluation suite `long_context`: what a model does with long rows, beside its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.launch import build
from pipeline.evaluation import Subject
from pipeline.long_context_parts import Found, Place
from reports.eval_report import Findings

PARTS = ("needles", "copies", "positions", "mqar")
EXPLANATION = (
    "Needles: facts are hidden in long rows, and the end of a row asks for one of them; a figure is the "
    "share of answers that greedy decoding writes right to the last token, through the decoding cache. Copy "
    "gain: how much lower the loss of a passage is where the row began with it than where it began with "
    "another one, in nats per token, read through the cache. Loss: held-out text in nats per token, by "
    "position in the row. MQAR: the share of values that are recalled when their keys come again. ± is the "
    "standard error over rows. Difference is model - teacher, relative is model / teacher."
)


@dataclass(frozen=True, kw_only=True)
class LongContextSuite:
    """Needles by row length and depth, copying over a distance, loss by position, associative recall.

    Args:
        parts: which of `needles`, `copies`, `positions` and `mqar` are measured.
        data: config of the data module whose held-out documents are read; the model's tokenizer is added.
        prefill_chunk: tokens of each row that go through the decoding cache at once.
        needles, copies, positions, mqar: configs of the parts (pipeline/long_context_<part>.py).

    Raises:
        ValueError: for an unknown part or none, a chunk below 1, or what a part refuses.
    """

    parts: Sequence[str]
    data: Mapping[str, Any]
    prefill_chunk: int
    needles: Mapping[str, Any]
    copies: Mapping[str, Any]
    positions: Mapping[str, Any]
    mqar: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = [name for name in self.parts if name not in PARTS]
        if unknown or not self.parts:
            said = f"{unknown[0]!r} is unknown" if unknown else "is empty"
            raise ValueError(f"suite.parts: {said}; choose from {', '.join(PARTS)}.")
        if self.prefill_chunk < 1:
            raise ValueError(f"suite.prefill_chunk={self.prefill_chunk} must be at least 1.")
        for name in self.parts:
            self.part(name)

    def part(self, name: str) -> Any:
        """The part of that name."""
        return build(getattr(self, name), f"suite.{name}")

    def run(self, model: Subject, teacher: Subject | None, folder: Path) -> Findings:
        """Measures, and draws into `<folder>/plots`."""
        parts = [self.part(name) for name in self.parts]
        for part in parts:
            part.check_subject(model)
        subjects = {"model": model} | ({"teacher": teacher} if teacher is not None else {})
        models = {name: subject.load() for name, subject in subjects.items()}
        place = Place(model, models, self.data, self.prefill_chunk, folder)
        found = Found()
        for part in parts:
            found.add(part.run(place))
        return Findings(
            figures=found.figures, explanation=EXPLANATION, pictures=found.pictures, details=found.details
        )
