"""The data module: sources become token stores, stores become rows, rows become batches."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from data.documents import DocumentSource
from data.loader import StatefulLoader, collate
from data.packing import FirstRows, MixedRows, PackedRows, RepeatedPassages, Rows
from data.token_store import TokenDocuments, prepare_token_store

DIVIDING_FIELDS = ("split", "validation_share", "name")
VALIDATION_SEED = 0  # validation rows never depend on the run's seed


class TextDataModule(pl.LightningDataModule):
    """Batches {input_ids [B,T] int64, labels [B,T] int64 (-100 ignored), document_ids [B,T] int32}.

    Args:
        tokenizer: the teacher's.
        sources: name -> document source that is trained on, in the split it names.
        validation_sources: name -> document source that is validated on; must share no document with
            `sources`.
        weights: name -> share of training rows; sources that are not named have weight 1.
        repeated_share: share of training rows that hold one passage shown again and again.
        repeat_first_rows: train on the first so many rows only, again and again; 0 means all.
        row_length: T, tokens.
        rows_per_device: B.
        validation_rows: packed rows of each validation source that are evaluated.
        copy_rows: held-out passages, each shown twice, that are evaluated.
        copy_passage_length: tokens of such a passage.
        workers: loader processes.
        seed: of the order of rows.
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
        super().__init__()
        self.tokenizer, self.seed, self.workers = tokenizer, seed, workers
        self.sources, self.validation_sources = _named(sources), _named(validation_sources)
        self.weights = dict(weights)
        self.repeat_first_rows = repeat_first_rows
        self.repeated_share, self.row_length, self.rows_per_device = (
            repeated_share,
            row_length,
            rows_per_device,
        )
        self.validation_rows, self.copy_rows, self.copy_passage_length = (
            validation_rows,
            copy_rows,
            copy_passage_length,
        )
        self.cache_folder = Path(cache_folder)
        self._stores: dict[DocumentSource, TokenDocuments] = {}
        self.store_options = {"max_bad_share": max_bad_share, "max_document_bytes": max_document_bytes}
        self.max_tokens, self.cross_documents = max_tokens, cross_documents
        self._check()

    def prepare_data(self) -> None:
        """Tokenises what no cache holds yet."""
        for source in [*self.sources.values(), *self.validation_sources.values()]:
            self.store(source)

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

    def train_rows(self) -> Rows:
        """The endless mixture of training rows."""
        parts, weights = [], []
        for name, source in self.sources.items():
            weight, store = self.weights.get(name, 1.0), self.store(source)
            if self.repeated_share < 1:
                parts.append(PackedRows(store, self.row_length, self.seed, self.cross_documents))
                weights.append(weight * (1 - self.repeated_share))
            if self.repeated_share > 0:
                lengths = (min(64, self.row_length // 4), self.row_length // 2)
                parts.append(RepeatedPassages(store, self.row_length, lengths, self.seed))
                weights.append(weight * self.repeated_share)
        rows = parts[0] if len(parts) == 1 else MixedRows(parts, weights)
        return FirstRows(rows, self.repeat_first_rows) if self.repeat_first_rows else rows

    def train_dataloader(self) -> StatefulLoader:
        """This rank's loader for the whole stage: `trainer.max_steps` optimiser steps."""
        return StatefulLoader(
            self.train_rows(),
            rows_per_device=self.rows_per_device,
            batches=self.trainer.max_steps * self.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            workers=self.workers,
        )

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

    def val_dataloader(self) -> DataLoader:
        """A quarter of the held-out rows, for a look during training."""
        # Lightning would take a bare list of batches for a collection of loaders.
        return DataLoader(self.validation_batches(max(1, self.validation_rows // 4)), batch_size=None)

    def _packed(self, sources: Mapping[str, DocumentSource], rows: int, seed: int) -> list[dict[str, Tensor]]:
        taken = []
        for source in sources.values():
            packed = PackedRows(self.store(source), self.row_length, seed, self.cross_documents)
            taken += [packed.row(index) for index in range(min(rows, packed.rows_per_epoch))]
        return self._batches(taken)

    def _copies(
        self, sources: Mapping[str, DocumentSource], rows: int, length: int, seed: int
    ) -> list[dict[str, Tensor]]:
        taken = []
        for source in sources.values():
            passages = RepeatedPassages(self.store(source), 2 * length, (length, length), seed)
            taken += [passages.row(index) for index in range(rows)]
        return self._batches(taken)

    def _batches(self, rows: list) -> list[dict[str, Tensor]]:
        size = self.rows_per_device
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

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
        for key in ("row_length", "rows_per_device", "validation_rows", "copy_rows", "copy_passage_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must be at least 1.")
        for key in ("workers", "repeat_first_rows"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key}={getattr(self, key)} must be 0 or more.")
        if self.repeated_share > 0 and self.row_length < 4:
            raise ValueError(
                f"data.repeated_share={self.repeated_share} needs data.row_length of at least 4."
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"data.max_tokens={self.max_tokens} must be at least 1, or null.")
        self._check_sources()

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
            if hasattr(source, "check_tokenizer"):
                source.check_tokenizer(self.tokenizer)


def _undivided(source: DocumentSource) -> tuple:
    """What the source reads, before it is divided."""
    fields = {name: value for name, value in vars(source).items() if name not in DIVIDING_FIELDS}
    return type(source), fields


def _named(sources: Mapping[str, DocumentSource]) -> dict[str, DocumentSource]:
    """Tells each source its key in the config, for its messages."""
    return {name: dataclasses.replace(source, name=name) for name, source in sources.items()}
