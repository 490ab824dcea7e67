"""What every document source offers, and the rule that divides documents into training and validation.

A *document* is one text that the model reads from its first to its last token. A *source* names documents and
nothing else: tokenising, caching, mixing and packing happen downstream.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.quarantine import Quarantine

SPLITS = ("train", "validation", "all")


class Document(NamedTuple):
    """One text and the place it came from, like `books/part-0.jsonl.gz:17`; lines and rows count from 1."""

    text: str
    origin: str


def in_split(key: str, split: str, validation_share: float) -> bool:
    """Whether the document named `key` belongs to `split`.

    The answer is a pure function of the arguments (BLAKE2b of the key), so it is the same on every machine,
    and a document never changes sides when others come or go. `train` and `validation` are disjoint and
    together `all`.

    Args:
        key: the document's name inside its source, for example a path relative to the source's root.
        split: `train`, `validation` or `all`.
        validation_share: expected share of the keys in `validation`, in [0, 1).
    """
    if split == "all":
        return True
    position = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest())
    return (position < validation_share * 2**64) == (split == "validation")


def strings(value: Any, config_key: str) -> tuple[str, ...]:
    """One string or path, or any kind of list of them, as a tuple of strings.

    Raises:
        ValueError: naming `config_key`, for anything else.
    """
    values = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(values, Sequence) or not all(isinstance(item, str | os.PathLike) for item in values):
        raise ValueError(f"{config_key}={value!r} must be a string or a list of strings.")
    return tuple(str(item) for item in values)


@dataclass(frozen=True, kw_only=True)
class DocumentSource:
    """Base of all sources: the split, and the name under which messages speak of the source.

    Args:
        split: which documents to give: `train` and `validation` divide the source by a stable hash of each
            document's name; `all` gives every document (for folders that are already separate).
        validation_share: expected share of documents in `validation`, in [0, 1); unused by `all`.
        name: the source's key under `data.sources` in the config, for error messages only.

    Raises:
        ValueError: for an unknown split or a share out of range, naming the key.
    """

    split: str = "all"
    validation_share: float = 0.05
    name: str = "<name>"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(
                f"{self.key('split')}={self.split!r} is unknown; choose from {', '.join(SPLITS)}."
            )
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"{self.key('validation_share')}={self.validation_share} must lie in [0, 1).")
        if self.split == "validation" and self.validation_share == 0:
            raise ValueError(
                f"{self.key('validation_share')}=0 leaves no document for {self.key('split')}=validation; "
                "raise the share, or name separate validation files and set split=all."
            )

    def key(self, field: str) -> str:
        """The config key of one field of this source, for messages."""
        return f"data.sources.{self.name}.{field}"

    def keeps(self, document_name: str) -> bool:
        """Whether this source's split holds the document of that name."""
        return in_split(document_name, self.split, self.validation_share)

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Gives the split's good documents, in an order that depends on the inputs alone.

        Args:
            quarantine: counts every document and keeps the bad ones. Its `finish` is the caller's to call.

        Raises:
            BadDataError: when the quarantine holds too large a share.
        """
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """A JSON-able description of the inputs and options; equal descriptions mean equal documents."""
        raise NotImplementedError

    def split_fingerprint(self) -> dict[str, Any]:
        """What every source adds to its fingerprint; the share counts only where it divides something."""
        if self.split == "all":
            return {"split": "all"}
        return {"split": self.split, "validation_share": self.validation_share}
