"""The embedded corpus: Python source files that are on every machine which can run this project."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from data.documents import Document, DocumentSource
from data.files import InputFile, fingerprint_files
from data.quarantine import Quarantine

# Tests, generated tables and machine descriptions teach a language model little and would crowd the rest.
SKIPPED_FOLDERS = frozenset(
    "test tests testing idle_test pydoc_data _bundled __pycache__ site-packages dist-packages".split()
)
SKIPPED_FILES = (
    "_sysconfigdata*.py", "encodings/cp*.py", "encodings/mac_*.py", "encodings/iso8859*.py",
    "encodings/koi8*.py",
    "encodings/*tr*.py", "encodings/tis_620.py", "encodings/hp_roman8.py", "encodings/palmos.py",
    "html/entities.py", "test_*.py", "*_pb2.py", "*_generated.py",
)  # fmt: skip
ROOTS = {"stdlib": "stdlib", "site-packages": "purelib"}  # our name -> name in sysconfig


@dataclass(frozen=True, kw_only=True)
class PythonSources(DocumentSource):
    """The .py files of the running interpreter, read in place; one file is one document.

    A file belongs to training or validation by the hash of its path below the root, so that a file stays on
    its side from one Python version to the next.

    Args:
        roots: `stdlib` (the standard library, 10-20 MB) and/or `site-packages` (what pip has installed).
        max_file_bytes: longer files are left out; they are tables, not text.

    Raises:
        ValueError: for an unknown root, or a root without files.
    """

    roots: Sequence[str] = ("stdlib",)
    max_file_bytes: int = 200_000

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "roots", tuple(self.roots))
        for root in self.roots:
            if root not in ROOTS:
                raise ValueError(f"{self.key('roots')}: {root!r} is unknown; choose from {', '.join(ROOTS)}.")

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Gives the files of the split, by root and then by path."""
        for file in self._files():
            with open(file.path, "rb") as stream:
                text = quarantine.screen(stream.read(), file.key)
            if text is not None:
                yield Document(text, file.key)

    def fingerprint(self) -> dict[str, Any]:
        """Names every file by path, size and content hash."""
        inputs = fingerprint_files(self._files())
        return {"source": "python_sources", "roots": list(self.roots), **self.split_fingerprint(), **inputs}

    def _files(self) -> list[InputFile]:
        found = []
        for root in self.roots:
            folder = sysconfig.get_paths()[ROOTS[root]]
            files = [InputFile(path, f"{root}/{name}") for name, path in self._walk(folder)]
            if not files:
                raise ValueError(
                    f"{self.key('roots')}: {root!r} has no .py file of at most {self.max_file_bytes} bytes."
                )
            found += [file for file in files if self.keeps(file.key)]
        return found

    def _walk(self, folder: str) -> list[tuple[str, str]]:
        """Pairs (posix path below the folder, path), sorted."""
        pairs = []
        for parent, folders, names in os.walk(folder):
            folders[:] = [
                name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")
            ]
            for name in names:
                path = os.path.join(parent, name)
                below = os.path.relpath(path, folder).replace(os.sep, "/")
                skipped = any(fnmatch(below, pattern) or fnmatch(name, pattern) for pattern in SKIPPED_FILES)
                if not name.endswith(".py") or skipped or not os.path.isfile(path):  # a link may lead nowhere
                    continue
                if 0 < os.path.getsize(path) <= self.max_file_bytes:
                    pairs.append((below, path))
        return sorted(pairs)
