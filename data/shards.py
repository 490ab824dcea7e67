"""Token shards as an input: files of token ids, memory-mapped as they are and never tokenised again."""

import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.documents import Document
from data.files import InputFile
from data.quarantine import Quarantine
from data.text import FileSource
from data.token_store import split_limit, tokenizer_fingerprint

log = logging.getLogger(__name__)

DTYPES = ("uint16", "uint32", "int32")
STORE_ENDS = "ends.npy"  # lies beside the tokens in a folder of our own token cache, and holds no tokens
BLOCK_TOKENS = 2**22  # looked at in one step when a shard is opened
OPEN_FILES = 128  # mapped at once; each costs a file descriptor


@dataclass(frozen=True)
class ShardedTokens:
    """Documents chosen from several files of token ids; see `data.token_store.TokenDocuments`.

    The files are mapped when they are first read, so that loader workers receive paths and not their content.

    Args:
        paths: the files.
        dtype: name of the type of their ids.
        until: [files] int64, how many of the chosen documents lie in this file and those before it.
        starts: [documents] int64, the position in its own file of each document's first token.
        lengths: [documents] int64, tokens of each document, the end-of-text token included.
        manifest: what the documents were made from.
    """

    paths: tuple[str, ...]
    dtype: str
    until: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.starts)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, [tokens] of `dtype`, as a view."""
        path = self.paths[int(np.searchsorted(self.until, index, side="right"))]
        start = int(self.starts[index])
        return _map_file(path, self.dtype)[start : start + int(self.lengths[index])]


@dataclass(frozen=True, kw_only=True)
class TokenShards(FileSource):
    """Files of token ids, one document after the other, each ended by the tokenizer's end-of-text token.

    `.bin` files hold nothing but ids in the machine's byte order; `.npy` files one array [tokens]. A folder
    of the project's own token cache is accepted as well. Tokens after a file's last end-of-text token are a
    document too. Documents are divided between the splits by their file's path below the named folder and
    their number, as `JsonLines` divides lines.

    A `manifest.json` beside the files may name the tokenizer that made them: `tokenizer` is what
    `data.token_store.tokenizer_fingerprint` gives, `eos_token_id` the end-of-text id. Then no other tokenizer
    is accepted.

    Args:
        dtype: the type of the ids: uint16, uint32 or int32.

    Raises:
        ValueError: naming the key, for an unknown dtype or a path that yields no shard.
    """

    suffixes: tuple[str, ...] = (".bin", ".npy")
    dtype: str = "uint16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.key('dtype')}={self.dtype!r} is unknown; choose from {', '.join(DTYPES)}."
            )
        files = self.files()
        others = [file.path for file in files if not file.path.endswith(self.suffixes)]
        if others or not files:
            wrong = others[0] if others else STORE_ENDS
            raise ValueError(
                f"{self.key('paths')}={list(self.paths)} names {wrong}, which is no shard; name folders, or "
                f"files ending in {', '.join(self.suffixes)}."
            )

    def files(self) -> list[InputFile]:
        """The shards in reading order."""
        return [file for file in super().files() if os.path.basename(file.path) != STORE_ENDS]

    def options(self) -> dict[str, Any]:
        """The type of the ids."""
        return {"dtype": self.dtype}

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Shards hold no text.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"data.sources.{self.name} holds tokens; here a source of text is needed.")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compares the tokenizer with every manifest beside the shards; reads no shard.

        Raises:
            ValueError: where they differ, a manifest cannot be read, or the tokenizer has no end-of-text
                token.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError("teacher.tokenizer has no end-of-text token (eos_token); documents have no end.")
        fingerprint = tokenizer_fingerprint(tokenizer)
        expected = {"tokenizer": fingerprint, "eos_token_id": tokenizer.eos_token_id, "dtype": self.dtype}
        for folder in sorted({Path(file.path).parent for file in self.files()}):
            manifest = self._manifest(folder / "manifest.json")
            if "tokenizer" not in manifest:
                log.warning("%s: no manifest.json in %s names the shards' tokenizer.", self.name, folder)
            for name, value in expected.items():
                if manifest.get(name, value) != value:
                    raise ValueError(
                        f"{self.key('paths')}: the shards in {folder} were made with "
                        f"{name}={manifest[name]}, but the teacher's tokenizer and {self.key('dtype')} give "
                        f"{value}. Take the teacher or the dtype that belongs to the shards, or tokenise the "
                        "text again."
                    )

    def token_store(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> ShardedTokens:
        """Finds the documents of this split; every token up to the limit is looked at once.

        Args:
            tokenizer: the teacher's.
            max_tokens: of both splits together, as in `data.token_store.prepare_token_store`.

        Raises:
            ValueError: where the tokenizer is another one, a file is damaged, an id is none of the
                tokenizer's, or the split holds no document.
        """
        self.check_tokenizer(tokenizer)
        limit = split_limit(self, max_tokens)
        files, until, starts, lengths, total = [], [], [], [], 0
        for file in self.files():
            first, sizes = self._documents_of(file, tokenizer)
            if limit is not None:  # the document that fills the limit is the last
                wanted = int(np.searchsorted(total + np.cumsum(sizes), limit)) + 1
                first, sizes = first[:wanted], sizes[:wanted]
            files.append(file.path)
            starts.append(first)
            lengths.append(sizes)
            until.append(len(first))
            total += int(sizes.sum())
            if limit is not None and total >= limit:
                break
        if not total:
            raise ValueError(
                f"data.sources.{self.name} gives no document for split={self.split}; raise "
                f"{self.key('validation_share')}, or name more shards."
            )
        manifest = {
            "source": self.fingerprint(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "max_tokens": max_tokens,
            "dtype": self.dtype,
            "documents": sum(until),
            "tokens": total,
        }
        numbers = np.cumsum(until), np.concatenate(starts), np.concatenate(lengths)
        return ShardedTokens(tuple(files), self.dtype, *numbers, manifest)

    def _manifest(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.key('paths')}: {path} cannot be read ({error}); repair or remove it."
            ) from error
        if not isinstance(manifest, dict):
            raise ValueError(f"{self.key('paths')}: {path} is no JSON object; repair or remove it.")
        return manifest

    def _documents_of(
        self, file: InputFile, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the split's documents in one file, [documents] int64 each."""
        try:
            tokens = _map_file(file.path, self.dtype)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{self.key('paths')}: {file.path} holds no array of {self.key('dtype')}={self.dtype}: "
                f"{error}. Correct the dtype, or make the file again."
            ) from error
        found = []
        for start in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[start : start + BLOCK_TOKENS]
            self._check_ids(file.path, block, start, len(tokenizer))
            found.append(np.flatnonzero(block == tokenizer.eos_token_id) + start + 1)
        ends = np.concatenate(found)
        if not len(ends) or ends[-1] < len(tokens):
            ends = np.append(ends, len(tokens))
        starts = np.concatenate([[0], ends[:-1]])
        names = (f"{file.key}:{number}" for number in itertools.count(1))
        kept = np.fromiter((self.keeps(name) for name, _ in zip(names, ends, strict=False)), bool, len(ends))
        return starts[kept], (ends - starts)[kept]

    def _check_ids(self, path: str, block: np.ndarray, start: int, vocabulary: int) -> None:
        unsigned = block.view(np.uint32) if self.dtype == "int32" else block  # negative ids become large ones
        if unsigned.max() < vocabulary:
            return
        place = int(np.argmax(unsigned >= vocabulary))
        raise ValueError(
            f"{self.key('paths')}: {path} has the id {block[place]} at token {start + place}, but the "
            f"teacher's tokenizer has {vocabulary} entries. The shard belongs to another tokenizer, is not "
            f"{self.key('dtype')}={self.dtype}, or begins with a header that has to be removed."
        )


@lru_cache(maxsize=OPEN_FILES)
def _map_file(path: str, dtype: str) -> np.ndarray:
    """Memory-maps one shard, [tokens] of `dtype`.

    Raises:
        ValueError: where the file is empty, no whole number of ids, or an array of another type or shape.
    """
    if not path.endswith(".npy"):
        return np.memmap(path, dtype=dtype, mode="r")
    array = np.load(path, mmap_mode="r")
    if array.dtype != np.dtype(dtype) or array.ndim != 1 or not len(array):
        raise ValueError(f"the array is {array.dtype.str} of shape {list(array.shape)}")
    return array
