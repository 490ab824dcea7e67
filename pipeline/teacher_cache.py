"""The stages that write a cache: a model runs once over the rows of another stage."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.launch import device as device_of
from conf.ranks import process_count
from conf.stages import build_stage, build_stage_data, stage_timeline
from conf.teacher_caches import cache_writers
from data.loader import collate
from data.packing import Row, Rows
from data.teacher_cache import CHECKSUMS, row_checksum
from data.teacher_cache_writer import TeacherCacheWriter
from models import ranks
from models.short_loss import CacheShortLoss, short_losses, student_identity
from models.teacher_targets import CacheTeacher, top_k_targets
from pipeline.training import batch_shapes

log = logging.getLogger(__name__)
Targets = Callable[
    [dict[str, Tensor]], dict[str, Tensor]
]  # a batch on the device -> arrays [B,...] on the CPU


def write_caches(
    config: DictConfig,
    stage: CacheTeacher | CacheShortLoss,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Writes what is missing of the caches of a stage's phases; the processes of the run divide the parts
    among themselves.

    Returns:
        The stage's facts for the journal.
    """
    started = time.perf_counter()
    of = build_stage(config, stage.of)
    data = build_stage_data(config, stage.of, tokenizer=tokenizer)
    data.prepare_data()
    timeline = stage_timeline(config, of, process_count(config))
    data.train_on(batch_shapes(timeline, of.accumulate))
    speaker = student if getattr(stage, "by", "teacher") == "student" else teacher
    speaker.to(device_of(config))
    identity = student_identity(student) if speaker is student else None
    was_training = speaker.training
    speaker.eval()
    rows = size = 0
    sources = data.rows_by_shape(process_count(config))
    writers = cache_writers(config, stage, tokenizer, identity)
    for writer, source, phase in zip(writers, sources, timeline.phases, strict=True):
        targets = _targets(stage, of.objective, speaker, device_of(config))
        size += _write(writer, source, phase.rows_per_device, targets)
        rows += writer.rows
    speaker.train(was_training)
    seconds = time.perf_counter() - started
    return {"tokens": 0, "seconds": seconds, "cached_rows": rows, "cached_bytes": size}


def _targets(
    stage: CacheTeacher | CacheShortLoss, objective: Any, speaker: PreTrainedModel, device: str
) -> Targets:
    """What the stage keeps of a batch."""

    def targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        if isinstance(stage, CacheShortLoss):
            return short_losses(speaker, batch, objective.short_context, objective.chunk_tokens)
        temperature = float(objective.temperature)
        return top_k_targets(speaker, batch, stage.top_k, temperature, stage.chunk_tokens)

    return targets


def _write(writer: TeacherCacheWriter, source: Rows, rows_per_batch: int, targets: Targets) -> int:
    """Writes the missing parts of one cache; its size in bytes."""
    with writer.alone() if ranks.is_first() else nullcontext():
        missing, writer.rows = ranks.share(lambda: (writer.begin(), writer.rows))
        log.info("Cache %s: %d of %d parts to write", writer.folder, len(missing), writer.parts)
        for begin in range(0, len(missing), ranks.world_size()):
            # Where the last round is not full, a process repeats a part without writing it: all must take
            # part when the model is sharded.
            turn = begin + ranks.rank()
            number = missing[turn if turn < len(missing) else begin]
            taken = [source.row(index) for index in writer.rows_of(number)]
            arrays = _arrays(taken, rows_per_batch, targets)
            if turn < len(missing):
                writer.write(number, {**arrays, CHECKSUMS: np.asarray([row_checksum(row) for row in taken])})
            done = min(begin + ranks.world_size(), len(missing))
            log.info("Cache %s: %d of %d parts", writer.folder, done, len(missing))
        ranks.barrier()
        return ranks.share(lambda: sum(sum(part["bytes"].values()) for part in writer.finish()["parts"]))


def _arrays(rows: list[Row], rows_per_batch: int, targets: Targets) -> dict[str, np.ndarray]:
    """The arrays of one part. Every process calls the model as often: a part that is shorter than another's
    repeats its last batch."""
    batches = [rows[first : first + rows_per_batch] for first in range(0, len(rows), rows_per_batch)]
    found = []
    for turn in range(ranks.largest(len(batches))):
        made = targets(collate(batches[min(turn, len(batches) - 1)]))
        if turn < len(batches):
            found.append(made)
    return {name: np.concatenate([made[name].numpy() for made in found]) for name in found[0]}
