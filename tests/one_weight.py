"""A module of one weight with what the callbacks expect of a stage, and a trainer that runs it in a blink."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

STEPS = 10


class WordTokenizer:
    """Turns characters into their code points and back."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, token_ids):
        return "".join(chr(token_id) for token_id in token_ids)


class OneWeight(pl.LightningModule):
    """A module with what the callbacks expect of the conversion module."""

    def __init__(self, stage_name="align", tokens_before=1000):
        super().__init__()
        self.stage_name, self.tokens_before = stage_name, tokens_before
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.frozen_mode = torch.nn.Dropout(0.5)
        self.tokenizer = WordTokenizer()
        self.modes = []

    def tokens_at(self, step):
        return self.tokens_before + 64 * step

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch.float().mean() - 0.5).square().sum()
        self.log(f"{self.stage_name}/loss", loss)
        self.log(f"{self.stage_name}/layer_0/alignment", loss + 1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log(f"{self.stage_name}/validation/loss", self.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.05)

    def generate_pair(self, prompt_ids, max_new_tokens):
        assert prompt_ids.dtype == torch.int64 and prompt_ids.ndim == 2
        self.modes.append((self.training, self.frozen_mode.training))
        teacher = prompt_ids[:, :1].repeat(1, max_new_tokens)
        return teacher, [ord("s")] * max_new_tokens


class StopAt(Callback):
    """Raises after a step, as a killed process would end it."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def fit(
    module, folder, *, callbacks=(), loggers=(), ckpt_path=None, max_steps=STEPS, progress=False, **options
):
    """Fits a module for a few steps and returns the trainer."""
    trainer = pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        logger=list(loggers),
        callbacks=list(callbacks),
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=folder,
        log_every_n_steps=1,
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        **options,
    )
    # Equal batches, because a plain loader starts over on resume; the loss still moves with the weight.
    loader = DataLoader(torch.ones(STEPS, 8, dtype=torch.int64), batch_size=1)
    trainer.fit(module, loader, loader if options.get("val_check_interval") else None, ckpt_path=ckpt_path)
    return trainer


def begin(logger, module):
    """Does what train.py does before a stage."""
    logger.begin_stage(module.stage_name, module.tokens_at)
    return logger
