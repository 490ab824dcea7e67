"""Runs one training stage: the stage's data, one Lightning module, one trainer."""

import logging
import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from callbacks.checkpoint import checkpoint_metrics, checkpoint_step, newest_checkpoint
from callbacks.metrics_csv import MetricsCsv
from callbacks.panels import panel_loggers
from conf.launch import build, stage_data
from models import ranks
from models.distill_module import ConversionModule
from models.stage import StageConfig

log = logging.getLogger(__name__)


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
) -> dict[str, float]:
    """Trains the student in place, from the stage's newest checkpoint if it was interrupted.

    Returns:
        {"tokens", "seconds"}: trained on, and wall-clock time of the stage, earlier attempts included.

    Raises:
        SystemExit: where training was asked to stop (a signal); the run can be resumed.
    """
    data = build(stage_data(config, stage.name), "data", tokenizer=tokenizer)
    data.prepare_data()
    tokens_per_step = data.row_length * data.rows_per_device * stage.accumulate * ranks.world_size()
    module = ConversionModule(
        student,
        teacher,
        stage,
        tokenizer=tokenizer,
        tokens_per_step=tokens_per_step,
        tokens_before=tokens_before,
    )
    resume = _resume_point(config, run_folder / "checkpoints" / stage.name)
    callbacks = [
        build(callback, f"callbacks.{name}") for name, callback in config.callbacks.items() if callback
    ]
    _begin_loggers(loggers, stage.name, tokens_before, tokens_per_step, resume)
    trainer = build_trainer(config, stage, module.steps, loggers, callbacks)
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except CheckpointException as error:  # derives from BaseException, which nobody expects of an error
        raise RuntimeError(str(error)) from error
    if trainer.should_stop or trainer.global_step < module.steps:  # asked to, perhaps in the last step
        log.warning(
            "Stage %s stopped at step %d of %d; resume it with ckpt_path=auto.",
            stage.name,
            trainer.global_step,
            module.steps,
        )
        raise SystemExit(1)
    clock = next(
        (c.seconds for c in callbacks if type(c).__name__ == "Throughput"), time.perf_counter() - started
    )
    return {"tokens": module.steps * tokens_per_step, "seconds": clock}


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


def _begin_loggers(
    loggers: list[Logger], stage: str, tokens_before: int, tokens_per_step: int, resume: Path | None
) -> None:
    """Tells tables and panels where the stage stands, and what was logged at the step it goes on from."""
    for table in (logger for logger in loggers if isinstance(logger, MetricsCsv)):
        table.begin_stage(stage, tokens_before, tokens_per_step)
        _rewind(table, stage, resume)
    for panel in panel_loggers(loggers) if resume is not None else ():
        panel.begin_stage(stage, tokens_before, tokens_per_step)
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
    config: DictConfig, stage: StageConfig, steps: int, loggers: list, callbacks: list[pl.Callback]
) -> pl.Trainer:
    """The Lightning trainer of one stage."""
    options = config.trainer
    validates = stage.validate_every_steps > 0
    shows_progress = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        plugins=[LightningEnvironment()],  # conf.ranks has set the variables, whoever started the processes
        strategy="auto" if config.strategy.name == "single" else build(config.strategy.lightning, "strategy"),
        precision=options.precision,
        deterministic=options.deterministic,
        profiler=options.profiler,
        max_steps=steps,
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
