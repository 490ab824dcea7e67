"""Writes a teacher cache (data/teacher_cache.py), or goes on with one.

Shape letters: R rows of a part, T tokens per row, k ids per token.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.teacher_cache import (
    CHECKSUMS,
    FORMAT,
    MANIFEST,
    PART,
    check_inputs,
    digests,
    part_folder,
    read_manifest,
)


class TeacherCacheWriter:
    """Writes a cache, or goes on with one.

    Args:
        folder: of the cache.
        inputs: what the contents are made from: equal inputs mean equal contents. Holds `rows_per_part` and
            `data.row_length`; of the teacher's word also `top_k` and `vocabulary`.
        rows: of the finished cache; a cache that holds more keeps them.
        notes: kept in the manifest for the reader.
        key: the config key that names the folder, for messages.
    """

    def __init__(
        self,
        folder: str | Path,
        inputs: dict[str, Any],
        rows: int,
        notes: dict[str, Any] | None = None,
        key: str = "stage.cache_teacher.folder",
    ):
        self.folder, self.inputs, self.rows = Path(folder), inputs, rows
        self.notes, self.key = notes or {}, key

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other runs out of the folder for the length of the block; one process of a run enters it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # vanishes with the process
            yield

    def check(self) -> None:
        """Refuses a folder that holds something else.

        Raises:
            ValueError: naming the key and what differs.
        """
        if (self.folder / MANIFEST).exists():
            check_inputs(self.folder, read_manifest(self.folder, self.key), self.inputs, self.key)
        elif self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(f"{self.key}={self.folder} holds files of something else; name a new folder.")

    def begin(self) -> list[int]:
        """Prepares the folder; one process calls it.

        Returns:
            Numbers of the parts that are not there yet.

        Raises:
            ValueError: as for `check`.
        """
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).exists():
            self.rows = max(self.rows, read_manifest(self.folder, self.key)["rows"])
        for leftover in self.folder.glob(".writing-part-*"):
            shutil.rmtree(leftover)
        missing = [number for number in range(self.parts) if not self._is_whole(number)]
        if missing:
            self._write_manifest(complete=False, parts=[])
        return missing

    @property
    def parts(self) -> int:
        """How many parts the finished cache has."""
        return -(-self.rows // self.inputs["rows_per_part"])

    def rows_of(self, number: int) -> range:
        """The positions of a part's rows."""
        size = self.inputs["rows_per_part"]
        return range(number * size, min((number + 1) * size, self.rows))

    def shapes(self, number: int) -> dict[str, tuple[tuple, np.dtype]]:
        """Shape and type of each array of a part."""
        rows, length = len(self.rows_of(number)), self.inputs["data"]["row_length"]
        if "top_k" in self.inputs:
            return part_shapes(rows, length, self.inputs["top_k"], self.inputs["vocabulary"])
        return short_loss_shapes(rows, length)

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes a part, which is on disk as a whole when this returns.

        Args:
            number: of the part.
            arrays: as `shapes` says; other types are converted.
        """
        target = part_folder(self.folder, number)
        unfinished = target.with_name(f".writing-{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, (shape, dtype) in self.shapes(number).items():
            assert arrays[name].shape == shape, (name, arrays[name].shape, shape)
            with (unfinished / f"{name}.npy").open("wb") as file:
                np.save(file, arrays[name].astype(dtype, copy=False))
                _to_disk(file)
        names = list(self.shapes(number))
        facts = {
            "rows": len(self.rows_of(number)),
            "bytes": {name: (unfinished / f"{name}.npy").stat().st_size for name in names},
            "sha256": digests(unfinished, names),
        }
        _write_text(unfinished / PART, json.dumps(facts))
        shutil.rmtree(target, ignore_errors=True)  # a part that was shorter
        os.replace(unfinished, target)

    def finish(self) -> dict[str, Any]:
        """Declares the cache complete; one process calls it, when all parts are written.

        Returns:
            The manifest.
        """
        parts = [json.loads((part_folder(self.folder, n) / PART).read_text()) for n in range(self.parts)]
        return self._write_manifest(complete=True, parts=parts)

    def _is_whole(self, number: int) -> bool:
        folder = part_folder(self.folder, number)
        try:
            facts = json.loads((folder / PART).read_text())
            sizes = {name: (folder / f"{name}.npy").stat().st_size for name in self.shapes(number)}
            return sizes == facts["bytes"] and facts["rows"] == len(self.rows_of(number))
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is written again
            return False

    def _write_manifest(self, *, complete: bool, parts: list[dict[str, Any]]) -> dict[str, Any]:
        manifest = {
            "format": FORMAT,
            "complete": complete,
            "rows": self.rows,
            "inputs": self.inputs,
            "notes": self.notes,
            "parts": parts,
        }
        _write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        return manifest


def part_shapes(rows: int, row_length: int, top_k: int, vocabulary: int) -> dict[str, tuple[tuple, np.dtype]]:
    """Shape and type of each array of a part of `rows` rows."""
    ids = np.dtype(np.uint16 if vocabulary <= 2**16 else np.int32)
    return {
        "teacher_ids": ((rows, row_length, top_k), ids),
        "teacher_logs": ((rows, row_length, top_k), np.dtype(np.float16)),
        "teacher_tail": ((rows, row_length), np.dtype(np.float32)),
        CHECKSUMS: ((rows,), np.dtype(np.uint32)),
    }


def short_loss_shapes(rows: int, row_length: int) -> dict[str, tuple[tuple, np.dtype]]:
    """As `part_shapes`, of losses after a short context."""
    return {
        "short_loss": ((rows, row_length), np.dtype(np.float32)),
        CHECKSUMS: ((rows,), np.dtype(np.uint32)),
    }


def _write_text(path: Path, text: str) -> None:
    """Replaces a file's text; it is the old one or the new one, whenever the machine stops."""
    unfinished = path.with_name(f".writing-{path.name}.txt")
    with unfinished.open("w") as file:
        file.write(text)
        _to_disk(file)
    os.replace(unfinished, path)


def _to_disk(file: IO) -> None:
    """Returns when what was written to a file would survive a power cut."""
    file.flush()
    os.fsync(file.fileno())
