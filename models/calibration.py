"""Sets what weight transfer cannot: decays, in-context learning rates and output scales, from a few training
rows.

A head that looks far must forget slowly, how evenly it looks says how much it should overwrite, and it must
be as loud as the teacher's. All three are read off the teacher's attention and set in closed form; a short
alignment on the same rows can settle the rest.

Shape letters: B rows, T tokens, H heads, N head size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from models import ranks
from models.align import aligned_layers
from models.head_facts import HeadFacts, observe
from models.in_place import assign, whole
from models.induction import SCORE, LayerInputs, read_copies, scale_banks, start_bank
from models.losses import ALIGNMENT_LOSSES
from models.mixers.base import Mixer
from models.stage import freeze_all_but
from models.student import aligned_mixers

UNIFORM_RATE, SHARP_RATE = 0.3, 0.7  # in-context learning rate of heads that see all alike, and one token
INSIDE = (0.01, 0.99)  # what of a logistic function's reach is used: it never gets to its ends
NOTHING_TO_SET = "the student has no recurrent mixer; leave the stage out, or change student.layer_plan."


class DecayRange(NamedTuple):
    """How a mixer makes -log w from the bias of its `decay`: the least and the most that is asked of it, and
    the way back."""

    slowest: float
    fastest: float
    bias: Callable[[Tensor], Tensor]


# Mixers that are not here have nothing to set.
DECAYS = {
    "rwkv7": DecayRange(1e-6, 0.6, lambda fall: torch.logit(fall * math.exp(0.5))),  # e^-0.5 σ(bias)
    "rwkv6": DecayRange(1e-6, 5.0, torch.log),  # e^bias
}


class CalibrationRow(NamedTuple):
    """What was read off a head and set in it; None for what was left. Errors are of its layer: squared
    distance to the teacher's output over the output's energy."""

    layer: int
    head: int
    induction_score: float | None
    mean_distance_tokens: float | None
    half_life_tokens: float | None
    entropy: float | None
    rate: float | None
    scale: float | None
    layer_error_before: float
    layer_error_after: float


@dataclass(frozen=True, kw_only=True)
class CalibrateMixers:
    """A stage between transfer and the first training: sets starting values of the recurrent mixers.

    The output gate needs nothing, it starts at exactly 1. Scales go into the output projection, behind norm
    and gate.

    Args:
        name: of the stage.
        rows: training rows that are looked at, the first ones.
        induction: give layers in which the teacher has induction heads a bank of them (models/induction.py),
            where the mixer can have one.
        decay: set each head's half-life to its mean attention distance; all channels of a head get the same.
        rate: set each head's in-context learning rate from its attention entropy (RWKV-7).
        scale: set each head's output scale by least squares.
        fit_passes: times that the rows are then aligned on; 0 means never.
        fit_learning_rate: peak of that fit, which ends at a tenth of it.
        data: overrides of `data` for this stage.

    Raises:
        ValueError: where nothing is switched on, or a value is out of range.
    """

    name: str
    rows: int = 16
    induction: bool = True
    decay: bool = True
    rate: bool = False
    scale: bool = True
    fit_passes: int = 0
    fit_learning_rate: float = 5e-3
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        key = f"stage.{self.name}"
        for name, least in {"rows": 1, "fit_passes": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be at least {least}.")
        if self.fit_learning_rate <= 0:
            raise ValueError(
                f"{key}.fit_learning_rate={self.fit_learning_rate} must be positive; switch the fit off with "
                f"{key}.fit_passes=0."
            )
        if not (self.induction or self.decay or self.rate or self.scale or self.fit_passes):
            raise ValueError(
                f"{key}: induction, decay, rate, scale and fit_passes are all off; leave the stage out."
            )

    def tokens_read(self, row_length: int) -> int:
        """Tokens that teacher and mixers run over, those of the fit twice because of its backward pass."""
        return self.rows * row_length * (2 + self.induction + self.scale + 2 * self.fit_passes)

    def calibrate(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Sequence[dict[str, Tensor]],
        found: Mapping[int, LayerInputs] = MappingProxyType({}),
        copies: Sequence[dict[str, Tensor]] = (),
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ) -> tuple[list[CalibrationRow], int]:
        """Sets the student's recurrent mixers in place; the same in every process.

        Args:
            student: as transferred.
            teacher: on the same device.
            batches: training rows, input_ids and document_ids [B,T].
            found: what `find_induction` said of the layers that have a bank.
            copies: training passages shown twice, [B,2P], which banks are scaled on.
            precision: makes the context that an alignment step runs in.

        Returns:
            One row for each head of each layer that was set, and the tokens that the fit has trained on.

        Raises:
            ValueError: where the student has no recurrent mixer.
        """
        mixers = calibrated_mixers(student)
        if not mixers:
            raise ValueError(f"stage.{self.name}: {NOTHING_TO_SET}")
        facts = observe(mixers, teacher, batches, probabilities=self.decay or self.rate)
        table = {index: {"layer_error_before": facts[index].error} for index in mixers}
        taken = {index: start_bank(mixers[index], inputs) for index, inputs in found.items()}
        for index, mixer in mixers.items():
            if index in found:
                table[index]["induction_score"] = found[index].scores
            table[index] |= self._set_inside(mixer, facts[index])
        if self.scale:
            heard = observe(mixers, teacher, batches, probabilities=False)
            for index, mixer in mixers.items():
                scale = heard[index].scale
                scale[taken.get(index, [])] = 1.0  # as low as the bank's start has put them
                scale_heads(mixer, scale)
                table[index]["scale"] = scale
        if found:
            scale_banks({index: mixers[index] for index in found}, teacher, [*batches, *copies])
        tokens = self._fit(student, teacher, batches, precision) if self.fit_passes else 0
        facts = observe(mixers, teacher, batches, probabilities=False)
        for index in mixers:
            table[index]["layer_error_after"] = facts[index].error
        return [row for index in mixers for row in calibration_rows(index, table[index])], tokens

    def find_induction(
        self, student: PreTrainedModel, teacher: PreTrainedModel, copies: Sequence[dict[str, Tensor]]
    ) -> dict[int, LayerInputs]:
        """The layers in which the teacher has induction heads, and the mixer may have a bank of them.

        Args:
            student, teacher: on one device.
            copies: training passages shown twice, [B,2P].
        """
        if not self.induction:
            return {}
        layers = [index for index, mixer in calibrated_mixers(student).items() if hasattr(mixer, "induction")]
        facts = read_copies(layers, teacher, copies) if layers else {}
        return {index: inputs for index, inputs in facts.items() if bool((inputs.scores >= SCORE).any())}

    def _set_inside(self, mixer: Mixer, facts: HeadFacts) -> dict[str, Tensor]:
        """Sets decay and rate; columns of the table."""
        if not (self.decay or self.rate):
            return {}
        columns = {"mean_distance_tokens": facts.mean_distance, "entropy": facts.mean_entropy}
        if self.decay:
            columns["half_life_tokens"] = set_half_life(mixer, facts.mean_distance)
        if self.rate and getattr(mixer, "rate", None) is not None:
            wanted = SHARP_RATE + (UNIFORM_RATE - SHARP_RATE) * facts.mean_entropy
            columns["rate"] = set_rate(mixer, wanted)
        return columns

    def _fit(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Sequence[dict[str, Tensor]],
        precision: Callable[[], AbstractContextManager],
    ) -> int:
        """Aligns all mixers on the rows, each process on its own batches; tokens of all of them."""
        parameters = [p for mixer in aligned_mixers(student).values() for p in mixer.parameters()]
        freeze_all_but(student, parameters)
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
        together = ranks.world_size()
        steps = self.fit_passes * math.ceil(len(batches) / together)
        tokens = 0
        for step in range(steps):
            share = [batches[(step * together + rank) % len(batches)] for rank in range(together)]
            tokens += sum(batch["input_ids"].numel() for batch in share)
            batch = {name: x.to(parameters[0].device) for name, x in share[ranks.rank()].items()}
            with precision():
                loss = aligned_layers(student, teacher, batch, ALIGNMENT_LOSSES["l2"]).total
            loss.backward()
            for parameter in parameters:  # a sharded model has averaged its gradients already
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    parameter.grad = ranks.mean(parameter.grad)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = self.fit_learning_rate * (1 - 0.9 * step / max(steps - 1, 1))
            optimizer.step()
            optimizer.zero_grad()
        return tokens


def can_be_set(plan: Sequence[str]) -> bool:
    """Whether a layer plan has a mixer with something to set; inserted ones have nothing to imitate."""
    return any(name in DECAYS for name in plan)


def calibrated_mixers(student: PreTrainedModel) -> dict[int, Mixer]:
    """Number of the teacher's layer -> mixer, of those that have something to set."""
    return {index: mixer for index, mixer in aligned_mixers(student).items() if mixer.name in DECAYS}


@torch.no_grad()
def set_half_life(mixer: Mixer, half_life: Tensor) -> Tensor:
    """Makes heads forget half in so many tokens: -log w = ln 2 / half-life, solved for the decay's bias.

    Args:
        mixer: one of DECAYS, whose decay does not depend on the data yet.
        half_life: [H] tokens.

    Returns:
        [H] tokens: the half-lives that the mixer can reach.
    """
    decay = DECAYS[mixer.name]
    fall = (math.log(2) / half_life.clamp_min(1e-3)).clamp(decay.slowest, decay.fastest)
    assign(mixer.decay.bias, decay.bias(fall).repeat_interleave(mixer.shape.head_size))
    return math.log(2) / fall


@torch.no_grad()
def set_rate(mixer: Mixer, rate: Tensor) -> Tensor:
    """Sets the in-context learning rate of each head, [H]; returns what the mixer's range allows of it."""
    share = (rate / mixer.options.rate_range).clamp(*INSIDE)
    assign(mixer.rate.bias, torch.logit(share).repeat_interleave(mixer.shape.head_size))
    return share * mixer.options.rate_range


@torch.no_grad()
def scale_heads(mixer: Mixer, scale: Tensor) -> None:
    """Multiplies what each head adds to the layer's output, [H].

    In the output projection: a norm over heads would undo it anywhere before, and query heads that share a
    value could not differ.
    """
    weight = mixer.output.weight
    assign(weight, whole(weight) * scale.repeat_interleave(mixer.shape.head_size))


def calibration_rows(layer: int, columns: dict[str, Tensor]) -> list[CalibrationRow]:
    """The table's rows of one layer, from its columns [H]."""
    heads = len(columns["layer_error_before"])
    values = {name: column.tolist() for name, column in columns.items()}
    fields = CalibrationRow._fields[2:]
    return [
        CalibrationRow(layer, head, *(values[name][head] if name in values else None for name in fields))
        for head in range(heads)
    ]
