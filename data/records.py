"""Records as an input: objects with several fields, from lines of JSON, rows of Parquet, or the Hub."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.documents import Document, DocumentSource
from data.files import ARCHIVE_ERRORS, InputFile
from data.hub import HubRows
from data.quarantine import Quarantine
from data.text import FileSource, Record, json_lines

BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class RecordSource(DocumentSource):
    """What sources of records share: each record becomes one document or several, by rules of its own kind.

    A reader (`FileRecords` or `HubRecords`) stands beside it as the other base class.
    """

    def fields(self) -> tuple[str, ...]:
        """The fields of a record that are read, where it has them."""
        raise NotImplementedError

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Records are no text.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"data.sources.{self.name} holds conversations; here a source of text is needed.")


@dataclass(frozen=True, kw_only=True)
class FileRecords(FileSource):
    """Lines of JSON (`.gz` and `.zst` too) and rows of Parquet files; the origin is `path:line`."""

    suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

    def records(self, quarantine: Quarantine) -> Iterator[Record]:
        """The split's records, file by file; a broken file ends itself only.

        Raises:
            ValueError: where a Parquet file has none of the fields.
        """
        for file in self.files():
            if file.path.endswith(".parquet"):
                yield from self._parquet(file, quarantine)
            else:
                yield from json_lines(file, self.keeps, quarantine)

    def _parquet(self, file: InputFile, quarantine: Quarantine) -> Iterator[Record]:
        number = 0
        try:
            for number, value in enumerate(parquet_rows(file.path, self.fields(), self.key("paths")), 1):
                if self.keeps(f"{file.key}:{number}"):
                    yield Record(value, f"{file.path}:{number}", repr(value)[:2000].encode())
        except ARCHIVE_ERRORS as error:
            quarantine.bad(f"{file.path}:{number + 1}", "broken_archive", str(error), b"")


@dataclass(frozen=True, kw_only=True)
class HubRecords(HubRows):
    """Rows of a data set that the `datasets` library loads; the origin is `path:row`."""

    def records(self, quarantine: Quarantine) -> Iterator[Record]:
        """The split's rows in the data set's own order.

        Raises:
            ValueError: naming the key, where the data set cannot be opened or has none of the fields.
            BadDataError: where `datasets` cannot read on.
        """
        for value, origin in self.read_rows():
            yield Record(value, origin, repr(value)[:2000].encode())


def parquet_rows(path: str, fields: Sequence[str], key: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as plain Python values, a few at a time.

    Args:
        path: the file.
        fields: columns that are read, where the file has them.
        key: the config key that named the file.

    Raises:
        ValueError: where the file has none of the columns.
        EOFError: where it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as handle:
            table = pyarrow.parquet.ParquetFile(handle, buffer_size=2**20, pre_buffer=False)
            present = [name for name in fields if name in table.schema_arrow.names]
            if not present:
                raise ValueError(
                    f"{key}: {path} has none of {list(fields)}; its columns are {table.schema_arrow.names}."
                )
            for batch in table.iter_batches(BATCH_ROWS, columns=present, use_threads=False):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise EOFError(f"{type(error).__name__}: {error}") from error
