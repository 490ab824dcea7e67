"""Conversations as text, and which of its characters the assistant says.

A template that marks the assistant's turns (`{% generation %}`) is taken at its word. With any other one a
turn is what the template adds to the conversation before it, which holds only while a longer conversation
begins with the text of a shorter one; that is checked for every conversation.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

ASSISTANT = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]


class Shown(NamedTuple):
    """A conversation as the model reads it.

    `spans` are the (start, end) characters of the assistant's turns: what is said, and the end of the turn.
    """

    text: str
    spans: list[tuple[int, int]]


class Unusable(Exception):
    """A record that nothing can be learned from; `reason` is one of `data.quarantine.REASONS`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read_messages(
    value: Any, *, role: str = "role", content: str = "content", roles: Mapping[str, str] | None = None
) -> list[Message]:
    """The turns of a conversation in the shape that chat templates take.

    Args:
        value: a list of objects, as a record holds it.
        role, content: their keys for who speaks and what is said.
        roles: the record's names of roles -> the template's; others stay as they are.

    Raises:
        Unusable: for anything else.
    """
    if not isinstance(value, list) or not value:
        raise Unusable("missing_field", f"a list of turns is wanted, not {_shortly(value)}")
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise Unusable("missing_field", f"turn {number} is no object but {_shortly(turn)}")
        for key in (role, content):
            if not isinstance(turn.get(key), str):
                raise Unusable(
                    "missing_field", f"turn {number} has no text in {key!r}; it has {list(turn)[:9]}"
                )
        # What else a turn has (tool calls, reasoning) is the template's affair; Parquet fills in nulls.
        others = {key: item for key, item in turn.items() if key not in (role, content) and item is not None}
        speaker = (roles or {}).get(turn[role], turn[role])
        if speaker == ASSISTANT and not turn[content].strip():
            raise Unusable("empty", f"turn {number} is an empty answer")
        messages.append({**others, "role": speaker, "content": turn[content]})
    return messages


class TurnTemplate:
    """Shows conversations, and finds the assistant's turns in them.

    Args:
        tokenizer: its own template is used, unless another is given.
        file: a Jinja file, or None for the tokenizer's.
        key: the config key of `file`, for messages.

    Raises:
        ValueError: where there is no template, or none to choose.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: str | None, key: str):
        self.tokenizer, self.key = tokenizer, key
        if file is None and tokenizer.chat_template is None:
            raise ValueError(f"{key}: this tokenizer has no chat template; set {key}=<file.jinja>.")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{key}: this tokenizer cannot say which characters a token holds; use a fast one."
            )
        self.template = tokenizer.get_chat_template() if file is None else Path(file).read_text("utf-8")
        self.marks_turns = MARKED.search(self.template) is not None
        self._special = tuple(token for token in tokenizer.get_added_vocab() if token.strip() == token != "")
        self._announces = self._announces_answers()

    def show(self, messages: Sequence[Message], origin: str, first: int = 0) -> Shown:
        """Text and turns of a conversation.

        Args:
            messages: of the conversation.
            origin: the place it came from.
            first: index of the first message whose tokens may be learned.

        Raises:
            Unusable: where the template refuses the conversation, or the assistant says nothing in it.
            ValueError: where the template lets turns change with what follows them.
        """
        answers = [i for i, turn in enumerate(messages) if turn["role"] == ASSISTANT and i >= first]
        if not answers:
            raise Unusable("no_answer", f"no turn of {ASSISTANT!r}; the roles are {_roles(messages)}")
        try:
            text, spans = (
                self._marked(messages) if self.marks_turns else self._added(messages, answers, origin)
            )
            if self.marks_turns and first:
                begin = len(self._beginning(messages[:first], text, origin, answer=True))
                spans = [span for span in spans if span[0] >= begin]
        except TemplateError as error:
            raise Unusable("refused_by_template", f"{type(error).__name__}: {error}") from error
        spans = [self._closed(text, *span) for span in spans]
        if not any(end > start for start, end in spans):
            raise Unusable("no_answer", f"the template shows no answer; the roles are {_roles(messages)}")
        return Shown(text, spans)

    def _text(self, messages: Sequence[Message], answer: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=answer
        )

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [tuple(span) for span in spans[0]]

    def _added(
        self, messages: Sequence[Message], answers: list[int], origin: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """What each answer adds to the conversation before it."""
        text = self._text(messages)
        spans = []
        for index in answers:
            before = self._beginning(messages[:index], text, origin, answer=True)
            after = self._beginning(messages[: index + 1], text, origin, answer=False)
            start = len(before)
            if not self._announces:  # then the turn's own header is part of what it adds
                header = text[start : text.find(messages[index]["content"].strip(), start)]
                start += len(header) if header.strip() else 0
            spans.append((start, len(after)))
        return text, spans

    def _announces_answers(self) -> bool:
        """Whether the template can end with the header of an answer that is still to come."""
        probe = [{"role": "user", "content": "question"}]
        try:
            return self._text(probe, answer=True) != self._text(probe)
        except TemplateError:
            return True

    def _beginning(self, messages: Sequence[Message], text: str, origin: str, answer: bool) -> str:
        part = self._text(messages, answer) if messages else ""
        if not text.startswith(part):
            raise ValueError(
                f"{self.key}: the template shows {len(messages)} turns of {origin} otherwise once more "
                "follow, so that what the assistant says cannot be told from its text. Set it to a copy of "
                "the template that keeps earlier turns as they are, or that puts {% generation %} and "
                "{% endgeneration %} around what the assistant says and the end of its turn."
            )
        return part

    def _closed(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The span up to the token that ends the turn, that one included, where a special token does."""
        said = text[start:end].rstrip()
        if said.endswith(self._special):
            return start, start + len(said)
        following = next((token for token in self._special if text.startswith(token, end)), "")
        return start, end + len(following)


def trained_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens begin inside one of the spans.

    Args:
        offsets: (start, end) characters of each token.
        spans: (start, end) characters, in order and apart.
    """
    return [any(start <= begin < end for start, end in spans) for begin, _ in offsets]


def _roles(messages: Sequence[Message]) -> list[str]:
    return sorted({turn["role"] for turn in messages})


def _shortly(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"
