"""Token cache: documents tokenised once, memory-mapped afterwards, with a manifest that names their
inputs."""

import copy
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.documents import DocumentSource
from data.quarantine import Quarantine

log = logging.getLogger(__name__)
FORMAT = 1
DOCUMENTS_PER_BATCH = 64


class TokenDocuments(Protocol):
    """Tokenised documents, from which rows are made.

    `lengths` is [documents] int64, tokens of each document; `manifest` names what they were made from.
    """

    lengths: np.ndarray
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """How many documents."""

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, [tokens] of an integer type, as a view."""


class EncodedDocument(NamedTuple):
    """A document's tokens as they are stored, and which of them are learned; None means all."""

    ids: Sequence[int]
    trained: Sequence[bool] | None = None


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents; those of text are each ended by the end-of-text token.

    Args:
        tokens: [total] uint16 or uint32, memory-mapped; all documents one after the other.
        ends: [documents] int64, the position after each document's last token.
        manifest: what the store was made from.
        trained: [total] uint8, memory-mapped, 1 for a token that is learned; None means all are.
    """

    tokens: np.ndarray
    ends: np.ndarray
    manifest: dict[str, Any]
    trained: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64, tokens of each document, end-of-text included."""
        return np.diff(self.ends, prepend=0)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, as a view."""
        return self.tokens[self._place(index)]

    def trained_tokens(self, index: int) -> np.ndarray:
        """[tokens] bool, which tokens of one document are learned."""
        place = self._place(index)
        return np.ones(place.stop - place.start, bool) if self.trained is None else self.trained[place] > 0

    def _place(self, index: int) -> slice:
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash over what the tokenizer does with text: the fast tokenizer's own serialisation, or the
    vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        backend = copy.deepcopy(backend)
        backend.no_truncation()  # this and padding are left over from the tokenizer's last call
        backend.no_padding()
        text = backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


def split_limit(source: DocumentSource, max_tokens: int | None) -> int | None:
    """The split's share of `max_tokens`, so that reading either split reads about as far into the source."""
    if max_tokens is None:
        return None
    shares = {"train": 1 - source.validation_share, "validation": source.validation_share, "all": 1.0}
    return math.ceil(max_tokens * shares[source.split])


def prepare_token_store(
    source: DocumentSource,
    tokenizer: PreTrainedTokenizerBase,
    cache_folder: Path,
    *,
    max_bad_share: float,
    max_document_bytes: int,
    max_tokens: int | None = None,
) -> TokenStore:
    """Opens the source's token store, and writes it first where it is missing.

    The folder's name is a hash of the source's fingerprint, the tokenizer and the options, so changed inputs
    never meet an old cache. Two processes that ask at once write it once. `max_tokens` ends both splits of
    the source
    together: the document that fills this split's share of it is the last; None takes the whole source.

    Raises:
        ValueError: where the tokenizer has no end-of-text token or the source gives no document.
        BadDataError: where more documents are bad than `max_bad_share` allows.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "teacher.tokenizer has no end-of-text token (eos_token); documents cannot be separated."
        )
    quarantine_options = {"max_bad_share": max_bad_share, "max_document_bytes": max_document_bytes}
    inputs = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        **quarantine_options,
        **(source.encoding(tokenizer) if hasattr(source, "encoding") else {}),
        **({} if max_tokens is None else {"max_tokens": max_tokens}),
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(cache_folder) / f"{source.name}-{source.split}-{key}"
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "manifest.json").exists():
            bad = folder.with_name(f"{folder.name}.bad")
            shutil.rmtree(
                bad, ignore_errors=True
            )  # of an attempt that was stopped; it is read again from the start
            quarantine = Quarantine(bad, **quarantine_options)
            _write(source, tokenizer, folder, inputs, quarantine)
    return open_token_store(folder)


def open_token_store(folder: Path) -> TokenStore:
    """Memory-maps a finished store.

    Raises:
        ValueError: where the folder's manifest or files are missing, unreadable, or not of the sizes that the
            manifest says.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        raise ValueError(f"data: {folder} is no token store (no manifest.json); prepare it again.")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        ends = np.load(folder / "ends.npy")
        tokens = np.memmap(folder / "tokens.bin", dtype=manifest["dtype"], mode="r")
        trained = np.memmap(folder / "trained.bin", np.uint8, "r") if manifest.get("masked") else None
        sizes = (len(ends), len(tokens), len(tokens) if trained is None else len(trained))
        whole = sizes == (manifest["documents"], *2 * (manifest["tokens"],)) and ends[-1] == len(tokens)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"data: {folder} is damaged ({error}); delete the folder, the next run rebuilds it."
        ) from error
    if not whole:
        raise ValueError(
            f"data: {folder} differs from its manifest; delete the folder, it is rebuilt on the next run."
        )
    return TokenStore(tokens, ends, manifest, trained)


def _write(
    source: DocumentSource,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    inputs: dict[str, Any],
    quarantine: Quarantine,
) -> None:
    log.info("Tokenising %s (%s) into %s", source.name, source.split, folder)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    limit = split_limit(source, inputs.get("max_tokens"))
    unfinished = folder.with_name(
        f".writing-{folder.name}"
    )  # a fixed name, so that a killed attempt is cleared away
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        ends, total = [], 0
        masked = hasattr(source, "encode")
        encoded = source.encode(tokenizer, quarantine) if masked else _encoded(source, tokenizer, quarantine)
        with (unfinished / "tokens.bin").open("wb") as file, (unfinished / "trained.bin").open("wb") as mask:
            for ids, trained in encoded:
                file.write(np.asarray(ids, dtype).tobytes())
                if trained is not None:
                    mask.write(np.asarray(trained, np.uint8).tobytes())
                total += len(ids)
                ends.append(total)
                if limit is not None and total >= limit:
                    break
        quarantine.finish()
        if not ends:
            change = {"all": "", "train": "; lower its", "validation": "; raise its"}[source.split]
            hint = f"{change} validation_share={source.validation_share}" if change else ""
            raise ValueError(f"data.sources.{source.name} gives no document for split={source.split}{hint}.")
        if not masked:
            (unfinished / "trained.bin").unlink()
        np.save(unfinished / "ends.npy", np.asarray(ends, np.int64))
        counts = {
            "dtype": dtype.name,
            "documents": len(ends),
            "tokens": total,
            "quarantine": quarantine.summary(),
            **({"masked": True} if masked else {}),
        }
        (unfinished / "manifest.json").write_text(json.dumps({**inputs, **counts}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _encoded(
    source: DocumentSource, tokenizer: PreTrainedTokenizerBase, quarantine: Quarantine
) -> Iterator[EncodedDocument]:
    """The tokens of one text after the other, the end-of-text token after each."""
    texts = (document.text for document in source.documents(quarantine))
    while batch := list(islice(texts, DOCUMENTS_PER_BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield EncodedDocument([*ids, tokenizer.eos_token_id])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an operating-system lock, which vanishes with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
