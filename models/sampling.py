"""How the next token is drawn, so that a row's text does not depend on the rows beside it.

The samplers are logits processors of transformers' `generate`, which then takes each row's largest score.
Shape letters: B rows, T tokens, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def row_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one text: it depends on the prompt and not on the prompt's place among others.

    Args:
        seed: of the whole call.
        prompt: the text that is continued.
        sample: number of the continuation of this very prompt, from 0.
    """
    digest = hashlib.sha256(f"{seed} {sample} {prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens less likely that stand in the row already, in the prompt or after it (arXiv 1909.05858).

    Other than transformers' own it does not count padding, which is no part of the row's text.

    Args:
        penalty: positive scores are divided by it, negative ones multiplied; above 1 for fewer repetitions.
        prompt_ids, mask: [B,T] the padded prompts, and 1 on their real tokens.
    """

    def __init__(self, penalty: float, prompt_ids: Tensor, mask: Tensor) -> None:
        self.penalty, self.prompt_ids, self.mask = penalty, prompt_ids, mask
        self.seen: Tensor | None = None  # [B,V] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B,V] scores -> [B,V]."""
        if self.seen is None:
            rows, columns = self.mask.nonzero(as_tuple=True)
            self.seen = torch.zeros_like(scores, dtype=torch.bool)
            self.seen[rows, self.prompt_ids[rows, columns]] = True
        else:
            self.seen.scatter_(1, input_ids[:, -1:], True)
        punished = torch.where(scores > 0, scores / self.penalty, scores * self.penalty)
        return torch.where(self.seen, punished, scores)


class RowNoise(LogitsProcessor):
    """Gumbel noise of a generator per row: the largest score is then a draw from the softmax of the row.

    The noise is drawn on the CPU, so that a seed means the same on every device.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B,V] log-probabilities up to a constant per row -> [B,V]."""
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        smallest = torch.finfo(noise.dtype).tiny
        return scores - noise.clamp_min_(smallest).log_().to(scores.device)


def samplers(
    prompt_ids: Tensor,
    mask: Tensor,
    seeds: Sequence[int],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> LogitsProcessorList:
    """The processors that the options ask for, in the order in which they act.

    Args:
        prompt_ids, mask: [B,T] the padded prompts, and 1 on their real tokens.
        seeds: of each row.
        temperature: 0 takes the most likely token.
        top_k: keeps so many tokens; 0 keeps all.
        top_p: keeps the most likely tokens that together have this probability.
        repetition_penalty: 1 changes nothing.
    """
    processors = LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(RepetitionPenalty(repetition_penalty, prompt_ids, mask))
    if temperature == 0:
        return processors
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(float(top_p)))
    processors.append(RowNoise(seeds))
    return processors
