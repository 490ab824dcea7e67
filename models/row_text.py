"""From tokens to text, while they come: whole characters only, and an end at the first stop string."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character
LENGTH = "length"


class RowText:
    """The text of one row.

    Attributes:
        ids: the tokens so far, the one that ended the row included.
        text: what they say; ends before the stop string.
        reason: why the row has ended (`stop`, `eos`, `length`), or None while it goes on.

    Args:
        tokenizer: decodes; special tokens say nothing.
        stop: texts that end the row.
        end_ids: token id -> reason, for tokens that end the row.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], end_ids: Mapping[int, str]
    ) -> None:
        self.tokenizer, self.stop, self.end_ids = tokenizer, stop, end_ids
        self.ids: list[int] = []
        self.text = ""
        self.reason: str | None = None
        self._window = self._settled = 0  # text holds ids[:settled]; ids[window:settled] are decoded again

    def add(self, token: int) -> None:
        """Takes one more token. Bytes that are no whole character yet wait for the next one."""
        if token in self.end_ids:
            self.close(self.end_ids[token])
            self.ids.append(token)
            return
        self.ids.append(token)
        piece = self._piece()
        if not piece.endswith(BROKEN):
            self._take(piece)
            self._window, self._settled = self._settled, len(self.ids)

    def close(self, reason: str = LENGTH) -> None:
        """Ends the row, if nothing has ended it yet; what waited is text now, whole or not."""
        if self.reason is None:
            self._take(self._piece())
            self.reason = self.reason or reason

    def safe_length(self) -> int:
        """So many characters of `text` are final: the rest may be the beginning of a stop string."""
        if self.reason is not None:
            return len(self.text)
        longest = max(map(len, self.stop), default=1)
        for held in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-held:]) for stop in self.stop):
                return len(self.text) - held
        return len(self.text)

    def _piece(self) -> str:
        """The text of the tokens that `text` does not hold yet. Some tokens before them are decoded too,
        because a tokenizer may treat the first one of a text in its own way."""
        before = self._decode(self.ids[self._window : self._settled])
        return self._decode(self.ids[self._window :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _take(self, piece: str) -> None:
        searched = max(0, len(self.text) - max(map(len, self.stop), default=1) + 1)
        self.text += piece
        places = [place for stop in self.stop if (place := self.text.find(stop, searched)) >= 0]
        if places:
            self.text, self.reason = self.text[: min(places)], "stop"


class TextWatch(StoppingCriteria):
    """Reads along in `generate`: ends each row at its own stop string or end token, and shows the text.

    Args:
        rows: the texts, in the order of the batch.
        show: called with a row's number and its new final characters; None shows nothing.
    """

    def __init__(self, rows: Sequence[RowText], show: Callable[[int, str], None] | None = None) -> None:
        self.rows, self.show = rows, show
        self._shown = [0] * len(rows)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """[B] bool, which rows have ended."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.reason is None:
                row.add(token)
        self._show()
        return torch.tensor([row.reason is not None for row in self.rows], device=input_ids.device)

    def finish(self) -> None:
        """Ends the rows that have used up their tokens."""
        for row in self.rows:
            row.close()
        self._show()

    def _show(self) -> None:
        if self.show is None:
            return
        for index, row in enumerate(self.rows):
            end = row.safe_length()
            if end > self._shown[index]:
                self.show(index, row.text[self._shown[index] : end])
                self._shown[index] = end
