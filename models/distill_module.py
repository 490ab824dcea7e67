"""The Lightning module of every training stage: a student, a frozen teacher beside it, and an objective."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models import ranks
from models.evaluation import batch_metrics
from models.stage import StageConfig, assert_float32, freeze_all_but
from models.student import student_mixers
from models.timeline import Phase, Timeline

log = logging.getLogger(__name__)


class ConversionModule(pl.LightningModule):
    """Trains a student by one stage's objective.

    Args:
        student: the model to train.
        teacher: the frozen guide, or None; kept out of the module tree, so that no checkpoint holds it.
        reference: the student as the stage found it, frozen and kept likewise; None where the objective asks
            the teacher, or nobody.
        stage: objective, budget and rates.
        tokenizer: for reading samples of text.
        timeline: the stage's optimiser steps and the rows of each.
        tokens_before: tokens that earlier stages have used, for the x axis of plots.

    Emits: `<stage>/loss`, `<stage>/kl`, ... per logged step; `<stage>/layer_<i>/alignment`;
        `<stage>/learning_rate/<group>`;
    `<stage>/validation_<metric>`; `<stage>/row_length` where a table of them begins with another one.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        stage: StageConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        timeline: Timeline,
        tokens_before: int,
        reference: PreTrainedModel | None = None,
    ):
        super().__init__()
        self.student = student
        self._teacher, self._reference = (teacher,), (reference,)  # tuples hide modules from torch
        self.stage, self.tokenizer = stage, tokenizer
        self.stage_name = stage.name
        self.timeline, self.tokens_before = timeline, tokens_before
        self._phase: Phase | None = None
        self._groups = parameter_groups(student)
        trained = [
            p for group, parameters in self._groups.items() if stage.learning_rate[group] for p in parameters
        ]
        if not trained:
            raise ValueError(
                f"stage.{stage.name}: the student has no parameter in the groups with a learning rate."
            )
        assert_float32(trained)
        freeze_all_but(student, trained)

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def guide(self) -> PreTrainedModel | None:
        """Whom the objective asks beside the student: the reference where there is one, else the teacher."""
        return self.teacher if self._reference[0] is None else self._reference[0]

    def configure_model(self) -> None:
        """Nothing: a model that is to be sharded has been, before the first stage. Lightning's strategy
        asks."""

    def on_fit_start(self) -> None:
        """Moves the unregistered models beside the student."""
        for model in (self.teacher, self.guide):
            if model is not None:
                model.to(self.device)

    def tokens_at(self, step: int) -> int:
        """Tokens of the run, over all devices, after `step` optimiser steps of this stage."""
        return self.tokens_before + self.timeline.tokens_at(step)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Says with which step rows of another length begin, where the stage has a table of them."""
        step = self.trainer.global_step
        phase = self.timeline.phase_at(step)
        if not self.stage.row_lengths or phase is self._phase:
            return
        self._phase = phase
        log.info(
            "Stage %s: rows of %d tokens, %d per device, from step %d to %d (%d tokens each)",
            self.stage_name,
            phase.row_length,
            phase.rows_per_device,
            phase.first_step,
            phase.first_step + phase.steps,
            phase.tokens_per_step,
        )
        if step == phase.first_step:  # a run that goes on within the phase has logged it
            for logger in self.loggers:
                logger.log_metrics({f"{self.stage_name}/row_length": phase.row_length}, step=step - 1)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """One batch {input_ids, labels, document_ids} [B,T] to the scalar loss."""
        terms = self.stage.objective(self.student, self.guide, batch)
        metrics = {f"{self.stage_name}/{name}": value for name, value in terms.parts.items()}
        metrics |= {f"{self.stage_name}/layer_{i}/alignment": value for i, value in terms.per_layer.items()}
        metrics[f"{self.stage_name}/total"] = terms.total.detach()
        # The mean over processes, in one message instead of one for each metric.
        means = ranks.mean(torch.stack([value.float() for value in metrics.values()]))
        metrics = dict(zip(metrics, means.unbind(), strict=True))
        metrics |= {f"{self.stage_name}/learning_rate/{group}": rate for group, rate in self._rates().items()}
        self.log_dict(metrics)
        return terms.total

    def _rates(self) -> dict[str, float]:
        """The learning rates of the coming optimiser step."""
        trained = (group for group in self._groups if self.stage.learning_rate[group])
        step = self.trainer.global_step
        return {group: self.stage.rate_at(group, step, self.timeline) for group in trained}

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Held-out loss, and with a teacher its KL and agreement; of a stage with a reference, its parts."""
        if self._reference[0] is None:
            metrics = batch_metrics(self.student, self.teacher, batch).means()
        else:
            metrics = self.stage.objective(self.student, self.guide, batch).parts
        self.log_dict({f"{self.stage_name}/validation_{name}": value for name, value in metrics.items()})

    def configure_optimizers(self) -> dict[str, Any]:
        """The stage's optimiser with one learning rate per group, and its schedule, stepped with the
        optimiser."""
        optimizer, schedule = self.stage.build_optimizer(self._groups, self.timeline)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def generate_pair(self, prompt_ids: Tensor, max_new_tokens: int) -> tuple[Tensor | None, Tensor]:
        """Greedy continuations [1,N] of a prompt [1,T], without it, by teacher (None if there is none) and
        student."""
        was_training = self.student.training
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        ids = prompt_ids.to(self.device)
        texts = [
            None
            if model is None
            else model.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)
            for model in (self.teacher, self.student)
        ]
        self.student.train(was_training)
        teacher, student = (None if text is None else text[:, ids.shape[1] :] for text in texts)
        return teacher, student


def parameter_groups(student: PreTrainedModel) -> dict[str, list[torch.nn.Parameter]]:
    """The two learning-rate groups: `mixers` (what replaced attention) and `rest`."""
    mixers = [parameter for mixer in student_mixers(student).values() for parameter in mixer.parameters()]
    known = {id(parameter) for parameter in mixers}
    return {"mixers": mixers, "rest": [p for p in student.parameters() if id(p) not in known]}
