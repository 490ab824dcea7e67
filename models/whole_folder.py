"""Model folders on disk: written whole or not at all, and read with errors that say what is damaged."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FIX = "Name another folder (a run keeps a student per stage, checkpoints/<stage>/student), or make it anew."


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder` to write to; when the block ends well it takes its place.

    What stood in its place is replaced. Where the block fails nothing has changed; where the process is
    killed, a folder named `<folder>.writing` is left, and the next call removes it.
    """
    unfinished = folder.with_name(folder.name + ".writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _flush(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    _flush(folder.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: where it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}). {FIX}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping. {FIX}")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, on the CPU.

    Raises:
        ValueError: where there is no such file, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights (no .safetensors file). {FIX}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged or cut short ({error}). {FIX}") from error
    return tensors


def check_tensors(folder: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Holds a folder's tensors against those of its model; of tensors that share memory one is enough.

    Raises:
        ValueError: where one is missing, has another shape, or is not the model's.
    """
    held = {wanted[name].data_ptr() for name in found if name in wanted}
    missing = [name for name in wanted if name not in found and wanted[name].data_ptr() not in held]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [name for name in found if name in wanted and found[name].shape != wanted[name].shape]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    wrong = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in kinds.items() if names
    ]
    if wrong:
        raise ValueError(f"{folder} is damaged or of another version; tensors: {'; '.join(wrong)}. {FIX}")


def _flush(path: Path) -> None:
    """Waits until a file or a folder's list of files is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
