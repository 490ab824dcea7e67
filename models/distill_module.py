"""The Lightning module of every training stage: a student, a frozen teacher beside it, and an objective."""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models import ranks
from models.curriculum import DENSE
from models.evaluation import batch_metrics
from models.stage import StageConfig, assert_float32, freeze_all_but
from models.student import GROUPS, parameter_groups, student_mixers
from models.timeline import Timeline


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
    `<stage>/validation_<metric>`.
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
        self._groups = parameter_groups(student)
        phases = timeline.phases
        ever = {group for phase in phases for group in stage.trained_groups(phase)}
        if not self.train_only(ever):
            has = ", ".join(group for group in GROUPS if self._groups[group])
            raise ValueError(
                f"stage.{stage.name}: the student has no parameter in the groups with a learning rate "
                f"({', '.join(sorted(ever))}); give stage.{stage.name}.learning_rate a rate above 0 for one "
                f"of {has}."
            )
        assert_float32([p for group in ever for p in self._groups[group]])

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

    def groups_at(self, step: int) -> tuple[str, ...]:
        """The parameter groups that train in the optimiser step after `step` others."""
        return self.stage.trained_groups(self.timeline.phase_at(step))

    def groups_before(self, step: int) -> tuple[str, ...]:
        """The parameter groups that `step` optimiser steps have trained, and the optimiser has a state of."""
        phases = [phase for phase in self.timeline.phases if phase.first_step < step]
        trained = {group for phase in phases for group in self.stage.trained_groups(phase)}
        return tuple(group for group in GROUPS if group in trained)

    def count_parameters(self, groups: Collection[str]) -> int:
        """Numbers in the parameters of some groups."""
        return sum(parameter.numel() for group in groups for parameter in self._groups[group])

    def train_only(self, groups: Collection[str]) -> int:
        """Makes exactly some groups trainable; returns how many numbers they have. What is frozen has no
        gradient from here on, not even an old one."""
        freeze_all_but(self.student, [p for group in groups for p in self._groups[group]])
        for parameter in self.student.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
        return self.count_parameters(groups)

    def set_attention(self, kind: str) -> None:
        """How the student's sparse mixers attend from now on: `dense` or `sparse`."""
        for mixer in student_mixers(self.student).values():
            if hasattr(mixer, "dense"):
                mixer.dense = kind == DENSE

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """One batch {input_ids, labels, document_ids} [B,T] to the scalar loss."""
        length = self.stage.segment_length
        options = {"segment_length": length} if length else {}
        terms = self.stage.objective(self.student, self.guide, batch, **options)
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
        """The learning rates of the coming optimiser step, of the groups that the stage trains."""
        trained = (group for group in GROUPS if self._groups[group] and self.stage.learning_rate[group])
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
