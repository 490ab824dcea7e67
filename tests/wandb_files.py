"""Reads what wandb leaves offline: the records of a `.wandb` file, for which it has no public reader."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7  # bytes
WHOLE, LAST = 1, 4  # kinds of a piece that ends a record


def records(path: Path) -> Iterator:
    """The protobuf records of a file, in order; it is a log of blocks in which a long record has pieces."""
    from wandb.proto import wandb_internal_pb2

    data, at, held = path.read_bytes(), FILE_HEADER, b""
    while at + HEADER <= len(data):
        if (room := BLOCK - at % BLOCK) < HEADER:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        held += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def histories(path: Path) -> list[dict]:
    """The rows of the history: name -> value; of a table or an image only what stands at its first level."""
    rows = [record.history for record in records(path) if record.HasField("history")]
    return [_values(row.item) for row in rows]


def summary(path: Path) -> dict:
    """The summary as it stood at the end of the file."""
    found = {}
    for record in records(path):
        if record.HasField("summary"):
            found |= _values(record.summary.update)
    return found


def config(path: Path) -> dict:
    """The config with which the run began."""
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def artifacts(path: Path, kind: str) -> dict[str, dict[str, Path]]:
    """Name -> {path in the artifact: file on disk} of the artifacts of one type."""
    found = [record.artifact for record in records(path) if record.HasField("artifact")]
    return {
        artifact.name: {item.path: Path(item.local_path) for item in artifact.manifest.contents}
        for artifact in found
        if artifact.type == kind
    }


def _values(items) -> dict:
    named = ((list(item.nested_key) or [item.key], item.value_json) for item in items)
    return {names[0]: json.loads(value) for names, value in named}
