"""The part `mqar` of the evaluation suite `long_context`: associative recall by the number of pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.mqar import HELD_OUT, Load, Mqar, MqarRows
from data.row_module import VALIDATION_SEED, in_batches
from models.retrieval import answered_share
from pipeline.evaluation import Subject
from pipeline.long_context_parts import Found, Place, check_least, check_lists, figure_of, mean_of
from reports.eval_report import Figure, Picture
from reports.long_context_plot import recall_by_pairs


@dataclass(frozen=True, kw_only=True)
class RecallCurves:
    """Multi-query associative recall over row lengths and numbers of pairs.

    Args:
        task: what the rows are like (data/mqar.py); ids are those of the model's tokenizer.
        row_lengths: tokens, ascending.
        pairs: of a row, ascending; combinations without room are left out.
        rows: of each combination.
        rows_per_batch: that are answered at once.

    Raises:
        ValueError: for an empty list, a count below 1, or where nothing has room.
    """

    task: Mqar
    row_lengths: Sequence[int]
    pairs: Sequence[int]
    rows: int
    rows_per_batch: int
    key = "suite.mqar"

    def __post_init__(self) -> None:
        check_lists(self, "row_lengths", "pairs")
        check_least(self, "rows", "rows_per_batch")
        for length in self.row_lengths:
            self.task.check(length, self.pairs[0], f"{self.key}.pairs")

    def check_subject(self, subject: Subject) -> None:
        """Refuses a tokenizer without enough keys and values for the fewest pairs.

        Raises:
            ValueError: naming the key.
        """
        self.task.check(self.row_lengths[0], self.pairs[0], f"{self.key}.pairs", len(subject.tokenizer))

    def run(self, place: Place) -> Found:
        """Measures each combination, and draws one curve for each row length."""
        vocabulary_size = len(place.subject.tokenizer)
        combinations = [
            (length, pairs)
            for length in self.row_lengths
            for pairs in self.pairs
            if pairs <= min(self.task.most_pairs(length), self.task.key_count(vocabulary_size))
        ]
        figures, cells = [], {who: {} for who in place.models}
        for length, pairs in combinations:
            load = Load(0.0, {length: pairs})
            rows = MqarRows(self.task, vocabulary_size, load, length, VALIDATION_SEED, HELD_OUT)
            batches = in_batches([rows.row(index) for index in range(self.rows)], self.rows_per_batch)
            shares = {
                who: [answered_share([row]) for row in answered]
                for who, answered in place.answers(batches).items()
            }
            for who, values in shares.items():
                cells[who][length, pairs] = mean_of(values)
            label = f"mqar, {length:,} tokens, {pairs:,} pairs ({self.rows} rows)"
            figures.append(figure_of(f"mqar_{length}_{pairs}", label, shares, ".1%"))
        return self._told(place, figures, cells)

    def _told(self, place: Place, figures: list[Figure], cells: Mapping) -> Found:
        picture = Picture(
            file="plots/mqar.png",
            heading="Multi-query associative recall",
            note=f"The share of right values, over {self.rows} rows for each point. A model that was trained "
            "on such rows is asked beyond its trained load to the right, and beyond its trained length on "
            "the curves of longer rows.",
        )
        curves = {
            who: {
                length: [
                    found[length, pairs].mean if (length, pairs) in found else None for pairs in self.pairs
                ]
                for length in self.row_lengths
            }
            for who, found in cells.items()
        }
        recall_by_pairs(place.folder / picture.file, pairs=self.pairs, shares=curves)
        details = {
            who: [{"row_length": cell[0], "pairs": cell[1], **mean._asdict()} for cell, mean in found.items()]
            for who, found in cells.items()
        }
        return Found(figures, [picture], {"mqar": details})
