"""A conversation through a chat template; the state is kept from turn to turn where that is exact."""

from collections.abc import Callable
from dataclasses import replace

from jinja2 import TemplateError
from transformers import Cache, PreTrainedTokenizerBase

from models.generation import Cost, Generation, Generator, Row
from models.generation_options import GenerationOptions
from models.sampling import row_seed

Message = dict[str, str]
MARKER = "31415926535"  # an answer that templates leave as it is, be it trimmed or put in capitals


class ChatTemplate:
    """Turns messages into tokens.

    Attributes:
        end_ids: the token that ends an assistant's turn in this template, and the reason `eos`; or empty.
        stop: where it ends with plain text instead, that text.

    Args:
        tokenizer: its own template is used, unless another is given.
        template: Jinja text, as in a `chat_template.jinja`; None for the tokenizer's.
        system: the first message, or None.

    Raises:
        ValueError: where there is no template, or it cannot show these messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, system: str | None = None
    ) -> None:
        if template is None and tokenizer.chat_template is None:
            raise ValueError(
                "chat=true: this tokenizer has no chat template; set chat_template=<file.jinja>, or continue "
                "plain texts with prompt=."
            )
        self.tokenizer, self.template = tokenizer, template
        self.start: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self.end_ids, self.stop = self._turn_end()

    def text(self, messages: list[Message], *, answer: bool) -> str:
        """The conversation as the model reads it; with `answer` up to where its own turn begins.

        Raises:
            ValueError: where the template refuses the messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                [*self.start, *messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer,
            )
        except TemplateError as error:
            raise ValueError(
                f"chat_template: the template cannot show this conversation ({error}); leave `system` out "
                "if it knows no such role, or set chat_template=<file.jinja>."
            ) from error

    def ids(self, text: str) -> list[int]:
        """Its tokens; the template itself writes the special ones."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _turn_end(self) -> tuple[dict[int, str], list[str]]:
        """What the template writes after an answer: a special token, or text."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARKER}]
        _, answer, end = self.text(messages, answer=False).rpartition(MARKER)
        if not answer:
            raise ValueError("chat_template: it leaves out what the assistant said; messages need `content`.")
        first = self.ids(end.strip())[:1]
        if first and first[0] in self.tokenizer.get_added_vocab().values():
            return {first[0]: "eos"}, []
        return {}, [end.strip()] if end.strip() else []


class Chat:
    """One conversation with a model.

    Args:
        generator: continues the texts.
        template: shows conversations to the model.
        options: how each answer is written.
    """

    def __init__(self, generator: Generator, template: ChatTemplate, options: GenerationOptions) -> None:
        self.generator, self.template = generator, template
        self.options = replace(options, stop=[*options.stop, *template.stop])
        self.messages: list[Message] = []
        self._cache: Cache | None = None
        self._cached: list[int] = []  # the tokens that the cache has read

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages, self._cache, self._cached = [], None, []

    def reply(self, message: str, show: Callable[[str], None] | None = None) -> tuple[Generation, Cost, int]:
        """The model's next answer. A conversation that is interrupted stays as it was before.

        The cache goes on only where the new text begins with the very tokens that it has read: a state
        cannot be taken back. Otherwise everything is read anew.

        Args:
            message: what the user says.
            show: called with the answer's next characters while they come.

        Returns:
            The answer, its cost, and how many tokens needed no reading because the cache held them.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        text = self.template.text(messages, answer=True)
        ids = self.template.ids(text)
        row = Row(message, ids, row_seed(self.options.seed, text, 0))
        self.generator.check_lengths([row], self.options)
        cache, cached = self._cache, self._cached
        self._cache, self._cached = None, []
        if cache is None or len(cached) >= len(ids) or ids[: len(cached)] != cached:
            cache, cached = self.generator.new_cache(), []
        (answer,), cost = self.generator.continue_rows(
            [row],
            self.options,
            cache=cache,
            end_ids=self.template.end_ids,
            show=None if show is None else lambda _, piece: show(piece),
        )
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._cache, self._cached = cache, ids + answer.ids[:-1]
        return answer, cost, len(cached)
