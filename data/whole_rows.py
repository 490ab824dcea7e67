"""Rows of whole documents, padded, of which some tokens are learned: conversations, and pairs of answers.

Shape letters: T tokens per row.
"""

import logging
from bisect import bisect_left, insort
from functools import lru_cache, partial

import numpy as np

from data.packing import IGNORED, Row, Rows
from data.token_store import TokenStore

log = logging.getLogger(__name__)
PADDING = -1  # document id of a position that holds nothing
WHAT_BECOMES = {"drop": "left out", "split": "divided into stretches, each a document of its own"}
ONE_LENGTH = (
    "curriculum: conversations and pairs of answers are packed whole, so their rows keep one length; leave "
    "curriculum out of this stage and set data.row_length."
)


class WholeDocuments:
    """Documents that are packed whole: a row holds as many as fit, and padding after them.

    What shares a row is fixed (best fit, the longest first); each epoch has an order of rows of its own.

    Args:
        store: the documents, with the tokens that are learned.
        row_length: T.
        seed: of the order of rows; None keeps the order in which they were filled.
        too_long: what becomes of documents of more than T tokens: `drop`, `error` or `split` into stretches
            of T tokens that overlap by one.
        key: the config key of `too_long`.
        cross_documents: give all tokens of a row one document number.

    Raises:
        ValueError: where documents are too long and must not be, or none is left.
    """

    def __init__(
        self,
        store: TokenStore,
        row_length: int,
        seed: int | None,
        too_long: str,
        key: str,
        *,
        cross_documents: bool = False,
    ):
        self.store, self.row_length, self.cross_documents = store, row_length, cross_documents
        fits = store.lengths <= row_length
        report_too_long(store.lengths, row_length, too_long, key, "conversations")
        pieces = [(int(index), 0, int(store.lengths[index])) for index in np.flatnonzero(fits)]
        if too_long == "split":
            pieces += [piece for index in np.flatnonzero(~fits) for piece in self._stretches(int(index))]
        self._pieces = np.asarray(pieces, np.int64).reshape(-1, 3)
        rows = best_fit(self._pieces[:, 2] - self._pieces[:, 1], row_length)
        self.rows_per_epoch = int(rows.max()) + 1 if len(rows) else 0
        if not self.rows_per_epoch:
            raise ValueError(f"{key}={too_long} leaves no conversation; raise data.row_length={row_length}.")
        self._by_row = np.argsort(rows, kind="stable")
        self._ends = np.cumsum(np.bincount(rows))
        self._order = lru_cache(maxsize=2)(partial(shuffled, self.rows_per_epoch, seed))

    def row(self, index: int) -> Row:
        """The row at a position; epochs follow one another."""
        epoch, position = divmod(index, self.rows_per_epoch)
        number = int(self._order(epoch)[position])
        begin = self._ends[number - 1] if number else 0
        pieces = self._pieces[self._by_row[begin : self._ends[number]]]
        return padded_row(self.store, pieces, self.row_length, self.cross_documents)

    def split(self, count: int, row_length: int) -> tuple[Rows, Rows]:
        """Rows of whole documents keep their length.

        Raises:
            ValueError: always.
        """
        raise ValueError(ONE_LENGTH)

    def _stretches(self, index: int) -> list[tuple[int, int, int]]:
        """Stretches of a long document, one token shared by neighbours: it is the last label of one and the
        first token of the next. Those without a label are left out."""
        length, trained = int(self.store.lengths[index]), self.store.trained_tokens(index)
        starts = range(0, length - 1, self.row_length - 1)
        cuts = ((start, min(start + self.row_length, length)) for start in starts)
        return [(index, start, end) for start, end in cuts if trained[start + 1 : end].any()]


class Pairs:
    """Pairs of documents, the better one first, as two rows of one document each.

    Args:
        store: documents 2i and 2i + 1 are a pair.
        row_length: T.
        seed: of the order of pairs in each epoch; None keeps the store's.
        too_long: what becomes of pairs of which one has more than T tokens: `drop` or `error`.
        key: the config key of `too_long`.

    Raises:
        ValueError: as for `WholeDocuments`.
    """

    def __init__(self, store: TokenStore, row_length: int, seed: int | None, too_long: str, key: str):
        self.store, self.row_length = store, row_length
        whole = len(store) // 2 * 2  # data.max_tokens may have ended the store inside a pair
        longest = store.lengths[:whole].reshape(-1, 2).max(1)
        report_too_long(longest, row_length, too_long, key, "pairs")
        self._pairs = np.flatnonzero(longest <= row_length)
        self.rows_per_epoch = len(self._pairs)
        if not self.rows_per_epoch:
            raise ValueError(f"{key}={too_long} leaves no pair; raise data.row_length={row_length}.")
        self._order = lru_cache(maxsize=2)(partial(shuffled, self.rows_per_epoch, seed))

    def row(self, index: int) -> tuple[Row, Row]:
        """The pair at a position; epochs follow one another."""
        epoch, position = divmod(index, self.rows_per_epoch)
        first = 2 * int(self._pairs[self._order(epoch)[position]])
        return tuple(
            padded_row(self.store, [(document, 0, int(self.store.lengths[document]))], self.row_length, False)
            for document in (first, first + 1)
        )

    def split(self, count: int, row_length: int) -> tuple[Rows, Rows]:
        """Pairs keep their length.

        Raises:
            ValueError: always.
        """
        raise ValueError(ONE_LENGTH)


class OneByOne:
    """Rows from a sequence of groups of rows: those of a group are neighbours.

    Args:
        groups: a sequence whose `row` gives a tuple of rows.
        size: rows of a group.
    """

    def __init__(self, groups: Rows, size: int):
        self.groups, self.size = groups, size

    def row(self, index: int) -> Row:
        """The row at a position."""
        group, place = divmod(index, self.size)
        return self.groups.row(group)[place]

    def split(self, count: int, row_length: int) -> tuple[Rows, Rows]:
        """As the groups are split.

        Raises:
            ValueError: where they keep their length.
        """
        return self.groups.split(count, row_length)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: the longest pieces first, each into the fullest row that has room for it.

    Args:
        lengths: [pieces] int64, each from 1 to `capacity`.
        capacity: of a row.

    Returns:
        [pieces] int64, rows counted from 0.
    """
    rows = np.zeros(len(lengths), np.int64)
    open_rows: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys, sorted
    count = 0
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        else:
            room, row, count = capacity, count, count + 1
        rows[piece] = row
        if left := room - length:
            if left not in open_rows:
                insort(rooms, left)
            open_rows.setdefault(left, []).append(row)
    return rows


def padded_row(store: TokenStore, pieces: np.ndarray | list, row_length: int, cross_documents: bool) -> Row:
    """One row of the given pieces of documents.

    Position t has the token that follows for its label where that token is learned and of the same document.

    Args:
        store: the documents.
        pieces: (document, first token, end) each.
        row_length: T, at least the pieces' tokens.
        cross_documents: give all of them one document number.
    """
    tokens = np.zeros(row_length, np.int64)
    labels = np.full(row_length, IGNORED, np.int64)
    ids = np.full(row_length, PADDING, np.int32)
    filled = 0
    for number, (document, start, end) in enumerate(pieces):
        piece, trained = store.document(document)[start:end], store.trained_tokens(document)[start:end]
        here = slice(filled, filled + len(piece))
        tokens[here] = piece
        labels[here.start : here.stop - 1] = np.where(trained[1:], piece[1:].astype(np.int64), IGNORED)
        ids[here] = 0 if cross_documents else number
        filled = here.stop
    return Row(tokens, labels, ids)


def shuffled(count: int, seed: int | None, epoch: int) -> np.ndarray:
    """The order of `count` things in an epoch; without a seed their own."""
    return np.arange(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count)


def report_too_long(lengths: np.ndarray, row_length: int, too_long: str, key: str, what: str) -> None:
    """Says how many documents do not fit into a row, and what becomes of them.

    Raises:
        ValueError: where `too_long` is `error` and there is one.
    """
    count = int((lengths > row_length).sum())
    if not count:
        return
    said = (
        f"{count} of {len(lengths)} {what} ({count / len(lengths):.2%}) have more than "
        f"data.row_length={row_length} tokens, the longest {int(lengths.max())}"
    )
    if too_long == "error":
        raise ValueError(f"{said}; raise data.row_length, or set {key}=drop.")
    log.warning("%s; %s=%s: they are %s.", said, key, too_long, WHAT_BECOMES[too_long])
