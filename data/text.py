"""Documents from text files and from lines of JSON, plain or compressed."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.documents import Document, DocumentSource, strings
from data.files import ARCHIVE_ERRORS, InputFile, find_files, fingerprint_files, open_bytes, read_lines
from data.quarantine import Quarantine


class Record(NamedTuple):
    """One object with fields, the place it came from, and its bytes or the beginning of them."""

    value: dict[str, Any]
    origin: str
    raw: bytes


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
        for file in self.files():
            for record in json_lines(file, self.keeps, quarantine):
                text = self._text(record, quarantine)
                if text is not None:
                    yield Document(text, record.origin)

    def _text(self, record: Record, quarantine: Quarantine) -> str | None:
        value = record.value
        if not isinstance(value.get(self.field), str):
            found = f"is a {type(value[self.field]).__name__}" if self.field in value else "is absent"
            detail = f"field {self.field!r} {found}; the fields are {list(value)[:20]}"
            return quarantine.bad(record.origin, "missing_field", detail, record.raw)
        return quarantine.screen(value[self.field], record.origin)


def json_lines(file: InputFile, keeps: Callable[[str], bool], quarantine: Quarantine) -> Iterator[Record]:
    """The objects that the lines of a file hold; what is none is set aside.

    Args:
        file: plain or compressed.
        keeps: whether the split has the line of that name.
        quarantine: takes the bad lines, and a broken archive.
    """
    number = 0
    try:
        for number, (line, size) in enumerate(read_lines(file.path, quarantine.max_document_bytes), 1):
            if not keeps(f"{file.key}:{number}"):
                continue
            origin = f"{file.path}:{number}"
            value = _json_object(line, size, origin, quarantine)
            if value is not None:
                yield Record(value, origin, line)
    except ARCHIVE_ERRORS as error:
        # What the lost rest of the file held is unknown, so both splits report it.
        size = os.path.getsize(file.path)
        quarantine.bad(f"{file.path}:{number + 1}", "broken_archive", str(error), b"", size)


def _json_object(line: bytes, size: int, origin: str, quarantine: Quarantine) -> dict[str, Any] | None:
    if size > quarantine.max_document_bytes:
        detail = quarantine.enormous_detail(f"a line of {size} bytes")
        return quarantine.bad(origin, "enormous", detail, line, size)
    if not line.strip():
        return None
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return quarantine.bad(origin, "wrong_utf8", str(error), line)
    except (ValueError, RecursionError) as error:  # the latter where brackets nest too deep
        return quarantine.bad(origin, "broken_json", f"{type(error).__name__}: {error}", line)
    if not isinstance(value, dict):
        return quarantine.bad(origin, "missing_field", f"a {type(value).__name__}, not an object", line)
    return value
