"""The data module: refusals by key, the mixture, and held-out batches that no run is trained on."""

import dataclasses
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from data_inputs import TEXTS, ListSource, tiny_tokenizer

from data.datamodule import TextDataModule
from data.shards import TokenShards
from data.token_store import prepare_token_store

OTHER = tuple(f"other {text}" for text in TEXTS)


def module(folder, **changes):
    options = {
        "tokenizer": tiny_tokenizer(),
        "sources": {"list": ListSource(split="train", validation_share=0.3)},
        "validation_sources": {"list": ListSource(split="validation", validation_share=0.3)},
        "weights": {},
        "repeated_share": 0.0,
        "repeat_first_rows": 0,
        "row_length": 16,
        "rows_per_device": 3,
        "validation_rows": 8,
        "copy_rows": 4,
        "copy_passage_length": 6,
        "workers": 0,
        "seed": 1,
        "cache_folder": str(folder),
        "max_bad_share": 0.0,
        "max_document_bytes": 10_000,
    }
    return TextDataModule(**{**options, **changes})


def attach(data, rank=0, world_size=1, max_steps=4, accumulate=1):
    """Stands in for the part of a Trainer that the loader asks."""
    data.trainer = SimpleNamespace(
        max_steps=max_steps, accumulate_grad_batches=accumulate, global_rank=rank, world_size=world_size
    )
    return data


def documents(store):
    return {tuple(store.document(index).tolist()) for index in range(len(store))}


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(one[name], other[name]) for one, other in zip(first, second, strict=True) for name in one
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sources": {}}, r"data\.sources is empty"),
        ({"validation_sources": {}}, r"data\.validation_sources is empty"),
        ({"weights": {"lisst": 1.0}}, r"data\.weights names \['lisst'\]; the sources are \['list'\]"),
        ({"weights": {"list": 0.0}}, r"data\.weights=.* must be positive"),
        ({"repeated_share": 1.5}, r"data\.repeated_share=1\.5 must lie in \[0, 1\]"),
        ({"repeated_share": 0.1, "row_length": 3}, r"data\.repeated_share=0\.1 needs data\.row_length"),
        ({"max_tokens": 0}, r"data\.max_tokens=0 must be at least 1, or null"),
        *(
            ({key: 0}, rf"data\.{key}=0 must be at least 1")
            for key in "row_length rows_per_device validation_rows copy_rows copy_passage_length".split()
        ),
    ],
)
def test_a_bad_value_is_refused_by_its_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **changes)
    assert not list(tmp_path.iterdir())  # before anything is read


@pytest.mark.parametrize(
    "trained, held_out",
    [
        ({"split": "all"}, {"split": "all"}),
        ({"split": "all"}, {"split": "validation"}),
        ({"split": "train"}, {"split": "train"}),
        ({"split": "train"}, {"split": "all"}),
        ({"split": "train", "validation_share": 0.1}, {"split": "validation", "validation_share": 0.2}),
    ],
)
def test_held_out_text_that_is_trained_on_is_refused(tmp_path, trained, held_out):
    sources = {"a": ListSource(texts=OTHER), "b": ListSource(**trained)}
    with pytest.raises(ValueError, match=r"validation_sources\.c shares documents with data\.sources\.b"):
        module(tmp_path, sources=sources, validation_sources={"c": ListSource(**held_out)})
    separate = module(tmp_path, sources=sources, validation_sources={"c": ListSource(texts=TEXTS[:30])})
    assert separate.validation_batches()  # other inputs may be taken as a whole


def test_too_little_text_is_refused_by_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"data\.row_length=100000 needs 100001 tokens"):
        module(tmp_path, row_length=100_000).train_rows()
    with pytest.raises(ValueError, match=r"lower data\.copy_passage_length"):
        module(tmp_path, copy_passage_length=5000).copy_batches()


def test_validation_and_training_share_no_document(tmp_path):
    data = module(tmp_path)
    data.prepare_data()
    train = documents(data.store(data.sources["list"]))
    held_out = documents(data.store(data.validation_sources["list"]))
    assert len(train) + len(held_out) == len(TEXTS) and not train & held_out
    # And so in what comes out: every piece of a document in a row lies in a document of its side.
    batches = data.validation_batches() + data.copy_batches()
    for batch, side, other in [(one, held_out, train) for one in batches] + [
        (one, train, held_out) for kind in data.calibration_batches(9) for one in kind
    ]:
        for piece in pieces(batch):
            assert any(contains(document, piece) for document in side)
            if len(piece) >= 24:  # shorter ones may stand in both
                assert not any(contains(document, piece) for document in other)


def pieces(batch):
    """The runs of one document in a batch, each passage of a repeated one once."""
    half = batch["input_ids"].shape[1] // 2
    for tokens, ids in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for number in ids.unique():
            piece = tokens[ids == number]
            yield piece[:half] if torch.equal(piece[:half], piece[half:]) else piece


def contains(document, piece):
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(document), min(len(piece), len(document)))
    return len(piece) <= len(document) and bool((windows == piece.numpy()).all(1).any())


def test_held_out_batches_are_the_same_for_every_seed_and_run(tmp_path):
    first, second = module(tmp_path), module(tmp_path, seed=2, repeated_share=0.5)
    assert equal(first.validation_batches(), second.validation_batches())
    assert equal(first.copy_batches(), second.copy_batches())
    assert not equal(*(one.calibration_batches(4)[0] for one in (first, second)))
    assert [len(batch["input_ids"]) for batch in first.validation_batches()] == [3, 3, 2]
    assert [len(batch["input_ids"]) for batch in first.validation_batches(rows=4)] == [3, 1]
    available = first.validation_batches(rows=10**6)  # at most one epoch
    rows = torch.cat([batch["input_ids"] for batch in available])
    assert len(rows) == (first.store(first.validation_sources["list"]).lengths.sum() - 1) // 16


def test_copy_batches_show_each_passage_twice(tmp_path):
    batches = module(tmp_path).copy_batches()
    assert [batch["input_ids"].shape for batch in batches] == [(3, 12), (1, 12)]
    for batch in batches:
        tokens, labels = batch["input_ids"], batch["labels"]
        assert tokens.dtype == labels.dtype == torch.int64 and batch["document_ids"].dtype == torch.int32
        assert torch.equal(tokens[:, :6], tokens[:, 6:])
        assert torch.equal(labels[:, :-1], tokens[:, 1:]) and (labels[:, -1] == -100).all()
        assert not batch["document_ids"].any()


def test_the_mixture_follows_the_weights(tmp_path):
    sources = {"list": ListSource(split="train", validation_share=0.3), "other": ListSource(texts=OTHER)}
    weights = {"other": 3.0}  # the other weight is 1
    data = module(tmp_path, sources=sources, weights=weights, repeated_share=0.2)
    mixed = data.train_rows()
    shares = np.bincount(mixed._pattern, minlength=4) / mixed.pattern_length
    np.testing.assert_allclose(shares, [0.2, 0.05, 0.6, 0.15], atol=0.001)
    for index in range(40):
        assert mixed.row(index).input_ids.shape == (16,)
    passages = module(tmp_path, repeated_share=1.0).train_rows()
    assert not any(passages.row(index).document_ids.any() for index in range(9))


def test_first_rows_are_repeated(tmp_path):
    rows = module(tmp_path, repeat_first_rows=2).train_rows()
    plain = module(tmp_path).train_rows()
    for index in range(6):
        np.testing.assert_array_equal(rows.row(index).input_ids, plain.row(index % 2).input_ids)


def test_the_training_loader_has_the_stages_length_and_this_ranks_rows(tmp_path):
    one = attach(module(tmp_path, rows_per_device=4), max_steps=3, accumulate=2).train_dataloader()
    assert len(one) == 6
    two = [attach(module(tmp_path, rows_per_device=2), rank, 2, 6).train_dataloader() for rank in (0, 1)]
    together = [
        {name: torch.cat([first[name], second[name]]) for name in first}
        for first, second in zip(*two, strict=True)
    ]
    assert equal(list(one), together)


class Looks(pl.LightningModule):
    """Keeps what validation gives it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def validation_step(self, batch, index):
        """Takes whole batches, not the tensors of one."""
        self.seen.append(batch)


def test_lightning_takes_validation_batches_as_they_are(tmp_path):
    data, looks = module(tmp_path), Looks()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet)
    trainer.validate(looks, data, verbose=False)
    assert equal(looks.seen, data.validation_batches(2))  # a quarter of the rows


def test_max_tokens_limits_each_source(tmp_path):
    data = module(tmp_path, max_tokens=400)
    for source, share in ((data.sources["list"], 0.7), (data.validation_sources["list"], 0.3)):
        store = data.store(source)
        assert store.ends[-2] < 400 * share <= store.ends[-1]


def test_shards_are_a_source_like_others(tmp_path):
    options = {"max_bad_share": 0.0, "max_document_bytes": 10_000}
    prepare_token_store(ListSource(), tiny_tokenizer(), tmp_path / "made", **options)
    shards = TokenShards(paths=str(tmp_path / "made"), split="train", validation_share=0.3)
    held_out = dataclasses.replace(shards, split="validation")
    changes = {"sources": {"shards": shards}, "validation_sources": {"shards": held_out}}
    data = module(tmp_path / "cache", **changes)
    data.prepare_data()
    assert not (tmp_path / "cache").exists()  # nothing is tokenised again
    stores = [data.store(one["shards"]) for one in (data.sources, data.validation_sources)]
    train, validation = map(documents, stores)
    assert len(train) + len(validation) == len(TEXTS) and not train & validation
    assert attach(data).train_rows().row(5).input_ids.shape == (16,)
    with pytest.raises(ValueError, match=r"data\.sources\.shards\.paths: .*made with tokenizer="):
        module(tmp_path / "cache", **changes, tokenizer=tiny_tokenizer(290))
    with pytest.raises(ValueError, match=r"shares documents"):
        module(tmp_path / "cache", **{**changes, "validation_sources": {"shards": shards}})
