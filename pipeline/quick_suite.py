"""The evaluation suite `quick`: held-out text."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from conf.launch import build
from models.evaluation import EVERY, copy_gain, evaluate
from models.layer_errors import layer_errors, why_not_comparable
from models.layer_plan import ATTENTION
from models.mixers import MIXERS, Mixer
from models.student import aligned_mixers
from pipeline.evaluation import Subject
from reports.eval_plots import curves_by_position, layer_bars
from reports.eval_report import Figure, Findings, Picture

log = logging.getLogger(__name__)
# name in eval.json -> label, how it is written; in the order of the table
LABELS = {
    "loss": ("loss (nats/token)", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "kl": ("KL (teacher ‖ model)", ".4f"),
    "reverse_kl": ("KL (model ‖ teacher)", ".4f"),
    "top1_agreement": ("top-1 agreement", ".1%"),
    "top5_agreement": ("top-5 agreement", ".1%"),
    "copy_first": ("loss, first copy", ".4f"),
    "copy_second": ("loss, second copy", ".4f"),
    "copy_gain": ("copy gain", ".4f"),
    "copy_ratio": ("second / first copy", ".4f"),
}
EXPLANATION = (
    "Held-out text; loss and KL in nats per token. KL (teacher ‖ model) is what training lowers; "
    "KL (model ‖ teacher) is its reverse. Top-1 agreement: the share of positions where both find the same "
    "token most likely; top-5: where the teacher's most likely token is among the model's five. Copying: "
    "passages are shown twice in one row; the gain is the loss on the first less that on the second copy. "
    "Difference is model - teacher, relative is model / teacher."
)

POSITIONS = Picture(
    file="plots/by_position.png",
    heading="By position in the row",
    note="A gap that grows to the right means that distant context is used less well than by the teacher.",
)
LAYERS = Picture(
    file="plots/layers.png",
    heading="Error of each layer",
    note="‖h_model - h_teacher‖ / ‖h_teacher‖ of what each decoder layer puts out, as root mean square over "
    "tokens. Errors add up along the stack; 1 is as bad as zeros.",
)


@dataclass(frozen=True, kw_only=True)
class QuickSuite:
    """Loss, perplexity and copying; beside a teacher also KL both ways, agreement and errors of layers.

    Args:
        data: config of the data module whose held-out rows are read; the model's tokenizer is added.
    """

    data: Mapping[str, Any]

    def run(self, model: Subject, teacher: Subject | None, folder: Path) -> Findings:
        """Measures, and draws into `<folder>/plots`."""
        data = build(self.data, "data", tokenizer=model.tokenizer)
        batches, copies = data.validation_batches(), data.copy_batches()
        subject, guide = model.load(), None if teacher is None else teacher.load()
        sums = evaluate(subject, guide, batches, EVERY)
        copied = evaluate(subject, guide, copies, {})
        positions = sums.position_means()
        layers = [] if guide is None else _layers(subject, guide, batches)
        return Findings(
            figures=_figures(sums.means(), copied, with_teacher=guide is not None),
            explanation=EXPLANATION,
            by_position=positions,
            per_layer=layers,
            pictures=_draw(folder, positions, layers),
        )


def _figures(means: Mapping[str, float], copied: Any, *, with_teacher: bool) -> list[Figure]:
    """The rows of the table, from means over tokens and the sums of the rows that hold a passage twice."""
    copies = copy_gain(copied)
    theirs = copy_gain(copied, "teacher_loss") if with_teacher else {}
    measured = {
        "loss": (means["loss"], means.get("teacher_loss")),
        "perplexity": tuple(_perplexity(means.get(key)) for key in ("loss", "teacher_loss")),
        **{key: (means[key], None) for key in LABELS if key in means and key in EVERY},
        **{f"copy_{key}": (value, theirs.get(key)) for key, value in copies.items()},
        "copy_ratio": tuple(c["second"] / c["first"] if c else None for c in (copies, theirs)),
    }
    return [
        Figure(name=name, label=label, pattern=pattern, value=measured[name][0], teacher=measured[name][1])
        for name, (label, pattern) in LABELS.items()
        if name in measured
    ]


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


def _layers(model: PreTrainedModel, teacher: PreTrainedModel, batches: list) -> list[dict[str, Any]]:
    """A record per layer of the teacher: {"layer", "mixer", "relative_error"}; empty where layers do not pair
    up."""
    reason = why_not_comparable(model, teacher)
    if reason is not None:
        log.warning("No error per layer: %s.", reason)
        return []
    mixers = aligned_mixers(model)
    return [
        {"layer": index, "mixer": _kind(mixers.get(index)), "relative_error": error}
        for index, error in enumerate(layer_errors(model, teacher, batches))
    ]


def _kind(mixer: Mixer | None) -> str:
    """The name of a mixer in configs, or that of attention."""
    return next((name for name, kind in MIXERS.items() if type(mixer) is kind), ATTENTION)


def _draw(folder: Path, positions: Mapping[str, list[float]], layers: list[dict[str, Any]]) -> list[Picture]:
    curves_by_position(folder / POSITIONS.file, positions=positions)
    if not layers:
        return [POSITIONS]
    layer_bars(folder / LAYERS.file, layers=layers)
    return [POSITIONS, LAYERS]
