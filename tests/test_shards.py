"""Token shards: the documents they hold, the splits, and the refusal of another tokenizer's ids."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_inputs import TEXTS, ListSource, tiny_tokenizer

import data.shards
from data.packing import PackedRows, RepeatedPassages
from data.shards import TokenShards
from data.token_store import prepare_token_store, tokenizer_fingerprint

END = 0  # the tiny tokenizer's end-of-text id


def ids_of(number):
    """A document that no other number has."""
    return [1 + number, *range(10, 10 + number % 5), END]


def write(path, numbers, dtype="uint16", tail=()):
    tokens = np.asarray([token for number in numbers for token in ids_of(number)] + list(tail), dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens) if path.suffix == ".npy" else tokens.tofile(path)
    return path


def open_shards(*paths, max_tokens=None, tokenizer=None, **options):
    source = TokenShards(paths=[str(path) for path in paths], name="mine", **options)
    return source.token_store(tokenizer or tiny_tokenizer(), max_tokens)


def documents(store):
    return [store.document(index).tolist() for index in range(len(store))]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
@pytest.mark.parametrize("block", [1, 3, 2**22])
def test_folders_globs_and_files(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(data.shards, "BLOCK_TOKENS", block)
    write(tmp_path / "a" / "0.bin", range(0, 7), dtype)
    write(tmp_path / "a" / "sub" / "1.npy", range(7, 9), dtype)
    write(tmp_path / "b.bin", [9], dtype, tail=[5, 6])
    store = open_shards(tmp_path / "a", tmp_path / "*.bin", dtype=dtype)
    assert documents(store) == [ids_of(number) for number in range(10)] + [[5, 6]]
    assert store.lengths.tolist() == [len(document) for document in documents(store)]
    assert store.document(3).dtype == dtype and isinstance(store.document(3), np.memmap)
    assert store.manifest["documents"] == len(store) == 11
    assert store.manifest["tokens"] == store.lengths.sum()
    assert store.manifest["source"]["files"] == 3


def test_more_files_than_are_held_open(tmp_path):
    count = data.shards.OPEN_FILES + 5
    for number in range(count):
        write(tmp_path / f"{number:04}.bin", [number % 250])
    store = open_shards(tmp_path)
    assert documents(store) == [ids_of(number % 250) for number in range(count)]
    assert len(pickle.dumps(store)) < 100_000
    assert documents(pickle.loads(pickle.dumps(store))) == documents(store)


def test_splits_divide_the_documents(tmp_path):
    write(tmp_path / "0.bin", range(150))
    write(tmp_path / "1.bin", range(150, 250))
    held_out = open_shards(tmp_path, split="validation", validation_share=0.2)
    trained = open_shards(tmp_path, split="train", validation_share=0.2)
    numbers = [sorted(document[0] - 1 for document in documents(store)) for store in (held_out, trained)]
    assert sorted(numbers[0] + numbers[1]) == list(range(250))
    assert 25 < len(numbers[0]) < 80
    write(tmp_path / "0a.bin", range(5))  # others that come do not move a document
    again = documents(open_shards(tmp_path, split="validation", validation_share=0.2))
    assert [document for document in documents(held_out) if document not in again] == []


def test_rows_are_made_of_shards(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.bin", range(50 * number, 50 * number + 50))
    store = open_shards(tmp_path, split="train")
    packed = PackedRows(store, 8, 1)
    seen = np.concatenate([packed.row(index).input_ids for index in range(packed.rows_per_epoch)])
    stream = np.concatenate([store.document(index) for index in range(len(store))])
    assert 1 <= len(stream) - len(seen) <= 8
    assert not (np.bincount(seen, minlength=300) > np.bincount(stream, minlength=300)).any()
    row = RepeatedPassages(store, 8, (4, 4), 1).row(3)
    assert row.input_ids[:4].tolist() == row.input_ids[4:].tolist()


def test_max_tokens_ends_with_a_whole_document(tmp_path):
    write(tmp_path / "0.bin", range(10))
    write(tmp_path / "1.bin", range(10, 20))
    everything = documents(open_shards(tmp_path))
    ends = np.cumsum([len(document) for document in everything])
    for limit in (1, int(ends[4]), int(ends[9]), int(ends[9]) + 1, 10**6):
        store = open_shards(tmp_path, max_tokens=limit)
        assert documents(store) == everything[: int(np.searchsorted(ends, limit)) + 1]
        assert store.manifest["max_tokens"] == limit


def test_our_own_store_is_accepted(tmp_path):
    made = prepare_token_store(
        ListSource(name="list"), tiny_tokenizer(), tmp_path, max_bad_share=0, max_document_bytes=9999
    )
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for path in (folder, tmp_path, folder / "tokens.bin"):
        store = open_shards(path)
        assert documents(store) == [made.document(index).tolist() for index in range(len(TEXTS))]
    with pytest.raises(ValueError, match=r"with dtype=uint16.*data\.sources\.mine\.dtype give uint32"):
        open_shards(folder, dtype="uint32")


def test_another_tokenizer_is_refused_before_a_shard_is_read(tmp_path, monkeypatch):
    write(tmp_path / "a" / "0.bin", [1])
    write(tmp_path / "b" / "0.bin", [2])
    manifest = {"tokenizer": tokenizer_fingerprint(tiny_tokenizer()), "eos_token_id": END}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert len(open_shards(tmp_path)) == 2
    monkeypatch.setattr(data.shards, "_map_file", None)
    with pytest.raises(ValueError, match=rf"mine\.paths: .*{tmp_path}/b were made with tokenizer="):
        open_shards(tmp_path, tokenizer=tiny_tokenizer(290))
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({**manifest, "eos_token_id": 2}))
    with pytest.raises(ValueError, match="made with eos_token_id=2"):
        open_shards(tmp_path)
    for content, message in (("{", "cannot be read"), ("[]", "no JSON object")):
        (tmp_path / "b" / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_shards(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
@pytest.mark.parametrize("dtype, bad", [("uint16", 300), ("uint32", 2**31), ("int32", -1)])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, monkeypatch, suffix, dtype, bad):
    monkeypatch.setattr(data.shards, "BLOCK_TOKENS", 4)
    good = write(tmp_path / f"good{suffix}", [298], dtype)  # 299 is the largest id
    assert open_shards(good, dtype=dtype).document(0)[0] == 299
    path = write(tmp_path / f"bad{suffix}", [3], dtype, tail=[7, bad, 7])
    place = len(ids_of(3)) + 1
    with pytest.raises(ValueError, match=rf"{path} has the id {bad} at token {place}, .* 300 entries"):
        open_shards(path, dtype=dtype)


def test_damaged_and_wrong_files_are_refused(tmp_path):
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"123")
    (tmp_path / "empty.bin").touch()
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.uint16))
    np.save(tmp_path / "wide.npy", np.zeros(2, np.int64))
    cut = write(tmp_path / "cut.npy", range(9))
    cut.write_bytes(cut.read_bytes()[:-3])
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=rf"{path} holds no array of data\.sources\.mine\.dtype=uint16"):
            open_shards(path)
    with pytest.raises(ValueError, match=r"mine\.dtype='int64' is unknown; choose from uint16"):
        TokenShards(paths=str(odd), dtype="int64", name="mine")
    with pytest.raises(ValueError, match=r"mine\.paths: .*names no file"):
        TokenShards(paths=str(tmp_path / "gone*"), name="mine")
    (tmp_path / "x").mkdir()
    for name in ("ends.npy", "manifest.json"):
        Path(tmp_path / "x" / name).touch()
    for paths in (tmp_path / "x", tmp_path / "x" / "*"):
        with pytest.raises(ValueError, match=r"mine\.paths=.* is no shard; name folders"):
            TokenShards(paths=str(paths), name="mine")


def test_an_empty_split_and_reading_as_text_are_refused(tmp_path):
    path = write(tmp_path / "one.bin", [1])
    with pytest.raises(ValueError, match=r"mine gives no document for split=validation; raise .*_share"):
        open_shards(path, split="validation", validation_share=1e-9)
    with pytest.raises(ValueError, match=r"data\.sources\.mine holds tokens"):
        TokenShards(paths=str(path), name="mine").documents(None)
