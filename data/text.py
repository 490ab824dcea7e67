"""Documents from text files and from lines of JSON, plain or compressed."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.documents import Document, DocumentSource, strings
from data.files import ARCHIVE_ERRORS, InputFile, find_files, fingerprint_files, open_bytes, read_lines
from data.quarantine import Quarantine


@dataclass(frozen=True, kw_only=True)
class FileSource(DocumentSource):
    """A source made of files.

    Args:
        paths: folders, globs or files; one or a list. A folder is searched, the others are taken as named.
        suffixes: how the wanted files of a folder end.

    Raises:
        ValueError: naming `data.sources.<name>.paths`, for a path that yields no file.
    """

    paths: tuple[str, ...]
    suffixes: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("paths", "suffixes"):
            values = strings(getattr(self, field), self.key(field))
            if not values or not all(values):
                raise ValueError(f"{self.key(field)} is empty or holds an empty string; name at least one.")
            object.__setattr__(self, field, values)
        self.files()

    def files(self) -> list[InputFile]:
        """The source's files in reading order."""
        return find_files(self.paths, self.suffixes, self.key("paths"))

    def options(self) -> dict[str, Any]:
        """What else decides the documents, for the fingerprint."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """The kind, paths, options and the content of the files; see `fingerprint_files`."""
        return {
            "kind": type(self).__name__,
            "paths": list(self.paths),
            **self.options(),
            **self.split_fingerprint(),
            **fingerprint_files(self.files()),
        }


@dataclass(frozen=True, kw_only=True)
class TextFiles(FileSource):
    """Every file is one document, UTF-8, divided between the splits by its path below the named folder.

    The origin is the file's path. See `FileSource` for the arguments; `.gz` and `.zst` are decompressed.
    """

    suffixes: tuple[str, ...] = (".txt", ".md", ".py")

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Gives the split's files in order; see `DocumentSource.documents`."""
        limit = quarantine.max_document_bytes
        for file in self.files():
            if not self.keeps(file.key):
                continue
            try:
                with open_bytes(file.path) as stream:
                    raw = stream.read(limit + 1)
            except ARCHIVE_ERRORS as error:
                quarantine.bad(file.path, "broken_archive", str(error), b"", os.path.getsize(file.path))
                continue
            if len(raw) > limit:
                detail = quarantine.enormous_detail(f"a file of {os.path.getsize(file.path)} bytes")
                quarantine.bad(file.path, "enormous", detail, raw, os.path.getsize(file.path))
                continue
            text = quarantine.screen(raw, file.path)
            if text is not None:
                yield Document(text, file.path)


@dataclass(frozen=True, kw_only=True)
class JsonLines(FileSource):
    """Every line is a JSON object with the document in one field; files may be compressed (`.gz`, `.zst`).

    The origin is `path:line`. Lines are divided between the splits by their file's path below the named
    folder and their number. Blank lines hold nothing and are passed over. The limit of size is on the whole
    line.

    Args:
        field: the name of the string field that holds the text.
    """

    field: str = "text"
    suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    def options(self) -> dict[str, Any]:
        """The field."""
        return {"field": self.field}

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Gives the split's lines in order; a broken archive ends its own file only. See the base class."""
        limit = quarantine.max_document_bytes
        for file in self.files():
            number = 0
            try:
                for number, (line, size) in enumerate(read_lines(file.path, limit), 1):
                    if not self.keeps(f"{file.key}:{number}"):
                        continue
                    text = self._parse(line, size, f"{file.path}:{number}", quarantine)
                    if text is not None:
                        yield Document(text, f"{file.path}:{number}")
            except ARCHIVE_ERRORS as error:
                # What the lost rest of the file held is unknown, so both splits report it.
                size = os.path.getsize(file.path)
                quarantine.bad(f"{file.path}:{number + 1}", "broken_archive", str(error), b"", size)

    def _parse(self, line: bytes, size: int, origin: str, quarantine: Quarantine) -> str | None:
        if size > quarantine.max_document_bytes:
            detail = quarantine.enormous_detail(f"a line of {size} bytes")
            return quarantine.bad(origin, "enormous", detail, line, size)
        if not line.strip():
            return None
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return quarantine.bad(origin, "wrong_utf8", str(error), line)
        except (ValueError, RecursionError) as error:  # the latter where brackets nest too deep
            return quarantine.bad(origin, "broken_json", f"{type(error).__name__}: {error}", line)
        if not isinstance(record, dict):
            return quarantine.bad(origin, "missing_field", f"a {type(record).__name__}, not an object", line)
        if not isinstance(record.get(self.field), str):
            found = f"is a {type(record[self.field]).__name__}" if self.field in record else "is absent"
            detail = f"field {self.field!r} {found}; the fields are {list(record)[:20]}"
            return quarantine.bad(origin, "missing_field", detail, line)
        return quarantine.screen(record[self.field], origin)
