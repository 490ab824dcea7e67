"""Pairs of answers to one conversation, of which one was preferred."""

from dataclasses import dataclass
from typing import Any

from data.chat import ChatSource
from data.records import FileRecords, HubRecords
from data.text import Record
from data.token_store import TokenStore
from data.turns import ASSISTANT, Message, Shown, TurnTemplate, Unusable
from data.whole_rows import Pairs


@dataclass(frozen=True, kw_only=True)
class PreferenceSource(ChatSource):
    """One pair per record, stored as two conversations: the chosen one, then the rejected one.

    An answer is a text, or a list of turns. A prompt is a text (what the user says), a list of turns, or not
    there: then the turns with which both answers begin are the prompt. Learned is what follows the prompt.

    Args:
        prompt: field of the conversation so far.
        chosen, rejected: fields of the two answers.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    rows_together = 2

    def fields(self) -> tuple[str, ...]:
        """The three."""
        return (self.prompt, self.chosen, self.rejected)

    def shown(self, record: Record, template: TurnTemplate) -> list[Shown]:
        """Both conversations of a record."""
        chosen, rejected, first = self.conversations(record.value)
        return [template.show(messages, record.origin, first) for messages in (chosen, rejected)]

    def packed(self, store: TokenStore, row_length: int, seed: int | None, cross_documents: bool) -> Pairs:
        """Pairs of rows; each holds one document, so nothing can be crossed."""
        return Pairs(store, row_length, seed, self.too_long, self.key("too_long"))

    def conversations(self, record: dict[str, Any]) -> tuple[list[Message], list[Message], int]:
        """The chosen conversation, the rejected one, and how many turns are the prompt of both.

        Raises:
            Unusable: where a field is missing, or both answers are the same.
        """
        missing = [name for name in (self.chosen, self.rejected) if record.get(name) is None]
        if missing:
            raise Unusable("missing_field", f"no {missing}; the fields are {list(record)[:20]}")
        prompt = self._turns(record.get(self.prompt), "user") if record.get(self.prompt) is not None else []
        pair = [self._turns(record[name], ASSISTANT) for name in (self.chosen, self.rejected)]
        # Many data sets repeat the prompt in both answers.
        pair = [turns if turns[: len(prompt)] == prompt else prompt + turns for turns in pair]
        alike = 0
        for one, other in zip(*pair, strict=False):
            if one != other:
                break
            alike += 1
        if pair[0] == pair[1]:
            raise Unusable("no_answer", "chosen and rejected are the same")
        if alike == 0:
            raise Unusable("missing_field", f"no {self.prompt!r}, and the answers begin with different turns")
        return *pair, alike

    def _turns(self, value: Any, speaker: str) -> list[Message]:
        if isinstance(value, str):
            value = [{self.role: speaker, self.content: value}]
        return self.turns(value)


@dataclass(frozen=True, kw_only=True)
class Preferences(PreferenceSource, FileRecords):
    """Pairs from files of JSON lines or Parquet; see `PreferenceSource` and `FileRecords`."""


@dataclass(frozen=True, kw_only=True)
class HubPreferences(PreferenceSource, HubRecords):
    """Pairs from the Hub; see `PreferenceSource` and `HubRecords`."""
