"""Whether a model finds what a row asks for: read off one forward pass, or written through its cache.

Shape letters: B rows, T tokens, n tokens with a label, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from models import ranks
from models.backbone import has_documents, hidden_states, output_head
from models.evaluation import own_batches
from models.generation import prefill
from models.losses import IGNORED, cross_entropy
from models.parallelize import kept_whole
from models.sequence_state import cache_bytes_per_row

Told = TypeVar("Told")


class Answered(NamedTuple):
    """Of one row: how many tokens were asked for, and how many of them the model found."""

    asked: int
    right: int

    @property
    def exact(self) -> bool:
        """Whether all were found."""
        return self.right == self.asked


class Read(NamedTuple):
    """Of one row: the loss [T] float64 at each position in nats, NaN where there is no label, and what its
    cache held in the end."""

    losses: Tensor
    cache_bytes: int

    @property
    def loss(self) -> float:
        """The mean over tokens with a label."""
        return float(self.losses.nanmean())


def answered_share(rows: Sequence[Answered]) -> float:
    """The share of all tokens asked for that were found."""
    return sum(row.right for row in rows) / max(sum(row.asked for row in rows), 1)


def exact_answers(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> list[bool]:
    """Whether each row's answer comes out whole; arguments as for `teacher_forced_answers`."""
    return [row.exact for row in teacher_forced_answers(model, batches)]


def teacher_forced_answers(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> list[Answered]:
    """What the model finds while it reads the right answers, in one forward pass over each batch.

    A token is found where it is the most likely one. Of a whole answer that is what greedy decoding from the
    question gives: as long as all tokens so far were right, both read the same.

    Args:
        model: a causal language model; several processes divide the batches among themselves.
        batches: input_ids, labels, document_ids [B,T]; labels on answers alone.

    Returns:
        One value per row, in order, in every process.
    """
    return _in_turns(model, batches, lambda batch: _read_off(model, batch))


def generated_answers(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], prefill_chunk: int
) -> list[Answered]:
    """What the model writes by greedy decoding: the text goes through its decoding cache, in chunks up to an
    answer and then token by token, and a written token of an answer is read in the place of the right one.

    Rows of a batch are of one length, so nothing is padded; their answers may differ in length. Where the
    row does not go on with the answer (something else follows it), it is read as it is.

    Args:
        model: as for `teacher_forced_answers`.
        batches: as there; each row is one document.
        prefill_chunk: tokens of each row that are read at once: memory is bounded by it and the cache.

    Returns:
        As there.

    Raises:
        ValueError: for rows of several documents.
    """
    return _in_turns(model, batches, lambda batch: _write(model, batch, prefill_chunk))


def cached_losses(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], prefill_chunk: int
) -> list[Read]:
    """The losses of each row, read through the decoding cache, in chunks: a row may be as long as it likes.

    Args, Raises: as for `generated_answers`.

    Returns:
        One value per row, in order, in every process.
    """
    return _in_turns(model, batches, lambda batch: _read_on(model, batch, prefill_chunk))


def _in_turns(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    answer: Callable[[dict[str, Tensor]], list[Told]],
) -> list[Told]:
    """The answers to all batches, in evaluation mode; processes divide them and share what they find."""
    found, was_training = {}, model.training
    model.eval()
    with torch.no_grad():
        for index, batch in own_batches(batches):
            answered = answer(batch)
            if index is not None:
                found[index] = answered
    model.train(was_training)
    together = {index: rows for part in ranks.gather(found) for index, rows in part.items()}
    return [row for index in range(len(batches)) for row in together[index]]


def _read_off(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Answered]:
    """The rows of one batch; logits [n,V] are made of labelled tokens alone."""
    device = next(model.parameters()).device
    labels = batch["labels"].to(device)
    chosen = labels != IGNORED
    hidden = hidden_states(model, batch["input_ids"].to(device), batch["document_ids"].to(device))
    head = output_head(model)
    right = torch.zeros_like(chosen)
    with kept_whole(head):
        right[chosen] = head(hidden[chosen]).argmax(-1) == labels[chosen]
    return _counted(chosen, right)


def _write(model: PreTrainedModel, batch: dict[str, Tensor], chunk: int) -> list[Answered]:
    """The rows of one batch, through a cache: one token at a time wherever some row answers."""
    ids, labels = _one_document(model, batch)
    chosen, right = labels != IGNORED, torch.zeros_like(labels, dtype=torch.bool)
    written = torch.zeros_like(chosen)  # where the row goes on with the answer
    written[:, :-1] = chosen[:, :-1] & (ids[:, 1:] == labels[:, :-1])
    cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    for place in _places(chosen):
        if place > cache.get_seq_length():
            prefill(model, ids[:, : place + 1], mask[:, : place + 1], cache, chunk)
        token = _next_token(model, ids[:, place : place + 1], mask[:, : place + 1], cache)
        right[:, place] = chosen[:, place] & (token == labels[:, place])
        if place + 1 < ids.shape[1]:
            ids[:, place + 1] = torch.where(written[:, place], token, ids[:, place + 1])
    return _counted(chosen, right)


def _read_on(model: PreTrainedModel, batch: dict[str, Tensor], chunk: int) -> list[Read]:
    """The rows of one batch, through a cache."""
    ids, labels = _one_document(model, batch)
    first = next(_places(labels != IGNORED), ids.shape[1] - 1)
    cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    losses = torch.full(ids.shape, torch.nan, dtype=torch.float64, device=ids.device)
    prefill(model, ids[:, : first + 1], mask[:, : first + 1], cache, chunk)
    for start in range(first, ids.shape[1], chunk):
        stop = min(start + chunk, ids.shape[1])
        logits = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
        ).logits
        here = labels[:, start:stop]
        found = cross_entropy(logits.flatten(0, 1), here.clamp_min(0).flatten()).view_as(here)
        losses[:, start:stop] = found.double().masked_fill(here == IGNORED, torch.nan)
    return [Read(row, cache_bytes_per_row(cache)) for row in losses.cpu()]


def _one_document(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Copies of the ids and labels [B,T] of rows that a cache can read, where the model is."""
    if has_documents(batch["document_ids"]):
        raise ValueError("rows of several documents, or with padding, cannot be answered by decoding.")
    device = next(model.parameters()).device
    return batch["input_ids"].to(device).clone(), batch["labels"].to(device)


def _next_token(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """[B,1] token ids -> [B] the most likely tokens after them; the cache is advanced."""
    logits = model(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    return logits[:, -1].argmax(-1)


def _places(chosen: Tensor) -> Iterator[int]:
    """The positions at which some row has a label, in order."""
    yield from chosen.any(0).nonzero().flatten().tolist()


def _counted(chosen: Tensor, right: Tensor) -> list[Answered]:
    return [Answered(*pair) for pair in zip(chosen.sum(1).tolist(), right.sum(1).tolist(), strict=True)]
