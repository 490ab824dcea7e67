"""The stage cache_teacher: the teacher runs once over the rows of another stage, and its word is written."""

import logging
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.launch import device as device_of
from conf.stages import build_stage_data
from conf.teacher_caches import cache_writer
from data.loader import collate
from data.packing import Row
from data.teacher_cache import CHECKSUMS, row_checksum
from models import ranks
from models.teacher_targets import CacheTeacher, top_k_targets

log = logging.getLogger(__name__)


def cache_teacher(
    config: DictConfig, stage: CacheTeacher, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Writes what is missing of the cache; the processes of the run divide its parts among themselves.

    Returns:
        The stage's facts for the journal.
    """
    started = time.perf_counter()
    data = build_stage_data(config, stage.of, tokenizer=tokenizer)
    data.prepare_data()
    writer = cache_writer(config, stage, tokenizer)
    source, temperature, device = data.train_rows(), writer.inputs["temperature"], device_of(config)
    teacher.to(device)
    with writer.alone() if ranks.is_first() else nullcontext():
        missing, writer.rows = ranks.share(lambda: (writer.begin(), writer.rows))
        log.info("Teacher cache %s: %d of %d parts to write", stage.folder, len(missing), writer.parts)
        for begin in range(0, len(missing), ranks.world_size()):
            # Where the last round is not full, a process repeats a part without writing it: all must take
            # part when the teacher is sharded.
            turn = begin + ranks.rank()
            number = missing[turn if turn < len(missing) else begin]
            taken = [source.row(index) for index in writer.rows_of(number)]
            arrays = _targets(stage, teacher, taken, data.rows_per_device, temperature, device)
            if turn < len(missing):
                writer.write(number, {**arrays, CHECKSUMS: np.asarray([row_checksum(row) for row in taken])})
            done = min(begin + ranks.world_size(), len(missing))
            log.info("Teacher cache: %d of %d parts", done, len(missing))
        ranks.barrier()
        size = ranks.share(lambda: sum(sum(part["bytes"].values()) for part in writer.finish()["parts"]))
    seconds = time.perf_counter() - started
    return {"tokens": 0, "seconds": seconds, "cached_rows": writer.rows, "cached_bytes": size}


def _targets(
    stage: CacheTeacher,
    teacher: PreTrainedModel,
    rows: list[Row],
    rows_per_batch: int,
    temperature: float,
    device: str,
) -> dict[str, np.ndarray]:
    """The arrays of one part. Every process calls the teacher as often: a part that is shorter than another's
    repeats its last batch."""
    batches = [rows[first : first + rows_per_batch] for first in range(0, len(rows), rows_per_batch)]
    found = []
    for turn in range(ranks.largest(len(batches))):
        batch = collate(batches[min(turn, len(batches) - 1)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        targets = top_k_targets(teacher, batch, stage.top_k, temperature, stage.chunk_tokens)
        if turn < len(batches):
            found.append(targets)
    return {name: np.concatenate([targets[name].numpy() for targets in found]) for name in found[0]}
