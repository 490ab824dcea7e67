"""Rows of tokens from documents. A row is a pure function of its index, so a position can always be restored.

Shape letters: T tokens per row.
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from data.token_store import TokenDocuments

IGNORED = -100  # label of a position that has no next token


class Row(NamedTuple):
    """One row: input_ids [T] int64, labels [T] int64 (the token that follows, or -100), document_ids [T]
    int32."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray


class Rows(Protocol):
    """An endless, reproducible sequence of rows."""

    def row(self, index: int) -> Row:
        """The row at a position, for any index >= 0."""


class PackedRows:
    """Documents one after the other, in an order shuffled anew each epoch, cut into rows without loss.

    A document that does not fit continues in the next row of the epoch's stream (as a document of its own: no
    state crosses rows). Rows are shuffled within the epoch. Only the tail of an epoch, at most T tokens, is
    left out.

    Args:
        store: the tokenised documents.
        row_length: T.
        seed: of the order of documents and rows; None keeps the store's order (validation).
        cross_documents: give all tokens of a row one document number, so that state and attention run on.
    """

    def __init__(
        self, store: TokenDocuments, row_length: int, seed: int | None, cross_documents: bool = False
    ):
        self.store, self.row_length, self.seed = store, row_length, seed
        self.cross_documents = cross_documents
        total = int(store.lengths.sum())
        self.rows_per_epoch = (total - 1) // row_length  # the last label needs one token more
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"data.row_length={row_length} needs {row_length + 1} tokens, and this split of a source "
                f"has {total}; lower it, or give the source more documents."
            )
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def row(self, index: int) -> Row:
        """The row at a position; epochs follow one another."""
        epoch, position = divmod(index, self.rows_per_epoch)
        documents, ends, rows = self._epoch(epoch)
        start = int(rows[position]) * self.row_length
        first = int(np.searchsorted(ends, start, side="right"))
        tokens = np.empty(self.row_length + 1, np.int64)
        ids = np.empty(self.row_length + 1, np.int32)
        filled, number = 0, 0
        while filled <= self.row_length:
            document = self.store.document(int(documents[first + number]))
            offset = len(document) - (int(ends[first + number]) - start - filled)
            piece = document[offset : offset + self.row_length + 1 - filled]
            tokens[filled : filled + len(piece)] = piece
            ids[filled : filled + len(piece)] = 0 if self.cross_documents else number
            filled, number = filled + len(piece), number + 1
        return shifted_row(tokens, ids)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of documents, their ends in the epoch's stream, and order of rows."""
        documents, rows = np.arange(len(self.store)), np.arange(self.rows_per_epoch)
        if self.seed is not None:
            generator = np.random.default_rng([self.seed, epoch])
            documents, rows = generator.permutation(documents), generator.permutation(rows)
        return documents, np.cumsum(self.store.lengths[documents]), rows


class RepeatedPassages:
    """Passages of held-out or training text shown again and again in one row: what in-context copying is
    measured on.

    Args:
        store: the tokenised documents; those shorter than the shortest passage are not used.
        row_length: T.
        passage_lengths: shortest and longest passage, in tokens; the row repeats its passage until it is
            full.
        seed: of the choice of passages.
    """

    def __init__(self, store: TokenDocuments, row_length: int, passage_lengths: tuple[int, int], seed: int):
        self.store, self.row_length, self.seed = store, row_length, seed
        self.shortest, self.longest = passage_lengths
        self.documents = np.flatnonzero(store.lengths > self.shortest)  # the end-of-text token is not copied
        if not len(self.documents):
            raise ValueError(
                f"no document of this split of a source has the {self.shortest} tokens of a passage; lower "
                "data.copy_passage_length (held-out text) or data.row_length (training), or give longer "
                "documents."
            )

    def row(self, index: int) -> Row:
        """The row at a position: passage and place drawn from (seed, index)."""
        generator = np.random.default_rng([self.seed, index])
        document = self.store.document(int(generator.choice(self.documents)))[:-1]
        length = int(generator.integers(self.shortest, min(self.longest, len(document)) + 1))
        start = int(generator.integers(0, len(document) - length + 1))
        passage = document[start : start + length].astype(np.int64)
        tokens = np.resize(passage, self.row_length + 1)
        row = shifted_row(tokens, np.zeros(self.row_length + 1, np.int32))
        row.labels[-1] = IGNORED if self.row_length % length == 0 else row.labels[-1]
        return row


class MixedRows:
    """Several sequences of rows, drawn in fixed proportions.

    Args:
        parts: the sequences.
        weights: their relative shares of rows, positive.
    """

    pattern_length = 1000  # shares are exact to a thousandth

    def __init__(self, parts: list[Rows], weights: list[float]):
        self.parts = parts
        shares = np.asarray(weights, float) / sum(weights)
        counts = np.zeros(len(parts), int)
        pattern = []
        for step in range(1, self.pattern_length + 1):  # whoever lags furthest behind its share comes next
            choice = int(np.argmax(shares * step - counts))
            counts[choice] += 1
            pattern.append(choice)
        if not counts.all():
            raise ValueError(
                "data.weights and data.repeated_share give shares of "
                f"{[round(float(share), 6) for share in shares]}, "
                f"of which the smallest would never be drawn; keep every share above 1/{self.pattern_length}."
            )
        self._pattern = np.asarray(pattern)
        self._counts = counts
        self._before = np.stack(
            [np.cumsum(self._pattern == part) - (self._pattern == part) for part in range(len(parts))]
        )

    def row(self, index: int) -> Row:
        """The row at a position; each part advances by one for each of its turns."""
        block, place = divmod(index, self.pattern_length)
        part = int(self._pattern[place])
        return self.parts[part].row(block * int(self._counts[part]) + int(self._before[part, place]))


class FirstRows:
    """The first rows of a sequence again and again, for overfitting on purpose."""

    def __init__(self, rows: Rows, count: int):
        self.rows, self.count = rows, count

    def row(self, index: int) -> Row:
        """The row at a position, modulo `count`."""
        return self.rows.row(index % self.count)


def shifted_row(tokens: np.ndarray, document_ids: np.ndarray) -> Row:
    """Turns T + 1 tokens and their document ids into a row whose labels are the next token of the same
    document."""
    same = document_ids[1:] == document_ids[:-1]
    return Row(tokens[:-1].copy(), np.where(same, tokens[1:], IGNORED), document_ids[:-1].copy())
