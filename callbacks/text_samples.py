"""What teacher and student write, side by side, while the student learns."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger


class TextSamples(pl.Callback):
    """Greedily continues fixed prompts with teacher and student every few steps and when the stage ends.

    Emits the table `samples/<stage>` to every wandb logger (columns step, prompt, teacher, student) and
    appends the same to `<run folder>/samples.md`. Preconditions: the module has `stage_name`, a `tokenizer`
    with `encode(text)` and `decode(ids)`, and `generate_pair(prompt_ids, max_new_tokens) -> (teacher_ids,
    student_ids)` (teacher_ids is None where there is no teacher) with prompt_ids [1,T] int64 on the module's
    device and the new tokens alone, [1,N], [N] or a
    list, as results. All ranks take part in generating, because a sharded model needs them; the first writes.

    Args:
        run_folder: folder of the run.
        prompts: texts to continue.
        every_steps: optimiser steps between samples; 0 samples at the end of the stage only.
        max_new_tokens: tokens to generate for each prompt.
    """

    def __init__(
        self,
        *,
        run_folder: str | Path,
        prompts: Sequence[str],
        every_steps: int = 0,
        max_new_tokens: int = 64,
    ) -> None:
        if not prompts or not all(prompts):
            raise ValueError("callbacks.text_samples.prompts must hold at least one text and no empty one")
        if every_steps < 0 or max_new_tokens < 1:
            raise ValueError("callbacks.text_samples: every_steps must be >= 0 and max_new_tokens >= 1")
        self.path = Path(run_folder) / "samples.md"
        self.prompts = list(prompts)
        self.every_steps = every_steps
        self.max_new_tokens = max_new_tokens
        self._last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that the module can generate.

        Raises:
            ValueError: the module lacks what this callback needs.
        """
        missing = [name for name in ("generate_pair", "tokenizer") if not hasattr(pl_module, name)]
        if missing:
            raise ValueError(
                f"callbacks.text_samples: the module of this stage has no {' and no '.join(missing)}; "
                "remove callbacks.text_samples for runs without a teacher"
            )
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the step of the checkpoint as sampled already."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Samples when a multiple of `every_steps` has been reached."""
        step = trainer.global_step
        if self.every_steps and step != self._last_step and step % self.every_steps == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples what the stage has produced, unless its last step was sampled.

        A stage stopped before `max_steps` will be resumed and has little time left: it is not sampled.
        """
        if trainer.global_step != self._last_step and trainer.global_step >= trainer.max_steps:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = step = trainer.global_step
        pairs = _generate(pl_module, self.prompts, self.max_new_tokens)
        if not trainer.is_global_zero:
            return
        stage = pl_module.stage_name
        table = [[step, prompt, *pair] for prompt, pair in zip(self.prompts, pairs, strict=True)]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["step", "prompt", "teacher", "student"]
                logger.log_table(f"samples/{stage}", columns=columns, data=table, step=step - 1)
        write_samples(self.path, f"## {stage}, step {step}", table)


def write_samples(path: Path, heading: str, table: Sequence[Sequence[Any]]) -> None:
    """Appends one section to `samples.md`.

    A section of the same name and all that follow it come from an attempt that was interrupted and are
    replaced.

    Args:
        path: the file.
        heading: the section's line, unique for stage and step.
        table: rows `[step, prompt, teacher, student]`.
    """
    lines = [heading, ""]
    for _, prompt, teacher, student in table:
        for label, text in (
            ("Prompt", prompt),
            ("Teacher continues", teacher),
            ("Student continues", student),
        ):
            # A text may hold fences of its own; this one must be longer.
            fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
            lines += [f"{label}:", fence, text, fence, ""]
    before = path.read_text(encoding="utf-8") if path.exists() else "# Samples\n\n"
    before = before.partition(f"\n{heading}\n")[0] + "\n" if f"\n{heading}\n" in before else before
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")


def _generate(
    pl_module: pl.LightningModule, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[str, str]]:
    """Returns (teacher text, student text) for each prompt, leaving every submodule in the mode it was in."""
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    try:
        with torch.no_grad():
            return [_continue(pl_module, prompt, max_new_tokens) for prompt in prompts]
    finally:
        for module, training in modes:
            module.training = training


def _continue(pl_module: pl.LightningModule, prompt: str, max_new_tokens: int) -> tuple[str, str]:
    tokenizer = pl_module.tokenizer
    prompt_ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device=pl_module.device)
    teacher, student = pl_module.generate_pair(prompt_ids, max_new_tokens)
    return _decode(tokenizer, teacher), _decode(tokenizer, student)


def _decode(tokenizer: Any, token_ids: Any) -> str:
    """The text of a continuation, or a dash where there is no teacher."""
    if token_ids is None:
        return "-"
    return tokenizer.decode(torch.as_tensor(token_ids).flatten().tolist())
