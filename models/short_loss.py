"""What a short context predicts: the loss of each token after the last K to 2 K tokens of its document.

Shape letters: B rows, T tokens, K the short context, W windows of a row.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from models import ranks
from models.backbone import hidden_states, output_head
from models.losses import IGNORED, cross_entropy, token_chunks
from models.parallelize import kept_whole

BY = ("teacher", "student")
SAMPLE = 1024  # numbers of each tensor; training changes all of a tensor
PADDING = -1  # document of a place without a token


@dataclass(frozen=True, kw_only=True)
class CacheShortLoss:
    """A stage without training: writes down each token's loss after a short context, on the rows of another
    stage, whose objective says how long that is.

    Args:
        name: of the stage.
        folder: where the cache goes; one that was interrupted, or is too short, is gone on with.
        of: the stage whose rows they are; its objective is `long_cross_entropy`.
        by: who predicts: the `teacher`, or the `student` as the stage `of` finds it.
        rows_per_part: rows of one part, which is written whole or not at all.

    Raises:
        ValueError: for a value out of range, naming its key.
    """

    name: str
    folder: str
    of: str = "long_context"
    by: str = "teacher"
    rows_per_part: int = 64

    def __post_init__(self) -> None:
        if self.rows_per_part < 1:
            raise ValueError(f"stage.{self.name}.rows_per_part={self.rows_per_part} must be at least 1.")
        if self.by not in BY:
            raise ValueError(f"stage.{self.name}.by={self.by!r} is unknown; choose one of {', '.join(BY)}.")
        if self.of == self.name:
            raise ValueError(
                f"stage.{self.name}.of={self.of} must name the stage that trains from the cache."
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether there must be one."""
        return self.by == "teacher"


@torch.no_grad()
def short_losses(
    model: PreTrainedModel, batch: dict[str, Tensor], context: int, chunk_tokens: int
) -> dict[str, Tensor]:
    """Each token's loss in windows of 2 K tokens, of which the second half counts and the next window begins
    K tokens later; in a row's first window all count.

    So a token has K to 2 K tokens of context, or what its document has. No window looks across documents.

    Args:
        model: where it is sharded, all processes call this together.
        batch: input_ids, labels, document_ids [B,T], on the model's device.
        context: K.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        {"short_loss"}: [B,T] float32 on the CPU, nats; 0 where there is no label.
    """
    rows, length = batch["input_ids"].shape
    ids, labels, documents = (
        windows(batch[name], context, empty)
        for name, empty in (("input_ids", 0), ("labels", IGNORED), ("document_ids", PADDING))
    )
    taken = max(1, rows * length // (2 * context))  # windows at a time, that are as many tokens as the batch
    groups = -(-len(ids) // taken)
    found = []
    for turn in range(ranks.largest(groups)):  # a process with fewer repeats its last one
        first = min(turn, groups - 1) * taken
        here = slice(first, first + taken)
        losses = _losses(model, ids[here], labels[here], documents[here], chunk_tokens)
        if turn < groups:
            found.append(losses)
    losses = torch.cat(found).view(rows, -1, ids.shape[1])
    first, later = losses[:, 0], losses[:, 1:, context:].flatten(1)
    return {"short_loss": torch.cat([first, later], dim=1)[:, :length].cpu()}


def windows(tokens: Tensor, context: int, empty: int) -> Tensor:
    """[B,T] -> [B·W,2K], the windows that begin at 0, K, 2K, ..., of one row after the other; rows that are
    no longer than one stay as they are.

    Args:
        tokens: [B,T].
        context: K.
        empty: fills the last window.
    """
    rows, length = tokens.shape
    if length <= 2 * context:
        return tokens
    count = -(-length // context) - 1
    filled = torch.nn.functional.pad(tokens, (0, (count + 1) * context - length), value=empty)
    return filled.unfold(1, 2 * context, context).reshape(rows * count, 2 * context)


def _losses(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, documents: Tensor, chunk_tokens: int
) -> Tensor:
    """The loss of every token [windows,2K], 0 where there is no label."""
    chosen, head = labels != IGNORED, output_head(model)
    hidden, wanted = hidden_states(model, ids, documents)[chosen], labels[chosen]
    pieces = [hidden.new_zeros(0, dtype=torch.float32)]
    with kept_whole(head):
        for chunk in token_chunks(hidden, chunk_tokens):
            pieces.append(cross_entropy(head(hidden[chunk]), wanted[chunk]).float())
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[chosen] = torch.cat(pieces)
    return losses


@torch.no_grad()
def student_identity(student: PreTrainedModel) -> dict[str, str]:
    """What tells one student's weights from another's: a digest over name, shape and first numbers of every
    parameter. All processes of a sharded student call this together."""
    digest = hashlib.sha256()
    for name, parameter in sorted(student.named_parameters()):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(f"{name} {tuple(whole.shape)}".encode())
        digest.update(whole.flatten()[:SAMPLE].float().cpu().numpy().tobytes())
    return {"weights": digest.hexdigest()}
