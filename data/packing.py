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

    def split(self, count: int, row_length: int) -> tuple["Rows", "Rows"]:
        """The first `count` rows, in an order of their own, and the rows of another length that follow them:
        what the former have read comes no more in the epoch."""


class Place(NamedTuple):
    """A position in the endless stream of a source's tokens: the epoch, and the token in it."""

    epoch: int
    token: int


BEGINNING = Place(epoch=0, token=0)


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
        start: where the rows begin.
        count: how many rows will be asked for, of which none lies between others that will not; None is any
            number.
    """

    def __init__(
        self,
        store: TokenDocuments,
        row_length: int,
        seed: int | None,
        cross_documents: bool = False,
        *,
        start: Place = BEGINNING,
        count: int | None = None,
    ):
        self.store, self.row_length, self.seed = store, row_length, seed
        self.cross_documents, self.start, self.count = cross_documents, start, count
        self._total = total = int(store.lengths.sum())
        self.rows_per_epoch = (total - 1) // row_length  # the last label needs one token more
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"data.row_length={row_length} needs {row_length + 1} tokens, and this split of a source "
                f"has {total}; lower it, or give the source more documents."
            )
        self._rows_at_start = (total - 1 - start.token) // row_length  # of the epoch that the rows begin in
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def row(self, index: int) -> Row:
        """The row at a position; epochs follow one another."""
        epoch, position = self._find(index)
        documents, ends, starts = self._epoch(epoch)
        start = int(starts[position])
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

    def split(self, count: int, row_length: int) -> tuple["PackedRows", "PackedRows"]:
        """The first `count` rows, shuffled among themselves, and those of another length from there on."""
        options = (self.seed, self.cross_documents)
        end = self.start
        if count:
            epoch, position = self._find(count - 1)
            end = Place(epoch, self._offset(epoch) + (position + 1) * self.row_length)
        first = PackedRows(self.store, self.row_length, *options, start=self.start, count=count)
        return first, PackedRows(self.store, row_length, *options, start=end)

    def _find(self, index: int) -> tuple[int, int]:
        """The epoch of a row, and how many rows come before it there."""
        if index < self._rows_at_start:
            return self.start.epoch, index
        epochs, position = divmod(index - self._rows_at_start, self.rows_per_epoch)
        return self.start.epoch + 1 + epochs, position

    def _offset(self, epoch: int) -> int:
        """Where the rows begin in an epoch's stream."""
        return self.start.token if epoch == self.start.epoch else 0

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of documents, their ends in the epoch's stream, and where in it the rows start, in order."""
        later = epoch - self.start.epoch
        before = self._rows_at_start + (later - 1) * self.rows_per_epoch if later else 0
        count = self.rows_per_epoch if later else self._rows_at_start
        count = count if self.count is None else min(count, self.count - before)
        documents, rows = np.arange(len(self.store)), np.arange(count)
        if self.seed is not None:
            generator = np.random.default_rng([self.seed, epoch])
            documents, rows = generator.permutation(documents), generator.permutation(rows)
        starts = self._offset(epoch) + rows * self.row_length
        return documents, np.cumsum(self.store.lengths[documents]), starts


class RepeatedPassages:
    """Passages of held-out or training text shown again and again in one row: what in-context copying is
    measured on.

    Args:
        store: the tokenised documents; those shorter than the shortest passage are not used.
        row_length: T.
        passage_lengths: shortest and longest passage, in tokens; the row repeats its passage until it is
            full.
        seed: of the choice of passages.
        start: which of the draws is row 0.
    """

    def __init__(
        self,
        store: TokenDocuments,
        row_length: int,
        passage_lengths: tuple[int, int],
        seed: int,
        *,
        start: int = 0,
    ):
        self.store, self.row_length, self.seed, self.start = store, row_length, seed, start
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
        generator = np.random.default_rng([self.seed, self.start + index])
        document = self.store.document(int(generator.choice(self.documents)))[:-1]
        length = int(generator.integers(self.shortest, min(self.longest, len(document)) + 1))
        start = int(generator.integers(0, len(document) - length + 1))
        passage = document[start : start + length].astype(np.int64)
        tokens = np.resize(passage, self.row_length + 1)
        row = shifted_row(tokens, np.zeros(self.row_length + 1, np.int32))
        row.labels[-1] = IGNORED if self.row_length % length == 0 else row.labels[-1]
        return row

    def split(self, count: int, row_length: int) -> tuple["RepeatedPassages", "RepeatedPassages"]:
        """These rows, and rows of another length with the draws after the first `count`."""
        lengths, start = passage_range(row_length), self.start + count
        return self, RepeatedPassages(self.store, row_length, lengths, self.seed, start=start)


class MixedRows:
    """Several sequences of rows, drawn in fixed proportions.

    Args:
        parts: the sequences.
        weights: their relative shares of rows, positive.
    """

    pattern_length = 1000  # shares are exact to a thousandth

    def __init__(self, parts: list[Rows], weights: list[float]):
        self.parts, self.weights = parts, weights
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
        part = int(self._pattern[index % self.pattern_length])
        return self.parts[part].row(self._drawn(part, index))

    def split(self, count: int, row_length: int) -> tuple["MixedRows", "MixedRows"]:
        """Both halves in the same proportions; each part is split where it then stands."""
        counts = [self._drawn(part, count) for part in range(len(self.parts))]
        halves = [part.split(own, row_length) for part, own in zip(self.parts, counts, strict=True)]
        first, second = ([half[side] for half in halves] for side in (0, 1))
        return MixedRows(first, self.weights), MixedRows(second, self.weights)

    def _drawn(self, part: int, count: int) -> int:
        """Rows of a part among the first `count`."""
        block, place = divmod(count, self.pattern_length)
        return block * int(self._counts[part]) + int(self._before[part, place])


class FirstRows:
    """The first rows of a sequence again and again, for overfitting on purpose."""

    def __init__(self, rows: Rows, count: int):
        self.rows, self.count = rows, count

    def row(self, index: int) -> Row:
        """The row at a position, modulo `count`."""
        return self.rows.row(index % self.count)

    def split(self, count: int, row_length: int) -> tuple["FirstRows", "FirstRows"]:
        """These rows, and as many of another length that follow them."""
        return self, FirstRows(self.rows.split(self.count, row_length)[1], self.count)


def passage_range(row_length: int) -> tuple[int, int]:
    """Shortest and longest passage, in tokens, of training rows that repeat one."""
    return min(64, row_length // 4), row_length // 2


def shifted_row(tokens: np.ndarray, document_ids: np.ndarray) -> Row:
    """Turns T + 1 tokens and their document ids into a row whose labels are the next token of the same
    document."""
    same = document_ids[1:] == document_ids[:-1]
    return Row(tokens[:-1].copy(), np.where(same, tokens[1:], IGNORED), document_ids[:-1].copy())
