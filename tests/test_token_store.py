"""The token cache: written once, whole or not at all, never met by other inputs."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from data_inputs import TEXTS, ListSource, tiny_tokenizer

from data.documents import Document
from data.quarantine import BadDataError
from data.token_store import open_token_store, prepare_token_store, tokenizer_fingerprint

PROCESSES = multiprocessing.get_context("fork")
OPTIONS = {"max_bad_share": 0.5, "max_document_bytes": 10_000}


def prepare(folder, source=None, tokenizer=None, **options):
    source, tokenizer = source or ListSource(name="list"), tokenizer or tiny_tokenizer()
    return prepare_token_store(source, tokenizer, folder, **{**OPTIONS, **options})


def stores(folder):
    """The finished and the unfinished stores of a cache; locks and quarantines are neither."""
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix not in (".lock", ".bad"))


def texts_of(store):
    tokenizer = tiny_tokenizer()
    documents = [store.document(index) for index in range(len(store))]
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    assert [len(document) for document in documents] == store.lengths.tolist()
    return [tokenizer.decode(document[:-1]) for document in documents]


@dataclass(frozen=True, kw_only=True)
class SlowSource(ListSource):
    """Says that it is being read after so many documents, and then waits."""

    reached: str
    after: int = 100 * 64
    seconds: float = 60

    def documents(self, quarantine) -> Iterator[Document]:
        """Endlessly the same documents."""
        for number, _ in enumerate(iter(int, 1)):
            if number == self.after:
                Path(self.reached).touch()
                time.sleep(self.seconds)
                return
            yield Document(TEXTS[number % len(TEXTS)], str(number))


class FailingSource(ListSource):
    """Fails in the middle."""

    def documents(self, quarantine) -> Iterator[Document]:
        """Some documents, then an error."""
        yield from list(super().documents(quarantine))[:5]
        raise OSError("the disk is gone")


def test_a_store_holds_every_document(tmp_path):
    store = prepare(tmp_path)
    assert texts_of(store) == list(TEXTS)
    assert store.tokens.dtype == np.uint16 and store.ends[-1] == len(store.tokens)
    assert isinstance(store.tokens, np.memmap) and not store.tokens.flags.writeable
    whole = texts_of(prepare(tmp_path, ListSource(split="train"))) + texts_of(
        prepare(tmp_path, ListSource(split="validation"))
    )
    assert sorted(whole) == sorted(TEXTS)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.add_tokens([f"<{number}>" for number in range(2**16)])
    store = prepare(tmp_path, ListSource(texts=("a<65535>",)), tokenizer)
    assert store.tokens.dtype == np.uint32 and store.tokens[-2] == len(tokenizer) - 1


def test_the_manifest_names_the_inputs(tmp_path):
    source, tokenizer = ListSource(name="list", split="train"), tiny_tokenizer()
    store = prepare(tmp_path, source)
    (name,) = stores(tmp_path)
    assert name.startswith("list-train-")
    manifest = json.loads((tmp_path / name / "manifest.json").read_text())
    assert manifest == store.manifest
    assert manifest["source"] == source.fingerprint()
    assert manifest["tokenizer"] == tokenizer_fingerprint(tokenizer)
    assert manifest["documents"] == len(store) and manifest["tokens"] == len(store.tokens)
    assert manifest["eos_token_id"] == tokenizer.eos_token_id and manifest["dtype"] == "uint16"
    assert manifest["quarantine"]["good"] == len(store) and manifest["quarantine"]["bad"] == {}


def test_the_same_inputs_are_read_once_and_others_get_another_folder(tmp_path):
    reads = tmp_path / "reads"
    prepare(tmp_path / "cache", ListSource(reads=str(reads)))
    prepare(tmp_path / "cache", ListSource(reads=str(reads)))
    assert reads.read_text() == "read\n"
    changes = [
        {"source": ListSource(texts=(*TEXTS[:-1], "changed"))},
        {"source": ListSource(split="train")},
        {"source": ListSource(split="train", validation_share=0.1)},
        {"tokenizer": tiny_tokenizer(290)},
        {"max_bad_share": 0.4},
        {"max_document_bytes": 9_999},
        {"max_tokens": 100},
    ]
    for count, change in enumerate(changes, 2):
        prepare(tmp_path / "cache", **change)
        assert len(stores(tmp_path / "cache")) == count, change


def test_the_fingerprint_is_that_of_the_tokenizer_and_not_of_its_last_call():
    tokenizer = tiny_tokenizer.__wrapped__()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding=True)
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer.backend_tokenizer.truncation is not None  # it is left as it was found
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_two_processes_that_race_write_once(tmp_path):
    tiny_tokenizer()
    reads, start = tmp_path / "reads", PROCESSES.Barrier(2)

    def work():
        start.wait(30)
        prepare(tmp_path / "cache", ListSource(reads=str(reads)))

    workers = [PROCESSES.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert reads.read_text() == "read\n" and len(stores(tmp_path / "cache")) == 1
    assert texts_of(prepare(tmp_path / "cache")) == list(TEXTS)


def test_a_second_process_waits_for_the_first(tmp_path):
    source = SlowSource(reached=str(tmp_path / "reached"), seconds=0.5, after=10)
    first = PROCESSES.Process(target=prepare, args=(tmp_path / "cache", source))
    first.start()
    wait_for(tmp_path / "reached")
    (tmp_path / "reached").unlink()
    assert len(prepare(tmp_path / "cache", source)) == 10
    assert not (tmp_path / "reached").exists()  # the second did not read
    first.join(60)
    assert first.exitcode == 0


def test_a_killed_write_leaves_nothing_that_could_be_taken_for_a_store(tmp_path):
    source = SlowSource(reached=str(tmp_path / "reached"))
    writer = PROCESSES.Process(target=prepare, args=(tmp_path / "cache", source))
    writer.start()
    wait_for(tmp_path / "reached")
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    (half,) = stores(tmp_path / "cache")
    assert half.startswith(".writing-") and (tmp_path / "cache" / half / "tokens.bin").stat().st_size > 0
    with pytest.raises(ValueError, match="no token store"):
        open_token_store(tmp_path / "cache" / half)
    store = prepare(tmp_path / "cache", SlowSource(reached=str(tmp_path / "reached"), seconds=0))
    assert len(store) == source.after
    (whole,) = stores(tmp_path / "cache")  # the half one is gone
    assert not whole.startswith(".")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="the disk is gone"):
        prepare(tmp_path, FailingSource())
    assert stores(tmp_path) == []


def wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def cut_inside_a_token(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def half_of_the_json(path):
    path.write_text(path.read_text()[:40])


def other_ends(path):
    np.save(path, np.load(path) - 1)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("tokens.bin", cut),
        ("tokens.bin", cut_inside_a_token),
        ("tokens.bin", empty),
        ("tokens.bin", Path.unlink),
        ("ends.npy", cut),
        ("ends.npy", empty),
        ("ends.npy", other_ends),
        ("ends.npy", Path.unlink),
        ("manifest.json", half_of_the_json),
    ],
)
def test_a_damaged_store_is_refused(tmp_path, name, damage):
    prepare(tmp_path)
    (store,) = stores(tmp_path)
    damage(tmp_path / store / name)
    with pytest.raises(ValueError, match=rf"{store}.*delete the folder"):
        prepare(tmp_path)


def test_bad_documents_are_counted_and_kept(tmp_path):
    source = ListSource(texts=("one", b"\xff", "", "two", "x" * 20_000), name="list.with.dots")
    store = prepare(tmp_path, source, max_bad_share=0.6)
    assert texts_of(store) == ["one", "two"]
    counts = store.manifest["quarantine"]
    assert counts["good"] == 2 and counts["bad"] == {"wrong_utf8": 1, "empty": 1, "enormous": 1}
    (name,) = stores(tmp_path)
    records = [json.loads(line) for line in Path(counts["file"]).read_text().splitlines()]
    assert Path(counts["file"]).parent == tmp_path / f"{name}.bad"
    assert [record["origin"] for record in records] == ["list:1", "list:2", "list:4"]


def test_too_many_bad_documents_stop_the_run_and_leave_no_store(tmp_path):
    source = ListSource(texts=("one", b"\xff", ""))
    for _ in range(2):  # the second attempt's quarantine holds nothing of the first's
        with pytest.raises(BadDataError, match=r"2 of 3 documents"):
            prepare(tmp_path, source)
        (kept,) = tmp_path.glob("*.bad/quarantine.jsonl")
        assert len(kept.read_text().splitlines()) == 2
        assert stores(tmp_path) == []


def test_max_tokens_ends_with_a_whole_document_and_divides_by_split(tmp_path):
    whole = prepare(tmp_path, ListSource(split="train", validation_share=0.25))
    for limit in (1, 500, 501, 10**9):
        store = prepare(tmp_path, ListSource(split="train", validation_share=0.25), max_tokens=limit)
        wanted = min(int(np.searchsorted(whole.ends, 0.75 * limit)) + 1, len(whole))
        assert len(store) == wanted and store.manifest["max_tokens"] == limit
        np.testing.assert_array_equal(store.tokens, whole.tokens[: whole.ends[wanted - 1]])
    held_out = prepare(tmp_path, ListSource(split="validation", validation_share=0.25), max_tokens=500)
    assert held_out.ends[-2] < 125 <= held_out.ends[-1]
    assert "max_tokens" not in whole.manifest


def test_what_cannot_be_tokenised_is_refused(tmp_path):
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"teacher\.tokenizer has no end-of-text token"):
        prepare(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"data\.sources\.none gives no document for split=all"):
        prepare(tmp_path, ListSource(texts=(), name="none"))
    assert stores(tmp_path) == []
    with pytest.raises(ValueError, match="no token store"):
        open_token_store(tmp_path)
