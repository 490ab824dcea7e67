"""How texts are continued: the options of generate.py and what they may be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# key: its type, what must hold, and how that is said
RULES: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "max_new_tokens": ((int,), lambda value: value >= 1, "a whole number of tokens from 1 on"),
    "temperature": ((int, float), lambda value: 0 <= value < float("inf"), "a number from 0 (greedy) on"),
    "top_p": ((int, float), lambda value: 0 < value <= 1, "a number above 0 and up to 1 (keep all)"),
    "top_k": ((int,), lambda value: value >= 0, "a whole number from 0 (keep all) on"),
    "repetition_penalty": ((int, float), lambda value: 0 < value < float("inf"), "a number above 0"),
    "seed": ((int,), lambda value: value >= 0, "a whole number from 0 on"),
    "samples": ((int,), lambda value: value >= 1, "a whole number from 1 on"),
    "batch_size": ((int,), lambda value: value >= 1, "a whole number of rows from 1 on"),
    "prefill_chunk": ((int,), lambda value: value >= 1, "a whole number of tokens from 1 on"),
}
SAMPLING_ONLY = {"top_p": 1, "top_k": 0, "samples": 1}  # what has no effect at temperature 0, and its default


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How texts are continued.

    Args:
        max_new_tokens: tokens per text, at most.
        temperature: 0 takes the most likely token (greedy); above, tokens are drawn.
        top_p: draws among the most likely tokens that together have this probability; 1 keeps all.
        top_k: draws among so many most likely tokens; 0 keeps all.
        repetition_penalty: above 1 makes tokens less likely that stand in the text already.
        seed: of the draws; with the same seed a prompt gets the same text, whatever else is generated.
        stop: a text ends before the first of these strings.
        samples: texts per prompt.
        batch_size: texts at once.
        prefill_chunk: tokens of a prompt that are read at once; bounds memory.

    Raises:
        ValueError: for a value out of range, or one that would have no effect.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 1
    stop: Sequence[str] = ()
    samples: int = 1
    batch_size: int = 8
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        for key, (kinds, holds, rule) in RULES.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
                raise ValueError(f"{key}={value!r} must be {rule}.")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r} must be a list of texts, none empty: stop=['END'].")
        for key, default in SAMPLING_ONLY.items():
            if self.temperature == 0 and getattr(self, key) != default:
                raise ValueError(
                    f"{key}={getattr(self, key)} has no effect with temperature=0 (greedy); "
                    "set temperature above 0."
                )
