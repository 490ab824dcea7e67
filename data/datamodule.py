"""The data module: sources become token stores, stores become rows, rows become batches."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.documents import DocumentSource
from data.loader import collate
from data.packing import MixedRows, PackedRows, RepeatedPassages, Rows, passage_range
from data.row_module import VALIDATION_SEED, RowDataModule
from data.token_store import TokenDocuments, prepare_token_store
from data.whole_rows import OneByOne

DIVIDING_FIELDS = ("split", "validation_share", "name")


class TextDataModule(RowDataModule):
    """Rows of tokens of document sources; the other arguments are those of `RowDataModule`.

    Args:
        tokenizer: the teacher's.
        sources: name -> document source that is trained on, in the split it names.
        validation_sources: name -> document source that is validated on; must share no document with
            `sources`.
        weights: name -> share of training rows; sources that are not named have weight 1.
        repeated_share: share of training rows that hold one passage shown again and again.
        validation_rows: packed rows of each validation source that are evaluated.
        copy_rows: held-out passages, each shown twice, that are evaluated.
        copy_passage_length: tokens of such a passage.
        cache_folder: where token stores live.
        max_bad_share: share of bad documents above which the run stops.
        max_document_bytes: longer documents are quarantined.
        cross_documents: let state, attention and labels run on from one document of a row to the next.
        max_tokens: of each source, its training and validation split together; None takes the whole source.

    Raises:
        ValueError: for names that are no source, a share out of range, or a source without documents.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sources: Mapping[str, DocumentSource],
        validation_sources: Mapping[str, DocumentSource],
        weights: Mapping[str, float],
        repeated_share: float,
        repeat_first_rows: int,
        row_length: int,
        rows_per_device: int,
        validation_rows: int,
        copy_rows: int,
        copy_passage_length: int,
        workers: int,
        seed: int,
        cache_folder: str,
        max_bad_share: float,
        max_document_bytes: int,
        max_tokens: int | None = None,
        cross_documents: bool = False,
    ):
        super().__init__(
            row_length=row_length,
            rows_per_device=rows_per_device,
            validation_rows=validation_rows,
            repeat_first_rows=repeat_first_rows,
            workers=workers,
            seed=seed,
        )
        self.tokenizer, self.repeated_share = tokenizer, repeated_share
        self.sources, self.validation_sources = _named(sources), _named(validation_sources)
        self.weights = dict(weights)
        self.copy_rows, self.copy_passage_length = copy_rows, copy_passage_length
        self.cache_folder = Path(cache_folder)
        self._stores: dict[DocumentSource, TokenDocuments] = {}
        self.store_options = {"max_bad_share": max_bad_share, "max_document_bytes": max_document_bytes}
        self.max_tokens, self.cross_documents = max_tokens, cross_documents
        self._check()

    def prepare_data(self) -> None:
        """Tokenises what no cache holds yet."""
        for source in [*self.sources.values(), *self.validation_sources.values()]:
            self.store(source)

    @property
    def rows_together(self) -> int:
        """Neighbouring rows that are of use only together: 2 for pairs."""
        return max(getattr(source, "rows_together", 1) for source in self.sources.values())

    def store(self, source: DocumentSource) -> TokenDocuments:
        """The tokens of a source, opened once: its own where it holds tokens, else from the cache."""
        if source not in self._stores:
            if hasattr(source, "token_store"):
                self._stores[source] = source.token_store(self.tokenizer, self.max_tokens)
            else:
                options = {**self.store_options, "max_tokens": self.max_tokens}
                self._stores[source] = prepare_token_store(
                    source, self.tokenizer, self.cache_folder, **options
                )
        return self._stores[source]

    def row_inputs(self) -> dict[str, Any]:
        """What decides the training rows, as plain data: equal descriptions mean equal rows."""
        return {
            "sources": {name: source.fingerprint() for name, source in self.sources.items()},
            "weights": {name: self.weights.get(name, 1.0) for name in self.sources},
            "row_length": self.row_length,
            "seed": self.seed,
            "repeated_share": self.repeated_share,
            "max_tokens": self.max_tokens,
            "cross_documents": self.cross_documents,
            **self.store_options,
        }

    def endless_rows(self, row_length: int) -> Rows:
        """The endless mixture of training rows."""
        parts, weights = [], []
        for name, source in self.sources.items():
            weight, store = self.weights.get(name, 1.0), self.store(source)
            if self.repeated_share < 1:
                parts.append(self._packed_rows(source, row_length, self.seed))
                weights.append(weight * (1 - self.repeated_share))
            if self.repeated_share > 0:
                passages = passage_range(row_length)
                parts.append(RepeatedPassages(store, row_length, passages, self.seed))
                weights.append(weight * self.repeated_share)
        rows = parts[0] if len(parts) == 1 else MixedRows(parts, weights)
        return OneByOne(rows, self.rows_together) if self.rows_together > 1 else rows

    def validation_batches(self, rows: int | None = None) -> list[dict[str, Tensor]]:
        """The held-out rows, the same for every run.

        Args:
            rows: how many of each source; None means `validation_rows`.
        """
        return self._packed(self.validation_sources, rows or self.validation_rows, VALIDATION_SEED)

    def copy_batches(self) -> list[dict[str, Tensor]]:
        """Held-out passages shown twice, one per row of 2 x `copy_passage_length` tokens."""
        return self._copies(
            self.validation_sources, self.copy_rows, self.copy_passage_length, VALIDATION_SEED
        )

    def calibration_batches(self, rows: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """Training rows for decisions that must not see held-out text: packed ones, and passages shown twice.

        Args:
            rows: of each kind and source.
        """
        copies = self._copies(self.sources, rows, self.row_length // 2, self.seed)
        return self._packed(self.sources, rows, self.seed), copies

    def retrieval_batches(
        self, task: Any, rows: int, *, held_out: bool = False, row_length: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Batches of a retrieval task (data/retrieval.py), whose answers alone have labels.

        Args:
            task: gives rows of a store.
            rows: of each source.
            held_out: take the validation sources, the same rows for every run; else the training sources.
            row_length: T; None means the config's.

        Returns:
            The batch contract and `depths` [B] float64, the place of each row's answer in [0, 1).
        """
        sources, seed = (self.validation_sources, VALIDATION_SEED) if held_out else (self.sources, self.seed)
        length, batches = row_length or self.row_length, []
        for source in sources.values():
            made = task.rows(self.store(source), self.tokenizer, length, seed)
            for start in range(0, rows, self.rows_per_device):
                indices = range(start, min(start + self.rows_per_device, rows))
                depths = torch.tensor([made.depth(index) for index in indices], dtype=torch.float64)
                batches.append(collate([made.row(index) for index in indices]) | {"depths": depths})
        return batches

    def _packed(self, sources: Mapping[str, DocumentSource], rows: int, seed: int) -> list[dict[str, Tensor]]:
        taken = []
        for source in sources.values():
            packed, together = self._packed_rows(source, self.row_length, seed), self.rows_together
            groups = min(max(rows // together, 1), packed.rows_per_epoch)
            packed = OneByOne(packed, together) if together > 1 else packed
            taken += [packed.row(index) for index in range(groups * together)]
        return self.batches(taken)

    def _packed_rows(self, source: DocumentSource, row_length: int, seed: int) -> Rows:
        """A source's documents in rows: the source's own kind of rows, or its tokens cut without loss."""
        pack = getattr(source, "packed", PackedRows)
        return pack(self.store(source), row_length, seed, self.cross_documents)

    def _copies(
        self, sources: Mapping[str, DocumentSource], rows: int, length: int, seed: int
    ) -> list[dict[str, Tensor]]:
        taken = []
        for source in sources.values():
            passages = RepeatedPassages(self.store(source), 2 * length, (length, length), seed)
            taken += [passages.row(index) for index in range(rows)]
        return self.batches(taken)

    def _check(self) -> None:
        for key in ("sources", "validation_sources"):
            if not getattr(self, key):
                raise ValueError(f"data.{key} is empty; name at least one source.")
        unknown = sorted(set(self.weights) - set(self.sources))
        if unknown:
            raise ValueError(f"data.weights names {unknown}; the sources are {sorted(self.sources)}.")
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError(
                f"data.weights={self.weights} must be positive; remove a source to leave it out."
            )
        if not 0 <= self.repeated_share <= 1:
            raise ValueError(f"data.repeated_share={self.repeated_share} must lie in [0, 1].")
        self.check_counts({"copy_rows": 1, "copy_passage_length": 1})
        if self.repeated_share > 0 and self.row_length < 4:
            raise ValueError(
                f"data.repeated_share={self.repeated_share} needs data.row_length of at least 4."
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"data.max_tokens={self.max_tokens} must be at least 1, or null.")
        self._check_together()
        self._check_sources()

    def _check_together(self) -> None:
        sources = (*self.sources.values(), *self.validation_sources.values())
        if len({getattr(source, "rows_together", 1) for source in sources}) > 1:
            raise ValueError(
                "data.sources and data.validation_sources mix pairs with other documents; give pairs a stage "
                "of their own."
            )
        for key in ("rows_per_device", "repeat_first_rows"):
            if getattr(self, key) % self.rows_together:
                raise ValueError(
                    f"data.{key}={getattr(self, key)} must be a multiple of {self.rows_together}: the rows "
                    "of a pair stay together."
                )
        if self.rows_together > 1 and self.repeated_share > 0:
            raise ValueError(f"data.repeated_share={self.repeated_share} must be 0: passages are no pairs.")

    def _check_sources(self) -> None:
        for name, held_out in self.validation_sources.items():
            for trained, source in self.sources.items():
                if _undivided(source) != _undivided(held_out):
                    continue
                splits = (source.split, held_out.split)
                if splits != ("train", "validation") or source.validation_share != held_out.validation_share:
                    raise ValueError(
                        f"data.validation_sources.{name} shares documents with data.sources.{trained}: the "
                        "same input "
                        "is both trained and validated on. Set split=train there and split=validation "
                        "here, with "
                        "one validation_share."
                    )
        for source in [*self.sources.values(), *self.validation_sources.values()]:
            if hasattr(source, "check_tokenizer") and self.tokenizer is not None:
                source.check_tokenizer(self.tokenizer)


def _undivided(source: DocumentSource) -> tuple:
    """What the source reads, before it is divided."""
    fields = {name: value for name, value in vars(source).items() if name not in DIVIDING_FIELDS}
    return type(source), fields


def _named(sources: Mapping[str, DocumentSource]) -> dict[str, DocumentSource]:
    """Tells each source its key in the config, for its messages."""
    return {name: dataclasses.replace(source, name=name) for name, source in sources.items()}
