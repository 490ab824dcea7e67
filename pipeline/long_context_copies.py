"""The part `copies` of the evaluation suite `long_context`: copying by the length of the row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from conf.launch import build
from data.distant_copies import DistantCopies
from models.retrieval import Read, cached_losses
from pipeline.evaluation import Subject
from pipeline.long_context_parts import Found, Place, check_least, check_lists, figure_of, mean_of
from reports.eval_report import Picture
from reports.long_context_plot import gain_by_length


@dataclass(frozen=True, kw_only=True)
class CopiesByDistance:
    """What a model gains at a passage from having seen it where the row began.

    Args:
        row_lengths: tokens, ascending.
        passage_length: tokens.
        rows: of each row length and source.

    Raises:
        ValueError: for an empty list, a count below 1, or rows without room for the passage twice.
    """

    row_lengths: Sequence[int]
    passage_length: int
    rows: int
    key = "suite.copies"

    def __post_init__(self) -> None:
        check_lists(self, "row_lengths")
        check_least(self, "rows")
        DistantCopies(passage_length=self.passage_length, shown=True).check_row_length(
            self.row_lengths[0], f"{self.key}.row_lengths"
        )

    def check_subject(self, subject: Subject) -> None:
        """Any tokenizer will do."""

    def run(self, place: Place) -> Found:
        """Measures each row length, and draws the curve."""
        data = build(place.data, "data", tokenizer=place.subject.tokenizer)
        read = {length: self._read(place, data, length) for length in self.row_lengths}
        figures = [
            figure_of(
                f"copy_gain_{length}",
                f"copy gain, {length:,} tokens ({len(rows['model'])} rows)",
                {who: [row.gain for row in of] for who, of in rows.items()},
                ".3f",
            )
            for length, rows in read.items()
        ]
        details = {who: [_told(length, rows[who]) for length, rows in read.items()] for who in place.models}
        picture = Picture(
            file="plots/copies.png",
            heading="Copying by row length",
            note=f"A passage of {self.passage_length} tokens ends the row, and begins it too. What the cache "
            "of one row held in the end, in MiB: "
            + "; ".join(_memory(who, told) for who, told in details.items()),
        )
        gain_by_length(place.folder / picture.file, gains=details)
        return Found(figures, [picture], {"copies": details})

    def _read(self, place: Place, data: Any, length: int) -> dict[str, list["Both"]]:
        """Every row of that length, for each model."""
        batches = {
            shown: data.retrieval_batches(
                DistantCopies(passage_length=self.passage_length, shown=shown),
                self.rows,
                held_out=True,
                row_length=length,
            )
            for shown in (True, False)
        }
        return {
            who: [
                Both(*rows)
                for rows in zip(
                    *(cached_losses(model, batches[shown], place.prefill_chunk) for shown in (True, False)),
                    strict=True,
                )
            ]
            for who, model in place.models.items()
        }


class Both(NamedTuple):
    """A row that begins with its passage, and the same row that does not."""

    shown: Read
    other: Read

    @property
    def gain(self) -> float:
        """By how much the passage's loss is lower where it has been shown, nats/token."""
        return self.other.loss - self.shown.loss


def _told(length: int, rows: Sequence[Both]) -> dict[str, Any]:
    """The mean gain, the two losses that it comes from, and the memory of a row."""
    return {
        "row_length": length,
        **mean_of([row.gain for row in rows])._asdict(),
        "loss_shown": mean_of([row.shown.loss for row in rows]).mean,
        "loss_other": mean_of([row.other.loss for row in rows]).mean,
        "cache_bytes": rows[0].shown.cache_bytes,
    }


def _memory(who: str, told: Sequence[Mapping[str, Any]]) -> str:
    sizes = ", ".join(f"{cell['cache_bytes'] / 2**20:.2f} ({cell['row_length']:,} tokens)" for cell in told)
    return f"{who} {sizes}"
