"""What a model says on the rows of a stage, written once and read while the stage trains.

A cache holds something for each token of the first rows of a stage: the teacher's word (k token ids, their
log-probabilities and the log of what is left), read in the place of the teacher; or the loss after a short
context. It lies in parts of equally many rows; each is a folder that appears whole or not at all,
so that a killed writer goes on where it stopped, and several processes write at once. Rows are named by their
position, and each carries a checksum of its tokens: a row that the model has not seen is refused. Where a
stage changes the length of its rows, each phase has a cache of its own.

Shape letters: R rows of a part, T tokens per row, k ids per token.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.packing import Row, Rows

FORMAT = 1
MANIFEST = "manifest.json"
PART = "part.json"
CHECKSUMS = "row_checksums"
KEY = "objective.teacher_cache"
SHORT_KEY = "objective.short_loss"
WRITERS = {"teacher_cache": "cache_teacher", "short_loss": "cache_short_loss"}  # key of the reader -> stage


class TaughtRow(NamedTuple):
    """A row and what the teacher says at each of its tokens.

    Besides the fields of `Row`: teacher_ids [T,k] int32, teacher_logs [T,k] float16 (nats), teacher_tail [T]
    float32 (log of the probability of all other ids).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray
    teacher_ids: np.ndarray
    teacher_logs: np.ndarray
    teacher_tail: np.ndarray


class ShortLossRow(NamedTuple):
    """A row, and how well each token is predicted after a short context.

    Besides the fields of `Row`: short_loss [T] float32 (nats).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray
    short_loss: np.ndarray


# Of each kind of row: the type in which its arrays are read.
KINDS: dict[type, dict[str, type]] = {
    TaughtRow: {"teacher_ids": np.int32, "teacher_logs": np.float16, "teacher_tail": np.float32},
    ShortLossRow: {"short_loss": np.float32},
}


def writer_of(key: str) -> str:
    """The stage that writes what a config key names, for messages."""
    return WRITERS.get(key.rpartition(".")[2], key.split(".")[1])


def phase_folders(folder: str | Path, phases: int) -> list[Path]:
    """Where the caches of a stage's phases lie, each with rows of one length."""
    return [Path(folder) / f"phase-{number}" for number in range(phases)] if phases > 1 else [Path(folder)]


def row_checksum(row: Row) -> int:
    """CRC-32 of what a teacher reads of a row, and of its labels."""
    checksum = 0
    for part in row:
        checksum = zlib.crc32(np.ascontiguousarray(part), checksum)
    return checksum


def read_manifest(folder: Path, key: str = KEY) -> dict[str, Any]:
    """What a cache says of itself.

    Args:
        folder: of the cache.
        key: the config key that names it, for the message.

    Raises:
        ValueError: where there is no cache, or its manifest cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{key}={folder} holds no such cache; write one with stages=[{writer_of(key)}].")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        if not {"complete", "rows", "inputs", "parts"} <= set(manifest):
            raise ValueError("keys are missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{key}={folder}: {MANIFEST} cannot be used ({error}); delete the folder, and write it anew."
        ) from error
    return manifest


def check_cache(folder: Path, inputs: dict[str, Any], rows: int, key: str = KEY) -> None:
    """Holds a cache against a stage that wants to train from it; reads no more than the manifest and sizes.

    Args:
        folder: of the cache.
        inputs: what this stage's targets are made from, as `TeacherCacheWriter` is given it.
        rows: that the stage will read.
        key: the config key that names the folder.

    Raises:
        ValueError: where the cache is not whole, was made from something else, or is too short.
    """
    manifest = read_manifest(folder, key)
    check_inputs(folder, manifest, inputs, key)
    again = f"run stages=[{writer_of(key)}] again, it goes on where it stopped"
    if not manifest["complete"]:
        raise ValueError(f"{key}={folder} is not complete; {again}.")
    if manifest["rows"] < rows:
        raise ValueError(
            f"{key}={folder} holds {manifest['rows']} rows, the stage needs {rows}; {again}, or lower the "
            "tokens of the stage."
        )
    for number, part in enumerate(manifest["parts"]):
        for name, size in part["bytes"].items():
            path = part_folder(folder, number) / f"{name}.npy"
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{key}={folder}: {path.name} of part {number} is missing or cut; {again}.")


def check_inputs(folder: Path, manifest: dict[str, Any], inputs: dict[str, Any], key: str = KEY) -> None:
    """Refuses a cache that was made from something else.

    Raises:
        ValueError: naming what differs.
    """
    ours, theirs = flat(inputs), flat(manifest["inputs"])
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if different:
        said = [
            f"{name} ({theirs.get(name)} there, {ours.get(name)} here)"
            if len(f"{theirs.get(name)}{ours.get(name)}") < 100
            else name
            for name in different[:6]
        ]
        raise ValueError(
            f"{key}={folder} was made from something else: {', '.join(said)} differ. Make them equal, or "
            f"name another folder, and write it with stages=[{writer_of(key)}]."
        )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots, lists as JSON would give them back."""
    if isinstance(values, dict) and values:
        return {
            key: value
            for name, inner in values.items()
            for key, value in flat(inner, f"{prefix}.{name}".strip(".")).items()
        }
    return {prefix: json.loads(json.dumps(values))}


def part_folder(folder: Path, number: int) -> Path:
    """Where a part lies."""
    return Path(folder) / f"part-{number:05d}"


class TeacherCache:
    """A finished cache, memory-mapped.

    Each part's checksums are computed when it is first opened; rows are read in order, so that costs one more
    pass over bytes that are read anyway.

    Args:
        folder: of the cache.
        key: the config key that names it, for messages.

    Raises:
        ValueError: where it is not there or not complete.
    """

    def __init__(self, folder: str | Path, key: str = KEY):
        self.folder, self.key = Path(folder), key
        self.manifest = read_manifest(self.folder, key)
        if not self.manifest["complete"]:
            raise ValueError(f"{key}={folder} is not complete; run stages=[{writer_of(key)}] again.")
        self.rows, self.rows_per_part = self.manifest["rows"], self.manifest["inputs"]["rows_per_part"]
        self._checked: set[int] = set()
        self._open: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def taught(self, index: int, row: Row) -> TaughtRow | ShortLossRow:
        """A row with what the cache holds on it.

        Args:
            index: position of the row in the sequence that the cache was written for.
            row: as read now.

        Raises:
            ValueError: where the cache ends before it, is damaged, or was written for another row.
        """
        if index >= self.rows:
            raise ValueError(
                f"{self.key}={self.folder} ends after {self.rows} rows; row {index} is not in it."
            )
        part = self._part(index // self.rows_per_part)
        place = index % self.rows_per_part
        if int(part[CHECKSUMS][place]) != row_checksum(row):
            raise ValueError(
                f"{self.key}={self.folder}: row {index} holds other tokens than the model saw; the data have "
                "changed since. Write the cache anew."
            )
        kind = next(kind for kind, names in KINDS.items() if names.keys() <= part.keys())
        return kind(*row, *(part[name][place].astype(dtype) for name, dtype in KINDS[kind].items()))

    def _part(self, number: int) -> dict[str, np.ndarray]:
        if self._open[0] != number:
            folder = part_folder(self.folder, number)
            expected = self.manifest["parts"][number]["sha256"]
            try:
                if number not in self._checked and digests(folder, expected) != expected:
                    raise ValueError("its checksum differs")
                arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in expected}
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self.key}={self.folder}: part {number} is damaged ({error}); delete {folder}, and run "
                    f"stages=[{writer_of(self.key)}] again."
                ) from error
            self._checked.add(number)
            self._open = (number, arrays)
        return self._open[1]


class TaughtRows:
    """Rows with what a cache holds on them.

    Args:
        rows: of one length.
        caches: of these rows, and of the lengths that follow.
    """

    def __init__(self, rows: Rows, caches: Sequence[TeacherCache]):
        self.rows, self.caches = rows, caches

    def row(self, index: int) -> TaughtRow | ShortLossRow:
        """The row at a position, which must lie in the cache."""
        return self.caches[0].taught(index, self.rows.row(index))

    def split(self, count: int, row_length: int) -> tuple["TaughtRows", "TaughtRows"]:
        """The first rows, and those of the next length, which have the next cache."""
        first, later = self.rows.split(count, row_length)
        return TaughtRows(first, self.caches[:1]), TaughtRows(later, self.caches[1:])


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of a part's files, by name."""
    found = {}
    for name in names:
        with (folder / f"{name}.npy").open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
