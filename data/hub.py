"""Documents from any data set that the `datasets` library loads: a Hub name, a folder, or files."""

import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.documents import Document, DocumentSource, strings
from data.files import ARCHIVE_ERRORS, InputFile, find_files, fingerprint_files
from data.quarantine import BadDataError, Quarantine

log = logging.getLogger(__name__)

FILE_BUILDERS = ("json", "parquet", "text", "csv", "arrow")


@dataclass(frozen=True, kw_only=True)
class HubRows(DocumentSource):
    """The rows of one split of a data set, whatever they hold.

    The origin is `path/config/dataset_split(data_files):row`, rows counted from 1; without the files it
    divides the rows between the splits. Where the data set has a validation split of its own,
    name that in a second source with `split: all`.

    Args:
        path: a Hub id (`owner/name`), a local folder, or a builder: json, parquet, text, csv or arrow.
        config: the data set's configuration, where it has several.
        dataset_split: the data set's own split, for example `train`.
        revision: the commit of a Hub data set; without one a cache cannot notice that it has moved on.
        data_files: file or files (globs too) for a builder, or inside the data set.
        streaming: read as it arrives; otherwise it is first downloaded and prepared as a whole.
        max_documents: read this many rows at most, both splits and bad rows included; None reads all.

    Raises:
        ValueError: naming the key, for a bad value or for local `data_files` that do not exist.
    """

    path: str
    config: str | None = None
    dataset_split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    streaming: bool = True
    max_documents: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "data_files", strings(self.data_files or (), self.key("data_files")))
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"{self.key('max_documents')}={self.max_documents} must be at least 1, or null.")
        if self.path in FILE_BUILDERS:
            if not self.data_files:
                raise ValueError(f"{self.key('data_files')} must name the files that path={self.path} reads.")
            if self._is_local():
                self._local_files()

    def fields(self) -> tuple[str, ...]:
        """The fields that are read; a data set must have one of them at least."""
        raise NotImplementedError

    def read_rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The split's rows in the data set's own order, each with its origin.

        Raises:
            ValueError: naming the key, where the data set cannot be opened or has none of the fields.
            BadDataError: where `datasets` cannot read on, since what follows would be lost.
        """
        if not self._is_local() and self.revision is None:
            log.warning("%s is not set: %s may change without notice.", self.key("revision"), self.path)
        name = "/".join(part for part in (self.path, self.config, self.dataset_split) if part)
        shown = f"{name}({', '.join(self.data_files)})" if self.data_files else name
        for number, record in enumerate(self._read(shown), 1):
            if self.keeps(f"{name}:{number}"):
                yield record, f"{shown}:{number}"

    def fingerprint(self) -> dict[str, Any]:
        """The name, revision and options, and for local data the content of the files."""
        options = ("path", "config", "dataset_split", "revision", "max_documents")
        files = fingerprint_files(self._local_files()) if self._is_local() else {}
        return {
            "kind": type(self).__name__,
            **{option: getattr(self, option) for option in options},
            "data_files": list(self.data_files),
            **self.split_fingerprint(),
            **files,
        }

    def _is_local(self) -> bool:
        if self.path in FILE_BUILDERS:
            return not any("://" in pattern for pattern in self.data_files)
        return os.path.isdir(self.path)

    def _local_files(self) -> list[InputFile]:
        if self.path in FILE_BUILDERS:
            return find_files(self.data_files, [""], self.key("data_files"))
        return find_files([self.path], [""], self.key("path"))

    def _open(self) -> Any:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.path,
                self.config,
                split=self.dataset_split,
                revision=self.revision,
                data_files=list(self.data_files) or None,
                streaming=self.streaming,
            )
        except (*self._errors(), FileNotFoundError, ConnectionError, StopIteration) as error:
            raise ValueError(
                f"{self.key('path')}={self.path!r} (config={self.config}, revision={self.revision}, "
                f"dataset_split={self.dataset_split}) cannot be opened: {type(error).__name__}: {error}"
            ) from error
        if rows.column_names is None:
            return rows
        present = [name for name in self.fields() if name in rows.column_names]
        if not present:
            raise ValueError(self._without_fields(rows.column_names))
        # The other columns may hold images or sound, which would be decoded for nothing.
        return rows.select_columns(present)

    def _without_fields(self, columns: list[str]) -> str:
        return f"{self.key('path')}={self.path!r} has none of {list(self.fields())}; it has {columns}."

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        rows = self._open()
        number = 0
        try:
            for record in itertools.islice(rows, self.max_documents):
                number += 1
                yield record
        except self._errors() as error:
            raise BadDataError(
                f"{self.key('path')}: `datasets` cannot read {name}:{number + 1} "
                f"({type(error).__name__}: {error}), and what follows would be lost. Read local files with "
                "the sources JsonLines or Parquet, which set bad lines aside and go on."
            ) from error

    def _errors(self) -> tuple[type[Exception], ...]:
        """What `datasets` raises over bad data; failures of the network keep their own type."""
        import datasets
        import pyarrow

        return (ValueError, *ARCHIVE_ERRORS, pyarrow.ArrowException, datasets.exceptions.DatasetsError)


@dataclass(frozen=True, kw_only=True)
class HubDataset(HubRows):
    """Every row of one split of a data set is a document, held by one string field; see `HubRows`.

    Args:
        field: the name of the string field that holds the text.
    """

    field: str = "text"

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Gives the split's rows in the data set's own order; see `DocumentSource.documents`."""
        for record, origin in self.read_rows():
            value = record.get(self.field)
            if value is not None and not isinstance(value, str):
                detail = f"field {self.field!r} is a {type(value).__name__}, not a string"
                quarantine.bad(origin, "missing_field", detail, repr(value)[:2000])
                continue
            text = quarantine.screen(value, origin)
            if text is not None:
                yield Document(text, origin)

    def fields(self) -> tuple[str, ...]:
        """The one that holds the text."""
        return (self.field,)

    def fingerprint(self) -> dict[str, Any]:
        """With the field."""
        return {**super().fingerprint(), "field": self.field}

    def _without_fields(self, columns: list[str]) -> str:
        return f"{self.key('field')}={self.field!r} is not in {self.path}, which has {columns}."
