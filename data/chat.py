"""Conversations as a source: what the assistant says is learned, what it is told is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.quarantine import Quarantine
from data.records import FileRecords, HubRecords, RecordSource
from data.text import Record
from data.token_store import DOCUMENTS_PER_BATCH, EncodedDocument, TokenStore
from data.turns import Message, Shown, TurnTemplate, Unusable, read_messages, trained_tokens
from data.whole_rows import WholeDocuments

EXAMPLE = "{human: user, gpt: assistant}"


@dataclass(frozen=True, kw_only=True)
class ChatSource(RecordSource):
    """What conversations and pairs of answers share: the template, and the shape of a turn.

    Args:
        chat_template: Jinja file; None takes the tokenizer's own template.
        role, content: keys of a turn: who speaks, and what is said.
        roles: the records' names of roles -> the template's (`system`, `user`, `assistant`).
        too_long: what becomes of a conversation of more than row_length tokens; none is cut in silence.

    Raises:
        ValueError: naming the key.
    """

    chat_template: str | None = None
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] | Sequence[tuple[str, str]] = ()
    too_long: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            pairs = tuple(sorted(dict(self.roles).items()))  # hashable, as sources are
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.key('roles')}={self.roles!r} must name roles, as in {EXAMPLE}."
            ) from None
        object.__setattr__(self, "roles", pairs)
        if self.too_long not in self.ways():
            raise ValueError(
                f"{self.key('too_long')}={self.too_long!r} is unknown; choose from {', '.join(self.ways())}."
            )
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ValueError(f"{self.key('chat_template')}={self.chat_template}: there is no such file.")

    def ways(self) -> tuple[str, ...]:
        """The values of `too_long`."""
        return ("drop", "error")

    def shown(self, record: Record, template: TurnTemplate) -> list[Shown]:
        """The conversations that a record stands for.

        Raises:
            Unusable: where it holds none.
        """
        raise NotImplementedError

    def encode(self, tokenizer: PreTrainedTokenizerBase, quarantine: Quarantine) -> Iterator[EncodedDocument]:
        """The tokens of every conversation, and which of them are learned; nothing is added to the template's
        text."""
        template = TurnTemplate(tokenizer, self.chat_template, self.key("chat_template"))
        conversations = self._conversations(template, quarantine)
        while batch := list(islice(conversations, DOCUMENTS_PER_BATCH)):
            texts = [shown.text for shown in batch]
            encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for ids, offsets, shown in zip(
                encoded["input_ids"], encoded["offset_mapping"], batch, strict=True
            ):
                yield EncodedDocument(ids, trained_tokens(offsets, shown.spans))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer by which conversations cannot be shown.

        Raises:
            ValueError: where it has no chat template, and none is given.
        """
        TurnTemplate(tokenizer, self.chat_template, self.key("chat_template"))

    def encoding(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What decides the tokens beside the records and the tokenizer: the template's text."""
        template = TurnTemplate(tokenizer, self.chat_template, self.key("chat_template"))
        return {"chat_template": template.template}

    def fingerprint(self) -> dict[str, Any]:
        """The records and the shape of a turn; `too_long` belongs to rows."""
        shape = {"role": self.role, "content": self.content, "roles": [list(pair) for pair in self.roles]}
        return {**super().fingerprint(), **shape, "fields": list(self.fields())}

    def _conversations(self, template: TurnTemplate, quarantine: Quarantine) -> Iterator[Shown]:
        for record in self.records(quarantine):
            try:
                shown = self.shown(record, template)
            except Unusable as error:
                quarantine.bad(record.origin, error.reason, str(error), record.raw)
                continue
            if quarantine.screen("".join(one.text for one in shown), record.origin) is not None:
                yield from shown

    def turns(self, value: Any) -> list[Message]:
        """The turns in the shape that templates take; see `read_messages`."""
        return read_messages(value, role=self.role, content=self.content, roles=dict(self.roles))


@dataclass(frozen=True, kw_only=True)
class ConversationSource(ChatSource):
    """One conversation per record.

    Args:
        messages: field of a record that holds the turns.
    """

    messages: str = "messages"

    def ways(self) -> tuple[str, ...]:
        """A conversation can also be split into several."""
        return ("drop", "error", "split")

    def fields(self) -> tuple[str, ...]:
        """The one that holds the turns."""
        return (self.messages,)

    def shown(self, record: Record, template: TurnTemplate) -> list[Shown]:
        """The conversation of a record."""
        if record.value.get(self.messages) is None:
            raise Unusable("missing_field", f"no {self.messages!r}; the fields are {list(record.value)[:20]}")
        return [template.show(self.turns(record.value[self.messages]), record.origin)]

    def packed(
        self, store: TokenStore, row_length: int, seed: int | None, cross_documents: bool
    ) -> WholeDocuments:
        """Rows of whole conversations."""
        return WholeDocuments(
            store, row_length, seed, self.too_long, self.key("too_long"), cross_documents=cross_documents
        )


@dataclass(frozen=True, kw_only=True)
class Conversations(ConversationSource, FileRecords):
    """Conversations from files of JSON lines or Parquet; see `ConversationSource` and `FileRecords`."""


@dataclass(frozen=True, kw_only=True)
class HubConversations(ConversationSource, HubRecords):
    """Conversations from the Hub; see `ConversationSource` and `HubRecords`."""
