"""Documents from a column of Parquet files, read a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data.documents import Document
from data.files import ARCHIVE_ERRORS
from data.quarantine import Quarantine
from data.text import FileSource

BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Parquet(FileSource):
    """Every row is a document, held by one column of strings or bytes.

    The origin is `path:row`, rows counted from 1 over the whole file. Rows are divided between the splits by
    their file's path below the named folder and their number. See `FileSource` for the other arguments.

    Args:
        column: the name of the column that holds the text.
    """

    column: str = "text"
    suffixes: tuple[str, ...] = (".parquet",)

    def options(self) -> dict[str, Any]:
        """The column."""
        return {"column": self.column}

    def documents(self, quarantine: Quarantine) -> Iterator[Document]:
        """Gives the split's rows in order; a broken file ends itself only. See `DocumentSource.documents`.

        Raises:
            ValueError: naming `data.sources.<name>.column`, where a file lacks it or it holds no text.
        """
        for file in self.files():
            row = 0
            try:
                with open(file.path, "rb") as handle:
                    for row, value in enumerate(self._values(handle, file.path), 1):
                        if not self.keeps(f"{file.key}:{row}"):
                            continue
                        text = quarantine.screen(value, f"{file.path}:{row}")
                        if text is not None:
                            yield Document(text, f"{file.path}:{row}")
            except ARCHIVE_ERRORS as error:
                quarantine.bad(f"{file.path}:{row + 1}", "broken_archive", str(error), b"")

    def _values(self, handle: BinaryIO, path: str) -> Iterator[bytes | None]:
        """The column's values, as bytes so that one wrong row does not take its neighbours with it."""
        import pyarrow
        import pyarrow.parquet

        try:
            # A buffered stream without read-ahead holds pages, not whole row groups, in memory.
            table = pyarrow.parquet.ParquetFile(handle, buffer_size=2**20, pre_buffer=False)
            self._check_column(table.schema_arrow, path)
            for batch in table.iter_batches(BATCH_ROWS, columns=[self.column], use_threads=False):
                values = batch.column(0)
                if pyarrow.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                for value in values.cast(pyarrow.large_binary()):
                    yield value.as_py()
        except (pyarrow.ArrowException, OSError) as error:
            raise EOFError(f"{type(error).__name__}: {error}") from error

    def _check_column(self, schema: Any, path: str) -> None:
        from pyarrow import types

        if self.column not in schema.names:
            raise ValueError(
                f"{self.key('column')}={self.column!r} is not in {path}, which has {schema.names}."
            )
        kind = schema.field(self.column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        texts = (types.is_string, types.is_large_string, types.is_string_view)
        binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
        if not any(test(kind) for test in texts + binaries):
            raise ValueError(f"{self.key('column')}={self.column!r} of {path} holds {kind}, not text.")
