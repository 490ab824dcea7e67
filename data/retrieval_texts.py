"""What keys, values and repetitive haystacks of retrieval rows are made of."""

import math
import string
import uuid
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

NOISE = "Rain falls on the roof. The kettle is warm. A cat sleeps by the door. Nothing else happens here.\n"
ADJECTIVES = (
    "amber ancient bitter brave bright broad calm clever cold curious damp deep distant dusty early empty "
    "faint fierce frozen gentle golden grand hidden hollow humble idle jolly keen late lively lonely loud "
    "mellow misty narrow noble pale plain polite proud quick quiet rapid restless rough round rusty scarlet "
    "secret sharp silent silver simple slender smooth solid stout sudden swift tame tender velvet vivid wild"
).split()
NOUNS = (
    "anchor apple arrow badger barrel beacon bridge brook cabin candle canyon castle cedar circle cloud "
    "comet copper coral desert dragon eagle ember falcon feather forest fountain garden glacier harbor "
    "hammer harvest island jacket jungle kettle ladder lantern lemon marble meadow mirror monkey mountain "
    "needle orchard otter paddle pebble pencil planet pillow prairie puzzle ribbon river rocket saddle "
    "shadow spider temple thunder tunnel violin window"
).split()


class TextKind(NamedTuple):
    """How one key or value is drawn.

    Attributes:
        draw: (generator, length, characters) -> a text.
        different: (length, characters) -> how many different ones there are.
        longest: (length, characters) -> bytes of the longest.
        length: that is taken where the config names none; None where the kind has a length of its own.
    """

    draw: Callable[[np.random.Generator, int, str], str]
    different: Callable[[int, str], int]
    longest: Callable[[int, str], int]
    length: int | None


def _letters(generator: np.random.Generator, length: int, characters: str) -> str:
    """Characters of which none appears twice."""
    return "".join(characters[place] for place in generator.permutation(len(characters))[:length])


def _number(generator: np.random.Generator, length: int, _: str) -> str:
    """A number of so many digits, the first of which is not 0."""
    first, *others = generator.integers(0, 10, length)
    return "".join(string.digits[digit] for digit in (first % 9 + 1, *others))


def _words(generator: np.random.Generator, _: int, __: str) -> str:
    """An adjective and a noun."""
    return "-".join(words[int(generator.integers(len(words)))] for words in (ADJECTIVES, NOUNS))


def _uuid(generator: np.random.Generator, _: int, __: str) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(bytes=generator.bytes(16), version=4))


WORDS_LENGTH = max(map(len, ADJECTIVES)) + 1 + max(map(len, NOUNS))
TEXT_KINDS = MappingProxyType(
    {
        "letters": TextKind(
            draw=_letters,
            different=lambda length, characters: math.perm(len(characters), length),
            longest=lambda length, characters: length * max(len(c.encode()) for c in characters),
            length=4,
        ),
        "numbers": TextKind(
            draw=_number,
            different=lambda length, _: 9 * 10 ** (length - 1),
            longest=lambda length, _: length,
            length=7,
        ),
        "words": TextKind(
            draw=_words,
            different=lambda _, __: len(ADJECTIVES) * len(NOUNS),
            longest=lambda _, __: WORDS_LENGTH,
            length=None,
        ),
        "uuid": TextKind(
            draw=_uuid,
            different=lambda _, __: 2**122,
            longest=lambda _, __: 36,
            length=None,
        ),
    }
)
