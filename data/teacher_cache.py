"""The teacher's most likely tokens, written once and read in the place of the teacher.

A cache holds, for each token of the first rows of a stage, k token ids, their log-probabilities and the log
of what is left. It lies in parts of equally many rows; each is a folder that appears whole or not at all,
so that a killed writer goes on where it stopped, and several processes write at once. Rows are named by their
position, and each carries a checksum of its tokens: a row that the teacher has not seen is refused.

Shape letters: R rows of a part, T tokens per row, k ids per token.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.packing import Row, Rows

FORMAT = 1
MANIFEST = "manifest.json"
PART = "part.json"
CHECKSUMS = "row_checksums"
KEY = "objective.teacher_cache"


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
        raise ValueError(f"{key}={folder} holds no teacher cache; write one with stages=[cache_teacher].")
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
    again = "run stages=[cache_teacher] again, it goes on where it stopped"
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
            "name another folder, and write it with stages=[cache_teacher]."
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

    Raises:
        ValueError: where it is not there or not complete.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(f"{KEY}={folder} is not complete; run stages=[cache_teacher] again.")
        self.rows, self.rows_per_part = self.manifest["rows"], self.manifest["inputs"]["rows_per_part"]
        self._checked: set[int] = set()
        self._open: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def taught(self, index: int, row: Row) -> TaughtRow:
        """A row with the teacher's word on it.

        Args:
            index: position of the row in the sequence that the cache was written for.
            row: as read now.

        Raises:
            ValueError: where the cache ends before it, is damaged, or was written for another row.
        """
        if index >= self.rows:
            raise ValueError(f"{KEY}={self.folder} ends after {self.rows} rows; row {index} is not in it.")
        part = self._part(index // self.rows_per_part)
        place = index % self.rows_per_part
        if int(part[CHECKSUMS][place]) != row_checksum(row):
            raise ValueError(
                f"{KEY}={self.folder}: row {index} holds other tokens than the teacher saw; the data have "
                "changed since. Write the cache anew."
            )
        return TaughtRow(
            *row,
            part["teacher_ids"][place].astype(np.int32),
            part["teacher_logs"][place].copy(),
            part["teacher_tail"][place].copy(),
        )

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
                    f"{KEY}={self.folder}: part {number} is damaged ({error}); delete {folder}, and run "
                    "stages=[cache_teacher] again."
                ) from error
            self._checked.add(number)
            self._open = (number, arrays)
        return self._open[1]


class TaughtRows:
    """Rows with what a cache holds on them."""

    def __init__(self, rows: Rows, cache: TeacherCache):
        self.rows, self.cache = rows, cache

    def row(self, index: int) -> TaughtRow:
        """The row at a position, which must lie in the cache."""
        return self.cache.taught(index, self.rows.row(index))


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of a part's files, by name."""
    found = {}
    for name in names:
        with (folder / f"{name}.npy").open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
