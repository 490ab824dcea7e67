"""The evaluation suite `sparse_choice`: the share of attention on the blocks that sparse layers choose."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.launch import build
from models.choice_quality import ChoiceQuality, choice_quality, sparse_mixers
from pipeline.evaluation import Subject
from reports.eval_plots import choice_bars
from reports.eval_report import Figure, Findings, Picture

# way of models.choice_quality -> how it is called in the table and in the picture
LABELS = {
    "always": "always seen alone",
    "mean_key_list": "mean keys, shared by a list's heads",
    "mean_key_head": "mean keys, each head for itself",
    "chosen": "the layer's choice",
    "best": "best choice of as many, shared",
}
EXPLANATION = (
    "The share of causal softmax attention, mean over heads and held-out tokens that have more blocks to "
    "choose from than they may choose, that falls on the blocks which a layer sees: those it always sees; "
    "and besides, as many others as the layer chooses, by the product of query and mean key, by its own "
    "choice, and at best. Bound: ‖o - o_dense‖ ≤ 2 (1 - R) max‖v‖, R the share of a head's attention on what "
    "it sees; the largest quotient of both sides, and the share of tokens and heads that break it."
)
PICTURE = Picture(
    file="plots/sparse_choice.png",
    heading="Attention on the chosen blocks",
    note="What is missing to the best choice, a better index could find; what is missing to 100 % needs more "
    "blocks.",
)


@dataclass(frozen=True, kw_only=True)
class SparseChoiceSuite:
    """Shares of attention of each sparse layer.

    Args:
        data: config of the data module whose held-out documents are read; the model's tokenizer is added.
        row_length: tokens.
        rows: of each source.

    Raises:
        ValueError: for a count below 1, a model without sparse layers, or rows in which there is nothing to
            choose.
    """

    data: Mapping[str, Any]
    row_length: int
    rows: int

    def __post_init__(self) -> None:
        for name in ("row_length", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"suite.{name}={getattr(self, name)} must be at least 1.")

    def run(self, model: Subject, teacher: Subject | None, folder: Path) -> Findings:
        """Measures, and draws into `<folder>/plots`; a teacher chooses nothing."""
        loaded = model.load().eval()
        if not sparse_mixers(loaded):
            raise ValueError("suite=sparse_choice: the model has no sparse layer; give model= one that has.")
        changes = {"row_length": self.row_length, "rows_per_device": 1, "cross_documents": True}
        data = build({**self.data, **changes}, "data", tokenizer=model.tokenizer)
        found = choice_quality(loaded, data.validation_batches(self.rows))
        short = [place for place, quality in found.items() if quality is None]
        if short:
            raise ValueError(
                f"suite.row_length={self.row_length}: layer {short[0]} sees whole rows, so there is nothing "
                "to choose; raise it, or lower block_length, window or top_k of student.mixers.sparse."
            )
        shares = {place: _shares(quality) for place, quality in found.items()}
        choice_bars(folder / PICTURE.file, shares=shares, labels=LABELS)
        return Findings(
            figures=[f for place, quality in found.items() for f in _figures(place, quality)]
            + _means(shares),
            explanation=EXPLANATION,
            pictures=[PICTURE],
            details={"sparse_choice": [{"layer": place, **told} for place, told in shares.items()]},
        )


def _means(shares: Mapping[int, Mapping[str, float]]) -> list[Figure]:
    """Of all sparse layers."""
    return [
        Figure(
            name=f"mean_{way}",
            label=f"mean of layers: {label}",
            value=sum(found[way] for found in shares.values()) / len(shares),
            pattern=".1%",
        )
        for way, label in LABELS.items()
    ]


def _shares(quality: ChoiceQuality) -> dict[str, float]:
    return {way: total / quality.tokens for way, total in quality.mass.items()}


def _figures(place: int, quality: ChoiceQuality) -> list[Figure]:
    shares = _shares(quality)
    told = [(way, f"layer {place}: {LABELS[way]}", value, ".1%") for way, value in shares.items()]
    told += [
        ("gap", f"layer {place}: best less the layer's choice", shares["best"] - shares["chosen"], ".3f"),
        ("bound", f"layer {place}: largest quotient in the bound", quality.nearest, ".3f"),
        ("beyond", f"layer {place}: break the bound", quality.beyond / quality.rows, ".1%"),
    ]
    return [
        Figure(name=f"layer_{place}_{name}", label=label, value=value, pattern=pattern)
        for name, label, value, pattern in told
    ]
