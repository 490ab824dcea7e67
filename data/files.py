"""Files as inputs: which ones a config names, what identifies them, and how compressed ones are read."""

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.quarantine import EXCERPT_BYTES

# What reading a damaged or cut compressed file raises; anything else (a vanished disk) is not its fault.
ARCHIVE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
COMPRESSED = (".gz", ".zst")
WHOLE_HASH_BYTES = 16 * 2**20  # larger files are identified by size, time and both ends
LISTED_FILES = 200
ZSTD_INPUT_BYTES = 2048  # bounds what one step can blow up to (64 MiB), whatever the file claims


class InputFile(NamedTuple):
    """A file of a source: where it is, and its posix name below the source's root, which survives a move."""

    path: str
    key: str


def find_files(paths: Sequence[str], suffixes: Sequence[str], config_key: str) -> list[InputFile]:
    """Lists the files that `paths` name, each once, in the order of `paths` and then by name.

    A file is taken as named. A glob (`**` recursive) takes every file it matches. A folder gives the files
    below it that end in one of `suffixes`; hidden names and linked folders are left out.

    Raises:
        ValueError: naming `config_key`, for a path that yields no file.
    """
    files, seen = [], set()
    for path in paths:
        expanded = os.path.expanduser(path)
        found = _expand(expanded, tuple(suffixes))
        if not found:
            kind = f"no file ending in {', '.join(suffixes)}" if os.path.isdir(expanded) else "no file"
            raise ValueError(
                f"{config_key}: {path!r} names {kind}, seen from {os.getcwd()}; correct the path."
            )
        for file in found:
            # One file named twice would be read twice, and could stand on both sides of a split.
            identity = os.path.realpath(file.path)
            if identity not in seen:
                seen.add(identity)
                files.append(file)
    return files


def _expand(path: str, suffixes: tuple[str, ...]) -> list[InputFile]:
    if os.path.isfile(path):
        return [InputFile(path, os.path.basename(path))]
    if os.path.isdir(path):
        root, names = path, _walk(path, suffixes)
    else:
        parts = Path(path).parts
        magic = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root = str(Path(*parts[:magic]))
        names = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    pairs = sorted((Path(os.path.relpath(name, root)).as_posix(), name) for name in names)
    return [InputFile(name, key) for key, name in pairs]


def _walk(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if name.endswith(suffixes) and name[0] != "."]
    return found


def fingerprint_files(files: Sequence[InputFile]) -> dict[str, Any]:
    """Identifies files for a cache key: their count, bytes, one hash over all, and the first ones in full.

    A file up to 16 MiB is identified by its content; a larger one by size, modification time and the content
    of its first and last MiB, since hashing terabytes would cost more than the cache saves.
    """
    total = hashlib.sha256()
    listing, size = [], 0
    for file in files:
        entry = {"file": file.key, **_identify(file.path)}
        total.update(repr(sorted(entry.items())).encode("utf-8", "surrogateescape"))
        size += entry["bytes"]
        if len(listing) < LISTED_FILES:
            listing.append(entry)
    return {"files": len(files), "bytes": size, "sha256": total.hexdigest(), "first_files": listing}


def _identify(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= WHOLE_HASH_BYTES:
            return {"bytes": status.st_size, "sha256": hashlib.sha256(file.read()).hexdigest()}
        ends = hashlib.sha256(file.read(2**20))
        file.seek(-(2**20), os.SEEK_END)
        ends.update(file.read())
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "sha256_of_ends": ends.hexdigest()}


def open_bytes(path: str) -> BinaryIO:
    """Opens a file for reading bytes, decompressing `.gz` and `.zst` as it goes.

    Reading raises one of `ARCHIVE_ERRORS` where the compressed stream is damaged or cut short.
    """
    if not path.endswith(COMPRESSED):
        return open(path, "rb")
    if os.path.getsize(path) == 0:
        raise EOFError("the compressed file has no byte")
    return gzip.open(path, "rb") if path.endswith(".gz") else io.BufferedReader(_ZstdReader(path), 2**20)


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a `.zst` file of any number of frames.

    The zstandard package's own stream reader takes a cut stream for a finished one; this one raises EOFError.
    """

    def __init__(self, path: str):
        import zstandard

        # Large public corpora are packed with `--long=31`, which the default window refuses.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._errors = zstandard.ZstdError
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._frame = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Always true; asked by the buffering layer."""
        return True

    def close(self) -> None:
        """Closes the file below as well."""
        self._file.close()
        super().close()

    def readinto(self, target: memoryview) -> int:
        """Fills `target` with at least one byte, or returns 0 at the end of the last frame."""
        while not self._output:
            self._input = self._input or self._file.read(ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends inside a frame")
                return 0
            self._decompress()
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> None:
        frame = self._frame or self._decompressor.decompressobj()
        try:
            self._output = memoryview(frame.decompress(self._input))
        except self._errors as error:
            raise EOFError(str(error)) from error
        self._input = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame


def read_lines(path: str, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Gives each line without its end, and its size in bytes, with at most `max_bytes` of any line in memory.

    Of a line above `max_bytes` only the beginning is given; its size tells. A byte-order mark is removed.
    """
    with open_bytes(path) as stream:
        first = True
        while line := stream.readline(max_bytes + 2):  # room for "\r\n"
            body = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
            size = len(body)
            if size > max_bytes:
                body = body[:EXCERPT_BYTES]
                while line and not line.endswith(b"\n"):
                    line = stream.readline(2**16)
                    size += len(line.removesuffix(b"\n"))
            yield (body.removeprefix(b"\xef\xbb\xbf") if first else body), size
            first = False
