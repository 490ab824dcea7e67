"""Counts good and bad documents, keeps the bad ones with their origin, and stops the run at too many."""

import base64
import codecs
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

REASONS = ("broken_json", "wrong_utf8", "missing_field", "empty", "enormous", "broken_archive")
REASONS += ("refused_by_template", "no_answer")  # of conversations
EXCERPT_BYTES = 2000


class BadDataError(ValueError):
    """More documents are bad than the config allows, or a stream cannot be read on."""


class Quarantine:
    """The ledger of one source's documents.

    Use one per source: a share over several sources would let a wholly broken small one pass unseen.

    Args:
        folder: where `quarantine.jsonl` is appended; created with the first bad document, never before.
        max_bad_share: largest tolerated share of bad documents, in [0, 1]; 1 tolerates everything.
        min_documents: the share is judged from this many documents on, and again by `finish`.
        max_document_bytes: a longer text (UTF-8) or raw line is `enormous`.

    Raises:
        ValueError: for a value out of range, naming its key.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bad_share: float = 0.01,
        min_documents: int = 100,
        max_document_bytes: int = 16 * 2**20,
    ):
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share={max_bad_share} must lie in [0, 1].")
        if min_documents < 1:
            raise ValueError(f"data.min_documents={min_documents} must be at least 1.")
        if max_document_bytes < 1:
            raise ValueError(f"data.max_document_bytes={max_document_bytes} must be at least 1.")
        self.path = Path(folder) / "quarantine.jsonl"
        self.max_bad_share = max_bad_share
        self.min_documents = min_documents
        self.max_document_bytes = max_document_bytes
        self._good = 0
        self._bad: Counter[str] = Counter()
        self._first = ""

    def screen(self, raw: bytes | str | None, origin: str) -> str | None:
        """Judges one candidate document and counts it.

        Args:
            raw: its text, as UTF-8 bytes or decoded; None where the field that should hold it is null.
            origin: the place it came from.

        Returns:
            The text as it stands (line ends included, a byte-order mark removed), or None if it is bad.
        """
        if raw is None:
            return self.bad(origin, "missing_field", "the field is null", b"")
        try:
            data = raw if isinstance(raw, bytes) else raw.encode("utf-8")
            text = raw if isinstance(raw, str) else raw.decode("utf-8")
        except UnicodeError as error:
            return self.bad(origin, "wrong_utf8", str(error), raw)
        if len(data) > self.max_document_bytes:
            return self.bad(origin, "enormous", self.enormous_detail(f"{len(data)} bytes"), data)
        if not text.strip().strip("\ufeff\0").strip():
            return self.bad(origin, "empty", f"nothing to read in {len(data)} bytes", data)
        self._good += 1
        self._judge(at_end=False)
        return text.removeprefix("\ufeff")

    def bad(self, origin: str, reason: str, detail: str, raw: bytes | str, size: int | None = None) -> None:
        """Counts one bad document and appends it to the file.

        Args:
            origin: the place it came from.
            reason: one of `REASONS`.
            detail: what exactly is wrong, in words.
            raw: the raw bytes or text, or its beginning; an excerpt is kept, so that it can be recognised.
            size: how many bytes the raw document has, where `raw` is only its beginning.

        Raises:
            BadDataError: when the tolerated share is exceeded.
        """
        assert reason in REASONS, reason
        data = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
        record = {"origin": origin, "reason": reason, "detail": detail}
        record |= {"bytes": len(data) if size is None else size, **_excerpt(data)}
        if not self._bad:
            self._first = f"{origin} ({reason}: {detail})"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            log.warning("First bad document: %s. Bad ones are kept in %s", self._first, self.path)
        # Opened for each record: bad documents are few, and each must survive whatever ends the run.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._bad[reason] += 1
        self._judge(at_end=False)

    def enormous_detail(self, size: str) -> str:
        """The words that explain an enormous document of `size` bytes."""
        return f"{size}, above data.max_document_bytes={self.max_document_bytes}"

    def finish(self) -> None:
        """Judges the share once more, however few the documents; call it when the source is exhausted.

        Raises:
            BadDataError: when the tolerated share is exceeded.
        """
        self._judge(at_end=True)

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide which documents pass, for the key of a cache."""
        return {"max_document_bytes": self.max_document_bytes}

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest: good, bad by reason, the bad share, and the file (None if none is bad)."""
        bad = sum(self._bad.values())
        return {
            "good": self._good,
            "bad": {reason: self._bad[reason] for reason in REASONS if self._bad[reason]},
            "bad_share": bad / max(self._good + bad, 1),
            "max_bad_share": self.max_bad_share,
            "max_document_bytes": self.max_document_bytes,
            "file": str(self.path) if bad else None,
        }

    def _judge(self, *, at_end: bool) -> None:
        bad = self._bad.total()
        seen = self._good + bad
        if not bad or bad <= self.max_bad_share * seen or (seen < self.min_documents and not at_end):
            return
        counts = ", ".join(f"{reason} {count}" for reason, count in self._bad.most_common())
        raise BadDataError(
            f"{bad} of {seen} documents ({bad / seen:.2%}) are bad, more than "
            f"data.max_bad_share={self.max_bad_share} allows: {counts}. All are kept in {self.path}; "
            f"the first is {self._first}. Repair or remove them, or raise data.max_bad_share."
        )


def _excerpt(data: bytes) -> dict[str, str]:
    """The beginning of the raw document: as text where it is UTF-8, otherwise as base64."""
    head = data[:EXCERPT_BYTES]
    try:
        # The incremental decoder forgives a character that the cut has divided.
        cut = len(data) > EXCERPT_BYTES
        return {"excerpt": codecs.getincrementaldecoder("utf-8")().decode(head, final=not cut)}
    except UnicodeDecodeError:
        return {"excerpt_base64": base64.b64encode(head).decode("ascii")}
