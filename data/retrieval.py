"""Retrieval rows: facts hidden in real text, and at the end a question whose answer stands in the row.

The form is that of NIAH-2 (RULER, arXiv 2404.06654): the haystack is text of a document source, a needle is
one line `<key> = <value>`, and the question repeats a needle up to its value. A row is a pure function of its
index.

Shape letters: B rows, T tokens per row.
"""

import math
import string
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.packing import IGNORED, Row, shifted_row
from data.token_store import TokenDocuments

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
LINE_SEARCH = 64  # tokens before a needle's place in which a line break is looked for


class RetrievalRows(Protocol):
    """An endless, reproducible sequence of rows that each end with a question and its answer."""

    def row(self, index: int) -> Row:
        """The row at a position; only the answer's tokens have labels."""

    def depth(self, index: int) -> float:
        """How far down the haystack the answer stands, in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Needles:
    """A task: some facts of one form in each row, one of which is asked for.

    Args:
        needles: facts in each row; all but one are distractors.
        template: of a fact, with `{key}` and then `{value}`; what stands before the value is the question.
        key_length, value_length: characters.
        characters: that keys and values are made of; none appears twice in a key, or in a value.

    Raises:
        ValueError: for a template without its two fields in that order, or too few different keys.
    """

    needles: int = 1
    template: str = "\n{key} = {value}\n"
    key_length: int = 4
    value_length: int = 4
    characters: str = string.ascii_uppercase

    def __post_init__(self) -> None:
        if self.needles < 1:
            raise ValueError(f"needles={self.needles} must be at least 1.")
        before, key, rest = self.template.partition("{key}")
        between, value, after = rest.partition("{value}")
        if not (key and value) or "{" in before + between + after:
            raise ValueError(
                f"template={self.template!r} needs {{key}} and after it {{value}}, each once, for example "
                "'\\n{key} = {value}\\n'."
            )
        if len(set(self.characters)) < len(self.characters):
            raise ValueError(f"characters={self.characters!r} names one twice.")
        for field in ("key_length", "value_length"):
            length = getattr(self, field)
            if length < 1 or math.perm(len(self.characters), length) < 10 * self.needles:
                raise ValueError(
                    f"{field}={length} gives too few different texts of {len(self.characters)} characters "
                    f"for needles={self.needles}; raise it (to at most {len(self.characters)}), or give more "
                    "characters."
                )

    def check_row_length(self, row_length: int, key: str) -> None:
        """Refuses rows that may have no room: a token is at least one byte.

        Args:
            row_length: tokens.
            key: of the config, for the message.

        Raises:
            ValueError: naming the key.
        """
        filled = self.template.format(key="0" * self.key_length, value="0" * self.value_length)
        needed = (self.needles + 1) * len(filled.encode()) + 1
        if row_length < needed:
            raise ValueError(
                f"{key}={row_length} is too short for {self.needles} needles and a question of up to "
                f"{needed} tokens; raise it, or ask for fewer needles."
            )

    def rows(
        self, store: TokenDocuments, tokenizer: PreTrainedTokenizerBase, row_length: int, seed: int
    ) -> "NeedleRows":
        """The rows of this task over the documents of a store; arguments as for `NeedleRows`."""
        return NeedleRows(self, store, tokenizer, row_length, seed)


class NeedleRows:
    """The rows of `Needles`: haystack with needles, question and answer, together T + 1 tokens, all of one
    document.

    The depth of the needle that is asked for is uniform: along the index it walks over [0, 1) by the golden
    ratio, so that any few consecutive rows cover it evenly. Distractors lie anywhere. A needle stands behind
    the nearest line break above its place, where there is one.

    Args:
        task: what the needles are like.
        store: the tokenised documents that haystacks are cut from.
        tokenizer: that of the store.
        row_length: T.
        seed: of haystacks, keys, values and places.

    Raises:
        ValueError: for a store without text, and from `row` where T has no room.
    """

    def __init__(
        self,
        task: Needles,
        store: TokenDocuments,
        tokenizer: PreTrainedTokenizerBase,
        row_length: int,
        seed: int,
    ):
        self.task, self.store, self.tokenizer = task, store, tokenizer
        self.row_length, self.seed = row_length, seed
        self.documents = np.flatnonzero(store.lengths > 1)  # without the end-of-text token something is left
        if not len(self.documents):
            raise ValueError("retrieval rows: every document of this split of a source is empty.")
        head, self._tail = task.template.split("{value}")
        stripped = head.rstrip(" ")  # tokenizers put a space in front of a word, not behind one
        self._head, self._space = stripped, head[len(stripped) :]

    def depth(self, index: int) -> float:
        """The place of the asked needle, as a share of the haystack: 0 is its beginning."""
        return float((np.random.default_rng([self.seed]).random() + index * GOLDEN_RATIO) % 1)

    def row(self, index: int) -> Row:
        """The row at a position; labels are the answer's tokens alone."""
        generator = np.random.default_rng([self.seed, index])
        keys, values = (
            self._texts(generator, length) for length in (self.task.key_length, self.task.value_length)
        )
        questions = [self._encode(self._head.format(key=key)) for key in keys]
        answers = [self._encode(self._space + value) for value in values]
        tail = self._encode(self._tail)
        needles = [[*question, *answer, *tail] for question, answer in zip(questions, answers, strict=True)]
        length = self.row_length + 1 - sum(map(len, needles)) - len(questions[0]) - len(answers[0])
        if length < 1:
            raise ValueError(
                f"retrieval rows: {self.task.needles} needles and a question leave no room for text in rows "
                f"of {self.row_length} tokens; raise the row length, or ask for fewer needles."
            )
        haystack = self._haystack(generator, length)
        places = [int(self.depth(index) * length), *generator.integers(0, length + 1, len(needles) - 1)]
        tokens = self._with_needles(haystack, needles, [self._line_start(haystack, p) for p in places])
        tokens = np.asarray([*tokens, *questions[0], *answers[0]], np.int64)
        row = shifted_row(tokens, np.zeros(self.row_length + 1, np.int32))
        row.labels[: -len(answers[0])] = IGNORED
        return row

    def _texts(self, generator: np.random.Generator, length: int) -> list[str]:
        """So many different keys or values as there are needles."""
        found: dict[str, None] = {}
        while len(found) < self.task.needles:
            chosen = generator.permutation(len(self.task.characters))[:length]
            found["".join(self.task.characters[place] for place in chosen)] = None
        return list(found)

    def _haystack(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """A passage of a document drawn at random, and of further ones until [length] tokens are full."""
        pieces, missing = [], length
        while missing:
            document = self.store.document(int(generator.choice(self.documents)))[:-1]
            start = int(generator.integers(0, max(len(document) - missing, 0) + 1))
            pieces.append(document[start : start + missing])
            missing -= len(pieces[-1])
        return np.concatenate(pieces).astype(np.int64)

    def _line_start(self, haystack: np.ndarray, place: int) -> int:
        """The place itself, or that behind the nearest line break before it."""
        for end in range(place, max(place - LINE_SEARCH, 0), -1):
            if "\n" in self.tokenizer.decode([int(haystack[end - 1])]):
                return end
        return place

    def _with_needles(self, haystack: np.ndarray, needles: list[list[int]], places: list[int]) -> list[int]:
        """The haystack's tokens with every needle at its place."""
        tokens, last = [], 0
        for number in np.argsort(places, kind="stable"):
            tokens += [*haystack[last : places[number]].tolist(), *needles[number]]
            last = places[number]
        return [*tokens, *haystack[last:].tolist()]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
