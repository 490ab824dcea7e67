"""Whether a model finds what a row asks for.

Shape letters: B rows, T tokens, n tokens with a label, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import ranks
from models.backbone import hidden_states, output_head
from models.evaluation import own_batches
from models.losses import IGNORED
from models.parallelize import kept_whole


def exact_answers(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> list[bool]:
    """Whether each row's answer comes out whole, token by token.

    The model reads the right answer and must hold each of its tokens for the most likely one. That is what
    greedy decoding from the question gives: as long as all tokens so far were right, both read the same.

    Args:
        model: a causal language model; several processes divide the batches among themselves.
        batches: input_ids, labels, document_ids [B,T]; labels on the answer alone, at least one in each row.

    Returns:
        One value per row, in order, in every process.
    """
    found, was_training = {}, model.training
    model.eval()
    for index, batch in own_batches(batches):
        exact = _exact_rows(model, batch)
        if index is not None:
            found[index] = exact
    model.train(was_training)
    together = {index: rows for part in ranks.gather(found) for index, rows in part.items()}
    return [exact for index in range(len(batches)) for exact in together[index]]


@torch.no_grad()
def _exact_rows(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[bool]:
    """The rows of one batch; logits [n,V] are made of labelled tokens alone."""
    device = next(model.parameters()).device
    labels = batch["labels"].to(device)
    chosen = labels != IGNORED
    hidden = hidden_states(model, batch["input_ids"].to(device), batch["document_ids"].to(device))
    head = output_head(model)
    with kept_whole(head):
        right = torch.ones_like(chosen)
        right[chosen] = head(hidden[chosen]).argmax(-1) == labels[chosen]
    return right.all(1).tolist()
