"""Multi-query associative recall (MQAR, arXiv 2312.04927): rows of pairs of a key and a value, and keys that
are asked for later.

A row is a pure function of its index. Its ids come from three ranges that share none:

    0 is never used | fillers | keys | values

Shape letters: B rows, T tokens per row, P pairs of a row.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.packing import IGNORED, Row, Rows
from data.row_module import VALIDATION_SEED, RowDataModule

PLACEMENTS = ("first_part", "interleaved")
DISTANCES = ("uniform", "power_law")
TRAINING, HELD_OUT = 0, 1  # streams of random numbers: no row of one is drawn as a row of the other
NO_TEXT = "data=mqar has no text, which {} needs; leave it out of stages, or take other data."


@dataclass(frozen=True, kw_only=True)
class Mqar:
    """The task: P pairs in each row, every key once; then every key is asked for once.

    The label at a queried key is its value; no other token has one, and the value does not follow: what
    stands between pairs and queries is filler.

    Args:
        fillers: how many ids are filler; what is left of the vocabulary is shared by keys and values.
        placement: `first_part` puts the pairs at random places of the first part of the row and the queries
            into the rest; `interleaved` puts both anywhere, each query behind its pair.
        first_part: share of the row that is the first part.
        distances: of the queries from the end of the first part: `uniform`, or `power_law`, by which a place
            at distance d is drawn in proportion to d^(power - 1), most of them near.
        power: of that law, in (0, 1]; 1 is uniform.

    Raises:
        ValueError: for an unknown word or a number out of range, and for a law that has no effect.
    """

    fillers: int = 64
    placement: str = "first_part"
    first_part: float = 0.5
    distances: str = "uniform"
    power: float = 0.01

    def __post_init__(self) -> None:
        for field, known in (("placement", PLACEMENTS), ("distances", DISTANCES)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is unknown; choose one of {', '.join(known)}."
                )
        if self.fillers < 1:
            raise ValueError(f"fillers={self.fillers} must be at least 1.")
        if not 0 < self.first_part < 1:
            raise ValueError(f"first_part={self.first_part} must lie between 0 and 1.")
        if not 0 < self.power <= 1:
            raise ValueError(f"power={self.power} must lie in (0, 1].")
        if self.placement == "interleaved" and self.distances != "uniform":
            raise ValueError(
                f"distances={self.distances} has no effect with placement=interleaved; set distances=uniform."
            )

    def most_pairs(self, row_length: int) -> int:
        """How many pairs and queries a row of T tokens has room for."""
        if self.placement == "interleaved":
            return row_length // 3
        first = int(self.first_part * row_length)
        return min(first // 2, row_length - first)

    def check(self, row_length: int, pairs: int, key: str, vocabulary_size: int | None = None) -> None:
        """Refuses rows without room for their pairs, and a vocabulary with too few keys or values.

        Args:
            row_length: T, tokens.
            pairs: P.
            key: of the config that gives P, for the message.
            vocabulary_size: ids, or None where it is not known yet.

        Raises:
            ValueError: naming the key.
        """
        if not 1 <= pairs <= self.most_pairs(row_length):
            raise ValueError(
                f"{key}: {pairs} pairs do not fit rows of {row_length} tokens, which have room for 1 to "
                f"{self.most_pairs(row_length)}; take fewer pairs or longer rows."
            )
        if vocabulary_size is not None and self.key_count(vocabulary_size) < pairs:
            raise ValueError(
                f"{key}: {pairs} pairs need as many different keys and values, and a vocabulary of "
                f"{vocabulary_size} tokens with {self.fillers} fillers has "
                f"{max(self.key_count(vocabulary_size), 0)} of each; take a larger vocabulary (such as "
                "tokenizer.vocabulary_size), or fewer pairs."
            )

    def key_count(self, vocabulary_size: int) -> int:
        """Keys of a vocabulary; there are as many values."""
        return (vocabulary_size - 1 - self.fillers) // 2


@dataclass(frozen=True)
class Load:
    """How many pairs the rows of a length hold.

    Args:
        density: pairs for each token, rounded; at least one pair.
        per_row: row length -> pairs, where the density does not count.
    """

    density: float
    per_row: Mapping[int, int]

    def pairs(self, row_length: int) -> int:
        """P of rows of T tokens."""
        return self.per_row.get(row_length, max(1, round(self.density * row_length)))


class MqarRows:
    """The rows of `Mqar`.

    Args:
        task: what the rows are like.
        vocabulary_size: ids that they are made of.
        load: pairs of a row.
        row_length: T.
        seed, stream: of everything that is drawn.
        start: the draw that is row 0.
    """

    def __init__(
        self,
        task: Mqar,
        vocabulary_size: int,
        load: Load,
        row_length: int,
        seed: int,
        stream: int,
        *,
        start: int = 0,
    ):
        self.task, self.vocabulary_size, self.load = task, vocabulary_size, load
        self.row_length, self.seed, self.stream, self.start = row_length, seed, stream, start

    def row(self, index: int) -> Row:
        """The row at a position: one document."""
        generator = np.random.default_rng([self.stream, self.seed, self.start + index])
        pairs, count = self.load.pairs(self.row_length), self.task.key_count(self.vocabulary_size)
        first_key = 1 + self.task.fillers
        keys = first_key + generator.permutation(count)[:pairs]
        values = first_key + count + generator.permutation(count)[:pairs]
        place = {"first_part": self._in_two_parts, "interleaved": self._interleaved}[self.task.placement]
        stored, asked = place(generator, pairs)
        tokens = generator.integers(1, first_key, self.row_length)
        tokens[stored], tokens[stored + 1], tokens[asked] = keys, values, keys
        labels = np.full(self.row_length, IGNORED, np.int64)
        labels[asked] = values
        return Row(tokens.astype(np.int64), labels, np.zeros(self.row_length, np.int32))

    def split(self, count: int, row_length: int) -> tuple["MqarRows", "MqarRows"]:
        """These rows, and rows of another length with the draws after the first `count`."""
        others = (self.task, self.vocabulary_size, self.load, row_length, self.seed, self.stream)
        return self, MqarRows(*others, start=self.start + count)

    def _in_two_parts(self, generator: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Places [P] of the stored keys, in the first part, and of the same keys as queries, after it."""
        first = int(self.task.first_part * self.row_length)
        stored = generator.permutation(_spread(generator, first, np.full(pairs, 2)))
        room = self.row_length - first
        weights = np.arange(1.0, room + 1) ** (self.task.power - 1)
        shares = None if self.task.distances == "uniform" else weights / weights.sum()
        return stored, first + generator.choice(room, pairs, replace=False, p=shares)

    def _interleaved(self, generator: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Places [P] of the stored keys and of the same keys as queries, each query behind its pair."""
        order = generator.permutation(np.repeat(np.arange(pairs), 2))  # the first of two is the pair
        sizes, first = np.ones(2 * pairs, np.int64), np.unique(order, return_index=True)[1]
        sizes[first] = 2
        starts = _spread(generator, self.row_length, sizes)
        last = 2 * pairs - 1 - np.unique(order[::-1], return_index=True)[1]
        return starts[first], starts[last]


class MqarDataModule(RowDataModule):
    """Rows of multi-query associative recall; the other arguments are those of `RowDataModule`.

    Args:
        tokenizer: gives the number of ids; None where only the config is checked.
        task: what the rows are like.
        pair_density: pairs for each token of a row, rounded; at least one pair.
        pairs_per_row: row length -> pairs, where `pair_density` does not count.

    Raises:
        ValueError: naming the key, where rows have no room for their pairs or the vocabulary is too small.
    """

    labels_answers = True

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        task: Mqar,
        pair_density: float,
        pairs_per_row: Mapping[int, int],
        row_length: int,
        rows_per_device: int,
        validation_rows: int,
        repeat_first_rows: int,
        workers: int,
        seed: int,
    ):
        super().__init__(
            row_length=row_length,
            rows_per_device=rows_per_device,
            validation_rows=validation_rows,
            repeat_first_rows=repeat_first_rows,
            workers=workers,
            seed=seed,
        )
        self.task = task
        self.load = Load(pair_density, {int(length): int(pairs) for length, pairs in pairs_per_row.items()})
        self.vocabulary_size = None if tokenizer is None else len(tokenizer)
        if not 0 < pair_density < 1:
            raise ValueError(f"data.pair_density={pair_density} must lie between 0 and 1.")
        named = row_length in self.load.per_row
        key = f"data.pairs_per_row[{row_length}]" if named else f"data.pair_density={pair_density}"
        task.check(row_length, self.load.pairs(row_length), key, self.vocabulary_size)

    def endless_rows(self, row_length: int) -> Rows:
        """Rows that are drawn anew without end."""
        return self._rows(row_length, self.seed, TRAINING)

    def validation_batches(self, rows: int | None = None) -> list[dict[str, Tensor]]:
        """As `RowDataModule.validation_batches`; other rows than any training row of any seed."""
        made = self._rows(self.row_length, VALIDATION_SEED, HELD_OUT)
        return self.batches([made.row(index) for index in range(rows or self.validation_rows)])

    def row_inputs(self) -> dict[str, Any]:
        """As `RowDataModule.row_inputs`."""
        return {
            "task": asdict(self.task),
            "vocabulary_size": self.vocabulary_size,
            "row_length": self.row_length,
            "pairs": self.load.pairs(self.row_length),
            "seed": self.seed,
        }

    def copy_batches(self) -> list[dict[str, Tensor]]:
        """None: there is no text."""
        return []

    def calibration_batches(self, rows: int) -> None:
        """Refused: there is no text."""
        raise ValueError(NO_TEXT.format("calibrate or select"))

    def retrieval_batches(self, task: Any, rows: int, **options: Any) -> None:
        """Refused: there is no text."""
        raise ValueError(NO_TEXT.format("select"))

    def _rows(self, row_length: int, seed: int, stream: int) -> MqarRows:
        return MqarRows(self.task, self.vocabulary_size, self.load, row_length, seed, stream)


def _spread(generator: np.random.Generator, room: int, sizes: np.ndarray) -> np.ndarray:
    """Where things of the given sizes [n] begin, in their order, at random in `room` places without overlap:
    each arrangement is as likely as any other."""
    gaps = generator.choice(room - int(sizes.sum()) + len(sizes), len(sizes), replace=False)
    return np.sort(gaps) + np.cumsum(sizes) - sizes - np.arange(len(sizes))
