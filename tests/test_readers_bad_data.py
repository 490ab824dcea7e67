"""Bad documents of every kind: counted, kept with their origin, and too many of them stop the run."""

import base64
import gzip
import random
import tracemalloc

import pytest
import zstandard
from reader_inputs import FRUIT, kept, lines_of, noise, read, tolerant, write_parquet

from data.files import read_lines
from data.parquet import Parquet
from data.quarantine import BadDataError, Quarantine
from data.text import JsonLines, TextFiles

BAD_LINES = {
    "broken_json": b'{"text": "x"',
    "broken_json deep": b"[" * 100_000,
    "broken_json digits": b'{"text": ' + b"9" * 5000 + b"}",
    "wrong_utf8": b'{"text": "\xff\xfe"}',
    "wrong_utf8 surrogate": b'{"text": "\\ud800"}',
    "missing_field": b'{"body": "x"}',
    "missing_field null": b'{"text": null}',
    "missing_field list": b'["text"]',
    "empty": b'{"text": " \\n\\u0000"}',
    "enormous": b'{"text": "' + b"long " * 40_000 + b'"}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_kept_with_its_origin(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(FRUIT) + BAD_LINES[kind] + b"\n" + lines_of(FRUIT))
    quarantine = tolerant(tmp_path, max_document_bytes=150_000)
    documents = read(JsonLines(paths=str(path)), quarantine)
    quarantine.finish()
    assert [text for text, _ in documents] == FRUIT * 2
    assert [origin for _, origin in documents] == [f"{path}:{line}" for line in (1, 2, 3, 5, 6, 7)]
    (record,) = kept(quarantine)
    reason = kind.split()[0]
    assert (record["origin"], record["reason"]) == (f"{path}:4", reason)
    excerpt = record.get("excerpt", "").encode() or base64.b64decode(record.get("excerpt_base64", ""))
    if kind not in ("wrong_utf8 surrogate", "empty"):  # for these the text itself is kept, not its line
        assert excerpt == BAD_LINES[kind][:2000] and record["bytes"] == len(BAD_LINES[kind])
    summary = quarantine.summary()
    assert summary["good"] == 6 and summary["bad"] == {reason: 1} and summary["file"] == str(quarantine.path)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_too_many_bad_lines_stop(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    good, bad = lines_of(FRUIT[:1]), BAD_LINES[kind] + b"\n"
    path.write_bytes(good * 90 + bad * 3 + good * 900)
    quarantine = Quarantine(tmp_path, max_bad_share=0.02, min_documents=100, max_document_bytes=150_000)
    seen = []
    with pytest.raises(BadDataError, match=r"3 of 100 documents .*data\.max_bad_share=0\.02") as caught:
        seen.extend(JsonLines(paths=str(path)).documents(quarantine))
    assert len(seen) == 96  # judged at the hundredth document, not at the third bad one
    assert str(quarantine.path) in str(caught.value) and f"{path}:91" in str(caught.value)
    assert len(kept(quarantine)) == 3


def test_few_documents_are_judged_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(FRUIT) + b"{\n")
    quarantine = Quarantine(tmp_path, max_bad_share=0.2)
    assert len(read(JsonLines(paths=str(path)), quarantine)) == 3
    with pytest.raises(BadDataError, match="1 of 4 documents"):
        quarantine.finish()
    exact = Quarantine(tmp_path / "exact", max_bad_share=0.25)
    read(JsonLines(paths=str(path)), exact)
    exact.finish()  # at the share is not above it


def test_enormous_line_is_never_held_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + lines_of(FRUIT))
    quarantine = tolerant(tmp_path, max_document_bytes=2**20)
    tracemalloc.start()
    documents = read(JsonLines(paths=str(path)), quarantine)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [origin for _, origin in documents] == [f"{path}:{line}" for line in (2, 3, 4)]
    (record,) = kept(quarantine)
    assert record["bytes"] == 64 * 2**20 + 12 and len(record["excerpt"]) == 2000
    assert peak < 8 * 2**20


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("size", [9, 10, 11, 12, 13])
def test_line_limit_is_exact(tmp_path, size, end):
    path = tmp_path / "a"
    path.write_bytes(b"x" * size + end + (b"next" if end else b""))
    first, *rest = read_lines(str(path), 10)
    if size <= 10:
        assert first == (b"x" * size, size)
    else:  # of a line above the limit, only that it is above
        assert first[1] > 10 and first[0].rstrip() in (b"x" * size, b"x" * 12)
    assert rest == ([(b"next", 4)] if end else [])


@pytest.mark.parametrize("damage", ["cut", "flipped", "no archive", "no byte"])
@pytest.mark.parametrize(
    "suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)]
)
def test_broken_archive(tmp_path, suffix, pack, damage):
    whole = pack(noise(2000))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    broken = {
        "cut": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "no archive": b"plain text",
        "no byte": b"",
    }
    (tmp_path / f"a.jsonl{suffix}").write_bytes(broken[damage])
    (tmp_path / "b.jsonl").write_bytes(lines_of(FRUIT))
    quarantine = tolerant(tmp_path)
    origins = [origin for _, origin in read(JsonLines(paths=str(tmp_path)), quarantine)]
    assert origins[-3:] == [f"{tmp_path}/b.jsonl:{line}" for line in (1, 2, 3)]  # the next file is read
    (record,) = [record for record in kept(quarantine) if record["reason"] == "broken_archive"]
    if damage == "cut":
        assert 500 < len(origins) < 1500
        assert record["origin"] == f"{tmp_path}/a.jsonl{suffix}:{len(origins) - 3 + 1}"
    elif damage != "flipped":
        assert record["origin"] == f"{tmp_path}/a.jsonl{suffix}:1" and len(origins) == 3
    assert record["detail"]


def test_bad_text_files(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    contents = {
        "empty.txt": b"",
        "enormous.txt": b"x" * 1001,
        "fits.txt": b"x" * 1000,
        "latin.txt": "é".encode("latin-1"),
        "z.txt.gz": gzip.compress(random.Random(0).randbytes(900))[:500],
    }
    for name, data in contents.items():
        (root / name).write_bytes(data)
    quarantine = tolerant(tmp_path, max_document_bytes=1000)
    documents = read(TextFiles(paths=str(root), suffixes=[".txt", ".txt.gz"]), quarantine)
    assert documents == [("x" * 1000, f"{root}/fits.txt")]
    reasons = {record["origin"]: record["reason"] for record in kept(quarantine)}
    expected = {"empty": "empty", "enormous": "enormous", "latin": "wrong_utf8"}
    assert reasons == {f"{root}/{name}.txt": reason for name, reason in expected.items()} | {
        f"{root}/z.txt.gz": "broken_archive"
    }


def test_bad_parquet_rows_and_files(tmp_path):
    import pyarrow

    values = pyarrow.array([b"good", None, b"\xff", b"", b"x" * 2000, b"last"], pyarrow.binary())
    path = write_parquet(tmp_path / "a.parquet", values)
    whole = write_parquet(tmp_path / "b.parquet", ["text"] * 50).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    quarantine = tolerant(tmp_path, max_document_bytes=1000)
    documents = read(Parquet(paths=str(tmp_path)), quarantine)
    assert documents == [("good", f"{path}:1"), ("last", f"{path}:6")]
    assert [(record["origin"], record["reason"]) for record in kept(quarantine)] == [
        (f"{path}:2", "missing_field"),
        (f"{path}:3", "wrong_utf8"),
        (f"{path}:4", "empty"),
        (f"{path}:5", "enormous"),
        (f"{tmp_path}/b.parquet:1", "broken_archive"),
    ]


@pytest.mark.parametrize("options", [{"max_bad_share": 1.1}, {"min_documents": 0}, {"max_document_bytes": 0}])
def test_quarantine_refuses_bad_options(tmp_path, options):
    with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
        Quarantine(tmp_path, **options)
