"""The part `copies` of the evaluation suite `long_context`: copying by the length of the row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        cells = {length: self._cell(place, data, length) for length in self.row_lengths}
        figures = [
            figure_of(
                f"copy_gain_{length}",
                f"copy gain, {length:,} tokens ({len(rows['model'])} rows)",
                {who: [gain for gain, _ in of] for who, of in rows.items()},
                ".3f",
            )
            for length, rows in cells.items()
        ]
        details = {
            who: [
                {
                    "row_length": length,
                    **mean_of([gain for gain, _ in rows[who]])._asdict(),
                    "cache_bytes": rows[who][0][1],
                }
                for length, rows in cells.items()
            ]
            for who in place.models
        }
        picture = Picture(
            file="plots/copies.png",
            heading="Copying by row length",
            note=f"A passage of {self.passage_length} tokens ends the row, and begins it too. What the cache "
            "of one row held in the end, in MiB: "
            + "; ".join(_memory(who, told) for who, told in details.items()),
        )
        gain_by_length(place.folder / picture.file, gains=details)
        return Found(figures, [picture], {"copies": details})

    def _cell(self, place: Place, data: Any, length: int) -> dict[str, list[tuple[float, int]]]:
        """Gain and bytes of each row, for each model."""
        batches = {
            shown: data.retrieval_batches(
                DistantCopies(passage_length=self.passage_length, shown=shown),
                self.rows,
                held_out=True,
                row_length=length,
            )
            for shown in (True, False)
        }
        found = {}
        for who, model in place.models.items():
            read: Mapping[bool, list[Read]] = {
                shown: cached_losses(model, rows, place.prefill_chunk) for shown, rows in batches.items()
            }
            pairs = zip(read[True], read[False], strict=True)
            found[who] = [(other.loss - seen.loss, seen.cache_bytes) for seen, other in pairs]
        return found


def _memory(who: str, told: Sequence[Mapping[str, Any]]) -> str:
    sizes = ", ".join(f"{cell['cache_bytes'] / 2**20:.2f} ({cell['row_length']:,} tokens)" for cell in told)
    return f"{who} {sizes}"
