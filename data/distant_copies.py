"""A passage of text at both ends of a row, with other text between: what copying over a distance is measured
on.

Shape letters: T tokens per row.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.packing import IGNORED, PackedRows, Row, shifted_row
from data.token_store import TokenDocuments


@dataclass(frozen=True, kw_only=True)
class DistantCopies:
    """Rows that end with a passage, all of whose tokens but the first have labels.

    Args:
        passage_length: tokens.
        shown: whether the row begins with that passage; if not, it begins with another one, and everything
            else is the same. The difference in loss is what copying gains.
    """

    passage_length: int
    shown: bool

    def check_row_length(self, row_length: int, key: str) -> None:
        """Refuses rows without room.

        Raises:
            ValueError: naming the key.
        """
        if self.passage_length < 2 or row_length < 2 * self.passage_length:
            raise ValueError(
                f"{key}: rows of {row_length} tokens have no room for a passage of {self.passage_length} "
                "twice, or it has fewer than 2 tokens; change passage_length, or take longer rows."
            )

    def rows(
        self, store: TokenDocuments, tokenizer: PreTrainedTokenizerBase, row_length: int, seed: int
    ) -> "DistantCopyRows":
        """Rows of a store; the tokenizer makes no difference."""
        return DistantCopyRows(self, store, row_length, seed)


class DistantCopyRows:
    """Rows drawn from (seed, index).

    Args:
        task: what they are like.
        store: the tokenised documents.
        row_length: T.
        seed: of all draws.

    Raises:
        ValueError: where no two documents have the tokens of a passage.
    """

    def __init__(self, task: DistantCopies, store: TokenDocuments, row_length: int, seed: int):
        self.task, self.store, self.row_length, self.seed = task, store, row_length, seed
        self.documents = np.flatnonzero(store.lengths > task.passage_length)  # beside their end-of-text token
        if len(self.documents) < 2:
            raise ValueError(
                f"fewer than two documents have the {task.passage_length} tokens of a passage; lower "
                "passage_length, or give longer documents."
            )
        self.between = PackedRows(store, row_length, seed, True)

    def row(self, index: int) -> Row:
        """The row at a position. The text between goes through the source in the order of one epoch."""
        generator, length = np.random.default_rng([self.seed, index]), self.task.passage_length
        passage, other = (
            self._passage(generator, d) for d in generator.choice(self.documents, 2, replace=False)
        )
        between = self.between.row(index).input_ids[: self.row_length + 1 - 2 * length]
        first = passage if self.task.shown else other
        # The row is one token longer than what is read: the last one is only predicted.
        tokens = np.concatenate([first, between, passage])
        row = shifted_row(tokens, np.zeros(len(tokens), np.int32))
        row.labels[: len(row.labels) - length + 1] = IGNORED
        return row

    def depth(self, index: int) -> float:
        """The first passage begins the row."""
        return 0.0

    def _passage(self, generator: np.random.Generator, document: int) -> np.ndarray:
        tokens = self.store.document(int(document))[:-1]
        start = int(generator.integers(0, len(tokens) - self.task.passage_length + 1))
        return tokens[start : start + self.task.passage_length].astype(np.int64)
