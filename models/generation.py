"""Text from a model, through its decoding cache: several prompts at once, each continued as if alone.

Shape letters: B rows, T tokens.
"""

import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from models.generation_options import GenerationOptions
from models.row_text import RowText, TextWatch
from models.sampling import row_seed, samplers
from models.sequence_state import cache_bytes_per_row

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One text to be continued: the prompt, its tokens, and the seed of its draws."""

    prompt: str
    ids: list[int]
    seed: int


@dataclass(frozen=True)
class Generation:
    """One continued text: `finish_reason` is `stop`, `eos` or `length`; `ids` are all new tokens."""

    prompt: str
    text: str
    prompt_tokens: int
    ids: list[int]
    finish_reason: str

    def facts(self) -> dict[str, Any]:
        """As a line of generations.jsonl; `tokens` counts the new ones."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": len(self.ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass
class Cost:
    """What generating has cost; costs can be added up.

    Attributes:
        prefill_tokens, prefill_seconds: reading prompts; the last token of each counts as decoding, which
            begins with it.
        decode_tokens, decode_seconds: writing.
        state_bytes: of one row's cache at the end; the largest.
        growth: bytes that one more token adds to a row's cache, or None where only one was decoded.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    state_bytes: int = 0
    growth: float | None = None

    def add(self, other: "Cost") -> None:
        """Adds another cost to this one."""
        for name in ("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.state_bytes = max(self.state_bytes, other.state_bytes)
        known = [growth for growth in (self.growth, other.growth) if growth is not None]
        self.growth = max(known, default=None)


class Generator:
    """A model and its tokenizer, ready to continue texts.

    The sampling settings that come with a model are not used: GenerationOptions alone says how to draw.

    Args:
        model: teacher or student, in evaluation mode.
        tokenizer: the model's own.

    Raises:
        ValueError: for a model that decodes without a cache of the common kind.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise ValueError(
                f"model: architecture {model.config.model_type!r} takes no cache `past_key_values`; "
                "its texts cannot be continued here."
            )
        self.model, self.tokenizer = model, tokenizer
        self.eos_ids = _as_set(model.generation_config.eos_token_id) | _as_set(tokenizer.eos_token_id)
        model.generation_config = GenerationConfig()

    def rows(self, prompts: Sequence[str], options: GenerationOptions) -> list[Row]:
        """Each prompt `samples` times, with its tokens.

        Raises:
            ValueError: for a prompt without tokens, or one too long for the model.
        """
        counts: Counter[str] = Counter()
        rows = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, verbose=False)["input_ids"]
            for _ in range(options.samples):
                rows.append(Row(prompt, ids, row_seed(options.seed, prompt, counts[prompt])))
                counts[prompt] += 1
        return rows

    def generate(
        self,
        prompts: Sequence[str],
        options: GenerationOptions,
        show: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[list[Generation], Cost]]:
        """Continues the prompts, `batch_size` texts at a time, in their order.

        Args:
            prompts: texts; how often each is continued is `options.samples`.
            options: how.
            show: called with a row's number in its batch and its next characters while they come.
        """
        rows = self.rows(prompts, options)
        self.check_lengths(rows, options)
        for start in range(0, len(rows), options.batch_size):
            yield self.continue_rows(rows[start : start + options.batch_size], options, show=show)

    def check_lengths(self, rows: Sequence[Row], options: GenerationOptions) -> None:
        """Refuses rows without tokens, and texts beyond a table of learned positions.

        Other models are only said to be beyond the length that they know.

        Raises:
            ValueError: naming the prompt.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for row in rows:
            if not row.ids:
                raise ValueError(f"prompt: {row.prompt!r} has no tokens; give at least one character.")
        longest = max(len(row.ids) for row in rows) + options.max_new_tokens
        if limit is None or longest <= limit:
            return
        message = (
            f"max_new_tokens={options.max_new_tokens} leads to a text of {longest} tokens; the model's "
            f"positions end at {limit}"
        )
        if getattr(self.model.config, "rope_parameters", None) is None:
            raise ValueError(f"{message}. Set fewer tokens or shorten the prompt.")
        log.warning("%s: what it writes beyond them may be poor.", message)

    def new_cache(self) -> Cache:
        """An empty cache for one batch."""
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def continue_rows(
        self,
        rows: Sequence[Row],
        options: GenerationOptions,
        *,
        cache: Cache | None = None,
        end_ids: Mapping[int, str] | None = None,
        show: Callable[[int, str], None] | None = None,
    ) -> tuple[list[Generation], Cost]:
        """Continues one batch.

        Args:
            rows: texts of any lengths; shorter ones are padded on the left.
            options: how; `samples`, `seed` and `batch_size` are the rows' own affair.
            cache: holds the first tokens of the rows already; it is advanced to all but the last new token.
            end_ids: token id -> reason, beside the end of text and the stop strings that are single tokens.
            show: called with a row's number and its next characters.
        """
        cache = cache if cache is not None else self.new_cache()
        input_ids, mask = self._padded(rows)
        cost = Cost()
        started = self._now()
        cost.prefill_tokens = prefill(self.model, input_ids, mask, cache, options.prefill_chunk)
        cost.prefill_seconds = self._now() - started

        ends = dict.fromkeys(self.eos_ids, "eos") | self._stop_ids(options.stop) | dict(end_ids or {})
        texts = [RowText(self.tokenizer, options.stop, ends) for _ in rows]
        watch, growth = TextWatch(texts, show), _Growth(cache)
        drawing = {
            key: getattr(options, key) for key in ("temperature", "top_k", "top_p", "repetition_penalty")
        }
        started = self._now()
        self.model.generate(
            input_ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=samplers(input_ids, mask, [row.seed for row in rows], **drawing),
            stopping_criteria=StoppingCriteriaList([watch, growth]),
            generation_config=GenerationConfig(
                max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=self._pad_id()
            ),
        )
        watch.finish()
        cost.decode_seconds = self._now() - started
        cost.decode_tokens = sum(len(text.ids) for text in texts)
        cost.state_bytes, cost.growth = cache_bytes_per_row(cache), growth.per_token()
        found = [
            Generation(row.prompt, text.text, len(row.ids), text.ids, str(text.reason))
            for row, text in zip(rows, texts, strict=True)
        ]
        return found, cost

    def _padded(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """[B,T] token ids and mask, padded on the left."""
        length = max(len(row.ids) for row in rows)
        pad = self._pad_id()
        ids = [[pad] * (length - len(row.ids)) + row.ids for row in rows]
        mask = [[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in rows]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _pad_id(self) -> int:
        """Any token would do: padding is masked."""
        return self.tokenizer.pad_token_id or 0

    def _stop_ids(self, stop: Sequence[str]) -> dict[int, str]:
        """Stop strings that are special tokens: those never show in the text, so their ids are looked for."""
        added = self.tokenizer.get_added_vocab()
        return {added[text]: "stop" for text in stop if text in added}

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def prefill(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, cache: Cache, chunk: int) -> int:
    """Reads all tokens but the last into the cache, some at a time; no logits are computed.

    Args:
        model: teacher or student.
        input_ids, mask: [B,T], padded on the left.
        cache: holds the first tokens already, or none.
        chunk: tokens of each row that are read at once.

    Returns:
        Number of real tokens read.
    """
    begin, end = cache.get_seq_length(), input_ids.shape[1] - 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    for start in range(begin, end, chunk):
        stop = min(start + chunk, end)
        where = {"position_ids": positions[:, start:stop]} if takes_positions else {}
        model.base_model(
            input_ids=input_ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            **where,
        )
    return int(mask[:, begin:end].sum())


class _Growth(StoppingCriteria):
    """Ends nothing: watches how a cache grows from the first decoded token to the last."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.steps, self.first, self.last = cache, 0, 0, 0

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        self.steps, self.last = self.steps + 1, cache_bytes_per_row(self.cache)
        self.first = self.first or self.last
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def per_token(self) -> float | None:
        """Bytes per token and row."""
        return (self.last - self.first) / (self.steps - 1) if self.steps > 1 else None


def _as_set(ids: int | Sequence[int] | None) -> set[int]:
    """End tokens as a config gives them: none, one or several."""
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else set(ids)
