"""Runs one training stage: the stage's data, one Lightning module, one trainer."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from callbacks.checkpoint import checkpoint_metrics, checkpoint_step, newest_checkpoint
from callbacks.metrics_csv import MetricsCsv
from callbacks.panels import panel_loggers
from conf.launch import build, device
from conf.stages import build_callbacks, build_stage_data, stage_timeline
from conf.teacher_caches import cache_key, check_reading
from data.datamodule import TextDataModule
from data.row_module import BatchShape
from models import ranks
from models.distill_module import ConversionModule
from models.evaluation import evaluate
from models.short_loss import student_identity
from models.stage import StageConfig
from models.timeline import Timeline

log = logging.getLogger(__name__)
STRETCHES = 16  # of a row, in the held-out loss along it


def train_stage(
    config: DictConfig,
    stage: StageConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    loggers: list[Logger],
    *,
    run_folder: Path,
    tokens_before: int,
    reference: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Trains the student in place, from the stage's newest checkpoint if it was interrupted.

    Returns:
        {"tokens", "seconds"}: trained on, and wall-clock time of the stage, earlier attempts included; with a
        curriculum also "longer_rows", see `held_out_curve`.

    Raises:
        SystemExit: where training was asked to stop (a signal); the run can be resumed.
    """
    data = build_stage_data(config, stage.name, tokenizer=tokenizer)
    data.prepare_data()
    _read_caches(config, stage, student, tokenizer, data)
    timeline = stage_timeline(config, stage, ranks.world_size())
    data.train_on(batch_shapes(timeline, stage.accumulate))
    module = ConversionModule(
        student,
        teacher,
        stage,
        tokenizer=tokenizer,
        timeline=timeline,
        tokens_before=tokens_before,
        reference=reference,
    )
    resume = _resume_point(config, run_folder / "checkpoints" / stage.name)
    if resume is not None and config.strategy.name == "fsdp":
        # A sharded checkpoint is read into the state that the trainable parameters have, no more and no less.
        module.train_only(module.groups_before(checkpoint_step(resume)))
    callbacks = list(build_callbacks(config).values())
    _begin_loggers(loggers, module, resume)
    trainer = build_trainer(config, stage, timeline, loggers, callbacks)
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except CheckpointException as error:  # derives from BaseException, which nobody expects of an error
        raise RuntimeError(str(error)) from error
    if trainer.should_stop or trainer.global_step < timeline.steps:  # asked to, perhaps in the last step
        where = (stage.name, trainer.global_step, timeline.steps)
        log.warning("Stage %s stopped at step %d of %d; resume it with ckpt_path=auto.", *where)
        raise SystemExit(1)
    clock = next(
        (c.seconds for c in callbacks if type(c).__name__ == "Throughput"), time.perf_counter() - started
    )
    facts = {"tokens": timeline.tokens, "seconds": clock}
    return facts | ({"longer_rows": held_out_curve(config, student, data)} if stage.curriculum else {})


def _read_caches(
    config: DictConfig,
    stage: StageConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TextDataModule,
) -> None:
    """Makes the data bring what the objective reads from a cache, which an earlier stage may just have
    written."""
    if key := cache_key(stage.objective):
        identity = student_identity(student) if key == "short_loss" else None
        folders = check_reading(config, stage, tokenizer, identity)
        data.teach_from(*folders, key=f"stage.{stage.name}.objective.{key}")


def held_out_curve(
    config: DictConfig, student: PreTrainedModel, data: TextDataModule
) -> dict[str, Any] | None:
    """How well the student predicts held-out text along rows of the stage's last length.

    Returns:
        {"row_length", "loss", "by_position"}: the mean, and [last token, mean up to it from the entry before]
        for each of (at most) 16 equal parts of a row that has labels; None where the held-out text fills no
        such row.
    """
    try:
        batches = data.validation_batches(max(1, data.validation_rows // 4))
    except ValueError as error:
        log.warning("No held-out figure for rows of %d tokens: %s", data.row_length, error)
        return None
    sums = evaluate(student.to(device(config)), None, batches)
    stretches = min(STRETCHES, data.row_length)
    parts = [sums.by_position[name].tensor_split(stretches) for name in ("loss", "count")]
    ends = np.cumsum([len(loss) for loss in parts[0]]).tolist()
    labelled = [(end, loss, count) for end, loss, count in zip(ends, *parts, strict=True) if count.sum()]
    ends, means = [end for end, *_ in labelled], [float(x.sum() / n.sum()) for _, x, n in labelled]
    mean = sums.means()["loss"]
    words = (data.row_length, mean, means[0], means[-1])
    log.info("Held-out loss on rows of %d tokens: %.4g; at their beginning %.4g, at their end %.4g", *words)
    return {"row_length": data.row_length, "loss": mean, "by_position": list(zip(ends, means, strict=True))}


def batch_shapes(timeline: Timeline, accumulate: int) -> list[BatchShape]:
    """What each device reads in a stage, in the data module's words."""
    return [
        BatchShape(phase.steps * accumulate, phase.row_length, phase.rows_per_device)
        for phase in timeline.phases
    ]


def _resume_point(config: DictConfig, folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage, the same in every process; None where it begins anew.

    Raises:
        ValueError: where another kind of strategy has written it.
    """
    resume = ranks.share(lambda: newest_checkpoint(folder))
    if resume is not None and resume.is_dir() != (config.strategy.name == "fsdp"):
        raise ValueError(
            f"strategy={config.strategy.name} cannot continue from {resume}: strategy=fsdp writes a folder, "
            "single and ddp write a file. Resume with the kind of strategy that the run began with."
        )
    if resume is not None:
        log.info("Stage %s goes on from %s", folder.name, resume)
    return resume


def _begin_loggers(loggers: list[Logger], module: ConversionModule, resume: Path | None) -> None:
    """Tells tables and panels where the stage stands, and what was logged at the step it goes on from."""
    for table in (logger for logger in loggers if isinstance(logger, MetricsCsv)):
        table.begin_stage(module.stage_name, module.tokens_at)
        _rewind(table, module.stage_name, resume)
    for panel in panel_loggers(loggers) if resume is not None else ():
        panel.begin_stage(module.stage_name, module.tokens_at)
        panel.log_metrics(checkpoint_metrics(resume), step=checkpoint_step(resume) - 1)


def _rewind(table: MetricsCsv, stage: str, checkpoint: Path | None) -> None:
    """Makes metrics.csv end with the step that the stage goes on from."""
    if checkpoint is None:
        table.truncate_after(stage, -1)
        return
    step = checkpoint_step(checkpoint)
    table.truncate_after(stage, step - 1)
    table.record(checkpoint_metrics(checkpoint), step=step)


def build_trainer(
    config: DictConfig, stage: StageConfig, timeline: Timeline, loggers: list, callbacks: list[pl.Callback]
) -> pl.Trainer:
    """The Lightning trainer of one stage."""
    options = config.trainer
    validates = stage.validate_every_steps > 0
    # Copies that average gradients wait for every parameter that may train, unless they look for the frozen.
    freezes = config.strategy.name == "ddp" and bool(stage.freezing_phases(timeline))
    waits = {"find_unused_parameters": True} if freezes else {}
    shows_progress = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        plugins=[LightningEnvironment()],  # conf.ranks has set the variables, whoever started the processes
        strategy="auto"
        if config.strategy.name == "single"
        else build(config.strategy.lightning, "strategy", **waits),
        precision=options.precision,
        deterministic=options.deterministic,
        profiler=options.profiler,
        max_steps=timeline.steps,
        accumulate_grad_batches=stage.accumulate,
        gradient_clip_val=stage.gradient_clip or None,
        log_every_n_steps=stage.log_every_steps,
        val_check_interval=stage.validate_every_steps * stage.accumulate if validates else None,
        check_val_every_n_epoch=None if validates else 1,
        limit_val_batches=1.0 if validates else 0,
        num_sanity_val_steps=0,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,  # callbacks.checkpoint saves
        enable_model_summary=False,
        enable_progress_bar=shows_progress,
        use_distributed_sampler=False,  # Lightning's would shuffle; data.loader divides rows itself
    )
