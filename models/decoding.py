"""What decoding costs: time and memory of one more token, against the context before it."""

import statistics
import time

import torch
from transformers import DynamicCache, PreTrainedModel

from models.sequence_state import cache_bytes_per_row

PREFILL_CHUNK = 512


@torch.no_grad()
def decoding_cost(model: PreTrainedModel, context_lengths: list[int], tokens: int) -> dict[str, list[float]]:
    """Decodes a few tokens after contexts of growing length, one row, through the cached path.

    Args:
        model: teacher or student.
        context_lengths: tokens in the cache, ascending.
        tokens: tokens timed at each length; the median counts.

    Returns:
        `seconds_per_token` and `state_bytes` (the cache of one row), one number per context length.
    """
    was_training = model.training
    model.eval()
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache(config=model.config)
    cost: dict[str, list[float]] = {"seconds_per_token": [], "state_bytes": []}
    for length in context_lengths:
        while (missing := length - cache.get_seq_length()) > 0:
            _advance(
                model,
                cache,
                torch.randint(vocabulary, (1, min(missing, PREFILL_CHUNK)), generator=generator).to(device),
            )
        cost["state_bytes"].append(float(cache_bytes_per_row(cache)))
        seconds = []
        for _ in range(tokens):
            token = torch.randint(vocabulary, (1, 1), generator=generator).to(device)
            started = time.perf_counter()
            _advance(model, cache, token)
            seconds.append(time.perf_counter() - started)
        cost["seconds_per_token"].append(statistics.median(seconds))
    model.train(was_training)
    return cost


def _advance(model: PreTrainedModel, cache: DynamicCache, input_ids: torch.Tensor) -> None:
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
