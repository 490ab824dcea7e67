"""Retrieval rows: facts hidden in a haystack, and at the end a question whose answer stands in the row.

The haystack is text of a document source, or a few sentences again and again; a needle is one line such as
`<key> = <value>`, and the question repeats a needle up to its value. With words for keys and numbers or UUIDs
for values these are the needle tasks of RULER (arXiv 2404.06654) in the form of a text to be continued. A row
is a pure function of its index.

Shape letters: B rows, T tokens per row.
"""

import math
import string
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.packing import IGNORED, Row, shifted_row
from data.retrieval_texts import NOISE, TEXT_KINDS
from data.token_store import TokenDocuments

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
LINE_SEARCH = 64  # tokens before a needle's place in which a line break is looked for
HAYSTACKS = ("text", "noise")


class RetrievalRows(Protocol):
    """An endless, reproducible sequence of rows that each end with a question and its answer."""

    def row(self, index: int) -> Row:
        """The row at a position; only the answer's tokens have labels."""

    def depth(self, index: int) -> float:
        """How far down the haystack the answer stands, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Needles:
    """A task: some facts of one form in each row, one of which is asked for.

    Args:
        needles: facts in each row; all but one are distractors.
        template: of a fact, with `{key}` and then `{value}`; what stands before the value is the question.
            A single needle may do without a key.
        haystack: `text` of the source, or `noise`, the same few sentences again and again.
        keys, values: kinds of texts (data/retrieval_texts.py): letters, numbers, words or uuid.
        key_length, value_length: letters or digits; None takes 4 letters or 7 digits.
        characters: that letters are taken from; none appears twice in a key, or in a value.
        depth: how far down the row each answer stands, in [0, 1], to the token: 0 is the row's beginning, 1
            directly before the question. None spreads the rows evenly, and puts needles behind line breaks.

    Raises:
        ValueError: for an unknown word, a template without its fields in that order, a length where there is
            nothing to choose, too few different keys or values, or a depth out of range.
    """

    needles: int = 1
    template: str = "\n{key} = {value}\n"
    haystack: str = "text"
    keys: str = "letters"
    values: str = "letters"
    key_length: int | None = None
    value_length: int | None = None
    characters: str = string.ascii_uppercase
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.needles < 1:
            raise ValueError(f"needles={self.needles} must be at least 1.")
        for field, known in (("haystack", HAYSTACKS), ("keys", TEXT_KINDS), ("values", TEXT_KINDS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is unknown; choose one of {', '.join(known)}."
                )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must lie in [0, 1], or be null.")
        if len(set(self.characters)) < len(self.characters):
            raise ValueError(f"characters={self.characters!r} names one twice.")
        self._check_template()
        for field, kind in (("key_length", self.keys), ("value_length", self.values)):
            self._check_length(field, kind)

    def _check_template(self) -> None:
        before, value, after = self.template.partition("{value}")
        keys, rest = before.count("{key}"), before.replace("{key}", "") + after
        if not value or "{" in rest or keys > 1 or (not keys and self.needles > 1):
            raise ValueError(
                f"template={self.template!r} needs {{key}} and after it {{value}}, each once, for example "
                "'\\n{key} = {value}\\n'; a single needle may do without {key}."
            )

    def _check_length(self, field: str, kind: str) -> None:
        given, own = getattr(self, field), TEXT_KINDS[kind].length
        if own is None and given is not None:
            raise ValueError(f"{field}={given} has no effect on {kind}; leave it null.")
        length = self._length(field)
        if own is not None and length < 1 or self._different(field, kind) < 10 * self.needles:
            raise ValueError(
                f"{field}={length} gives too few different {kind} for needles={self.needles}; raise it "
                f"(letters: to at most {len(self.characters)}), or give more characters."
            )

    def _length(self, field: str) -> int:
        """Letters or digits of a key or a value."""
        given = getattr(self, field)
        kind = self.keys if field == "key_length" else self.values
        return given if given is not None else TEXT_KINDS[kind].length or 0

    def _different(self, field: str, kind: str) -> int:
        return TEXT_KINDS[kind].different(self._length(field), self.characters)

    def draw_keys(self, generator: np.random.Generator) -> list[str]:
        """Different keys, one for each needle."""
        return self._texts(generator, self.keys, "key_length")

    def draw_values(self, generator: np.random.Generator) -> list[str]:
        """Different values, one for each needle."""
        return self._texts(generator, self.values, "value_length")

    def _texts(self, generator: np.random.Generator, kind: str, field: str) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < self.needles:
            found[TEXT_KINDS[kind].draw(generator, self._length(field), self.characters)] = None
        return list(found)

    def check_row_length(self, row_length: int, key: str) -> None:
        """Refuses rows that may have no room: a token is at least one byte.

        Args:
            row_length: tokens.
            key: of the config, for the message.

        Raises:
            ValueError: naming the key.
        """
        longest = {
            name: "0" * TEXT_KINDS[kind].longest(self._length(f"{name}_length"), self.characters)
            for name, kind in (("key", self.keys), ("value", self.values))
        }
        needed = (self.needles + 1) * len(self.template.format(**longest).encode()) + 1
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

    Without a depth of the task, that of the needle that is asked for is uniform: along the index it walks
    over [0, 1) by the golden ratio, so that any few consecutive rows cover it evenly; needles stand behind
    the nearest line break above their place, where there is one. With a depth, it is exact to the token, as
    long as there is more haystack than a needle has tokens. Distractors lie anywhere.

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
        """The place of the asked needle, as a share of what stands before the question."""
        if self.task.depth is not None:
            return self.task.depth
        return float((np.random.default_rng([self.seed]).random() + index * GOLDEN_RATIO) % 1)

    def row(self, index: int) -> Row:
        """The row at a position; labels are the answer's tokens alone."""
        generator = np.random.default_rng([self.seed, index])
        keys, values = self.task.draw_keys(generator), self.task.draw_values(generator)
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
        places, sides = self._places(generator, index, haystack, [len(needle) for needle in needles])
        tokens = self._with_needles(haystack, needles, np.lexsort((sides, places)), places)
        tokens = np.asarray([*tokens, *questions[0], *answers[0]], np.int64)
        row = shifted_row(tokens, np.zeros(self.row_length + 1, np.int32))
        row.labels[: -len(answers[0])] = IGNORED
        return row

    def _haystack(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """[length] tokens: a passage of a document drawn at random, and of further ones; or noise."""
        if self.task.haystack == "noise":
            noise = self._encode(NOISE)
            return np.resize(np.roll(noise, -int(generator.integers(len(noise)))), length).astype(np.int64)
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

    def _places(
        self, generator: np.random.Generator, index: int, haystack: np.ndarray, sizes: list[int]
    ) -> tuple[list[int], list[int]]:
        """How much of the haystack stands before each needle; and for needles at one place which come before
        the asked one (-1) and which after it (1)."""
        length, others = len(haystack), len(sizes) - 1
        if self.task.depth is None:
            drawn = [int(self.depth(index) * length), *generator.integers(0, length + 1, others)]
            return [self._line_start(haystack, place) for place in drawn], [0] * len(sizes)
        before = [number for number in range(1, others + 1) if generator.random() < self.task.depth]
        after = [number for number in range(1, others + 1) if number not in before]
        asked = round(self.task.depth * (length + sum(sizes[1:]))) - sum(sizes[number] for number in before)
        while asked < 0 and before:
            asked += sizes[before[-1]]
            after.append(before.pop())
        while asked > length and after:
            asked -= sizes[after[-1]]
            before.append(after.pop())
        asked = min(max(asked, 0), length)
        places, sides = [asked], [0]
        for number in range(1, others + 1):
            sides.append(-1 if number in before else 1)
            low, high = (0, asked) if number in before else (asked, length)
            places.append(int(generator.integers(low, high + 1)))
        return places, sides

    def _with_needles(
        self, haystack: np.ndarray, needles: list[list[int]], order: np.ndarray, places: list[int]
    ) -> list[int]:
        """The haystack's tokens with every needle at its place, in the given order."""
        tokens, last = [], 0
        for number in order:
            tokens += [*haystack[last : places[number]].tolist(), *needles[number]]
            last = places[number]
        return [*tokens, *haystack[last:].tolist()]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
