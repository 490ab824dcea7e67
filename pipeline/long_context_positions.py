"""The part `positions` of the evaluation suite `long_context`: held-out loss by position in long rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from conf.launch import build
from models.retrieval import cached_losses
from pipeline.evaluation import Subject
from pipeline.long_context_parts import Found, Place, check_least, figure_of, mean_of
from reports.eval_report import Picture
from reports.long_context_plot import loss_by_bucket

FIRST_BUCKET = 128  # tokens; each further one is as long as all before it


@dataclass(frozen=True, kw_only=True)
class LossByPosition:
    """Loss on long rows of held-out text, by buckets of the position: up to 128 tokens, to 256, to 512, ...

    Documents that are shorter than a row are joined, and the text runs on from one to the next. Rows are read
    through the decoding cache.

    Args:
        row_length: tokens.
        rows: of each source.

    Raises:
        ValueError: for a count below 1.
    """

    row_length: int
    rows: int
    key = "suite.positions"

    def __post_init__(self) -> None:
        check_least(self, "row_length", "rows")

    def check_subject(self, subject: Subject) -> None:
        """Any tokenizer will do."""

    def run(self, place: Place) -> Found:
        """Measures row by row, so that the spread between rows is known."""
        changes = {"row_length": self.row_length, "rows_per_device": 1, "cross_documents": True}
        data = build({**place.data, **changes}, "data", tokenizer=place.subject.tokenizer)
        ends, batches = bucket_ends(self.row_length), data.validation_batches(self.rows)
        losses = {
            who: [in_buckets(row.losses, ends) for row in cached_losses(model, batches, place.prefill_chunk)]
            for who, model in place.models.items()
        }
        means = {who: [mean_of(bucket) for bucket in zip(*rows, strict=True)] for who, rows in losses.items()}
        return self._told(place, ends, losses, means)

    def _told(self, place: Place, ends: list[int], losses: Mapping, means: Mapping) -> Found:
        count, starts = len(losses["model"]), [0, *ends[:-1]]
        figures = [
            figure_of(
                f"loss_to_{end}",
                f"loss, tokens {start + 1:,} to {end:,} ({count} rows)",
                {who: [row[index] for row in rows] for who, rows in losses.items()},
                ".4f",
            )
            for index, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        picture = Picture(
            file="plots/loss_by_position.png",
            heading="Held-out loss by position in long rows",
            note=f"Means over {count} rows of {self.row_length:,} tokens with their standard errors. A curve "
            "that stops falling, or rises, tells how much context the model uses.",
        )
        loss_by_bucket(
            place.folder / picture.file,
            ends=ends,
            losses={who: [bucket.mean for bucket in found] for who, found in means.items()},
            errors={who: [bucket.error for bucket in found] for who, found in means.items()},
        )
        details = {
            who: [{"to": end, **bucket._asdict()} for end, bucket in zip(ends, found, strict=True)]
            for who, found in means.items()
        }
        return Found(figures, [picture], {"loss_by_position": details})


def bucket_ends(row_length: int) -> list[int]:
    """The last positions of the buckets, counted from 1: 128, 256, 512, ... and the row's end."""
    ends = [min(FIRST_BUCKET, row_length)]
    while ends[-1] < row_length:
        ends.append(min(2 * ends[-1], row_length))
    return ends


def in_buckets(losses: Tensor, ends: Sequence[int]) -> list[float]:
    """[T] losses by position, NaN where there is no label -> the mean in each bucket, NaN where there is
    none."""
    starts = [0, *ends[:-1]]
    return [float(losses[start:end].nanmean()) for start, end in zip(starts, ends, strict=True)]
