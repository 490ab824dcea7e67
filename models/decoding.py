"""What decoding costs: time and memory of one more token, against the context before it."""

import copy
import random
import statistics
import time
from collections.abc import Mapping

import torch
from transformers import DynamicCache, PreTrainedModel

from models.sequence_state import cache_bytes_per_row

PREFILL_CHUNK = 512
WARM_UP_ROUNDS = 2


@torch.no_grad()
def decoding_cost(
    models: Mapping[str, PreTrainedModel], context_lengths: list[int], tokens: int
) -> dict[str, dict[str, list[float]]]:
    """Decodes a few tokens after contexts of different lengths, one row, through the cached path.

    All models and lengths take turns, token by token, so that other work on the machine meets all of them
    alike.

    Args:
        models: by name.
        context_lengths: tokens in the cache, ascending.
        tokens: tokens timed at each length; the median counts.

    Returns:
        For each model `seconds_per_token` and `state_bytes` (the cache of one row), one number per context
        length.
    """
    modes = {name: model.training for name, model in models.items()}
    caches = {name: _filled_caches(model.eval(), context_lengths) for name, model in models.items()}
    cost = {
        name: {"state_bytes": [float(cache_bytes_per_row(cache)) for cache in filled]}
        for name, filled in caches.items()
    }
    places = [(name, index) for name in models for index in range(len(context_lengths))]
    seconds: dict[tuple[str, int], list[float]] = {place: [] for place in places}
    for turn in range(-WARM_UP_ROUNDS, tokens):
        random.Random(turn).shuffle(places)  # who comes after a large cache finds the processor's caches cold
        for name, index in places:
            token = _random_ids(models[name], 1, seed=turn)
            started = time.perf_counter()
            _advance(models[name], caches[name][index], token)
            if turn >= 0:
                seconds[name, index].append(time.perf_counter() - started)
    for name, model in models.items():
        medians = [statistics.median(seconds[name, index]) for index in range(len(context_lengths))]
        cost[name]["seconds_per_token"] = medians
        model.train(modes[name])
    return cost


def _filled_caches(model: PreTrainedModel, context_lengths: list[int]) -> list[DynamicCache]:
    """A cache with that many tokens in it for each length, one text that goes on from length to length."""
    cache, filled = DynamicCache(config=model.config), []
    for length in context_lengths:
        while (missing := length - cache.get_seq_length()) > 0:
            _advance(model, cache, _random_ids(model, min(missing, PREFILL_CHUNK), seed=missing))
        filled.append(copy.deepcopy(cache))
    return filled


def _random_ids(model: PreTrainedModel, count: int, seed: int) -> torch.Tensor:
    vocabulary, generator = model.get_input_embeddings().num_embeddings, torch.Generator()
    generator.manual_seed(seed % 2**32)
    return torch.randint(vocabulary, (1, count), generator=generator).to(next(model.parameters()).device)


def _advance(model: PreTrainedModel, cache: DynamicCache, input_ids: torch.Tensor) -> None:
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
