"""Small sources, tokenizers and stores for the tests of `data`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.documents import Document, DocumentSource
from data.quarantine import Quarantine
from data.token_store import TokenStore
from data.tokenizer import train_bpe_tokenizer

TEXTS = tuple(f"def number_{i}(x):\n    return {i} * x  # " + f"times {i} " * (i % 7) for i in range(60))


@dataclass(frozen=True, kw_only=True)
class ListSource(DocumentSource):
    """Documents from a list; what is not UTF-8 or is empty is bad. Each reading adds a line to `reads`."""

    texts: tuple[str | bytes, ...] = TEXTS
    reads: str | None = None

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """The texts of the split."""
        if self.reads:
            with Path(self.reads).open("a") as file:
                file.write("read\n")
        for number, raw in enumerate(self.texts):
            if self.keeps(str(number)):
                text = quarantine.screen(raw, f"list:{number}")
                if text is not None:
                    yield Document(text, f"list:{number}")

    def fingerprint(self) -> dict:
        """A hash of the texts."""
        digest = hashlib.sha256(repr(self.texts).encode()).hexdigest()
        return {"kind": "ListSource", "sha256": digest, **self.split_fingerprint()}


@lru_cache
def tiny_tokenizer(vocabulary_size: int = 300):
    """A byte-level BPE tokenizer; shared between tests, which must not change it."""
    return train_bpe_tokenizer(ListSource(), vocabulary_size, 64, Path("never-written"))


def store_of(lengths) -> TokenStore:
    """Documents of the given lengths whose tokens are 0, 1, 2 ... through the whole store."""
    ends = np.cumsum(lengths).astype(np.int64)
    return TokenStore(np.arange(ends[-1], dtype=np.uint32), ends, {})
