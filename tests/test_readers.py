"""Document sources made of files: formats, refusals, splits and fingerprints."""

import gzip
import io
import json
import os

import pytest
import zstandard
from hydra.utils import instantiate
from omegaconf import OmegaConf
from reader_inputs import FRUIT, kept, lines_of, noise, read, tolerant, write_parquet

from data.documents import in_split
from data.files import read_lines
from data.parquet import Parquet
from data.text import JsonLines, TextFiles


def frames(data, size=50):
    """A zstd stream of several frames, the first of them skippable, as parallel compressors write."""
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return skippable + b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


def test_text_files_folder_glob_and_file(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    for name, text in {"b.txt": FRUIT[0], "sub/a.md": FRUIT[1], "sub/c.py": FRUIT[2], "d.rst": "rst"}.items():
        (root / name).write_bytes(text.encode())
    (root / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (root / ".git" / "x.txt").write_text("hidden")
    folder = read(TextFiles(paths=str(root)), tolerant(tmp_path))
    assert folder == [
        (FRUIT[0], f"{root}/b.txt"),
        ("marked", f"{root}/marked.txt"),
        (FRUIT[1], f"{root}/sub/a.md"),
        (FRUIT[2], f"{root}/sub/c.py"),
    ]
    assert read(TextFiles(paths=f"{root}/*.rst"), tolerant(tmp_path)) == [("rst", f"{root}/d.rst")]
    overlapping = TextFiles(paths=[f"{root}/sub/c.py", f"{root}/**/*.py", root], suffixes=[".py", ".rst"])
    origins = [origin for _, origin in read(overlapping, tolerant(tmp_path))]
    assert origins == [f"{root}/sub/c.py", f"{root}/d.rst"]  # each file once, at its first naming


@pytest.mark.parametrize(
    "suffix, pack",
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress), (".zst", frames)],
    ids=["plain", "gz", "zst", "zst-frames"],
)
def test_compression(tmp_path, suffix, pack):
    lines = tmp_path / f"fruit.jsonl{suffix}"
    lines.write_bytes(pack(b"\xef\xbb\xbf" + lines_of(FRUIT[:2]) + b"\r\n \n" + lines_of(FRUIT[2:]).rstrip()))
    quarantine = tolerant(tmp_path)
    documents = read(JsonLines(paths=str(lines)), quarantine)
    assert documents == [(FRUIT[0], f"{lines}:1"), (FRUIT[1], f"{lines}:2"), (FRUIT[2], f"{lines}:5")]
    assert quarantine.summary()["good"] == 3 and not quarantine.path.exists()
    text = tmp_path / f"fruit.txt{suffix}"
    text.write_bytes(pack(FRUIT[1].encode()))
    assert read(TextFiles(paths=str(text)), quarantine) == [(FRUIT[1], str(text))]


def test_streamed_zstd_without_content_size(tmp_path):
    path, data = tmp_path / "a.jsonl.zst", noise(2000)
    with zstandard.ZstdCompressor().stream_writer(path.open("wb")) as writer:
        writer.write(data)
    assert b"".join(line + b"\n" for line, _ in read_lines(str(path), 10_000)) == data


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_row_groups(tmp_path, kind):
    import pyarrow

    values = pyarrow.array(FRUIT * 200)
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(getattr(pyarrow, kind)())
    path = write_parquet(tmp_path / "fruit.parquet", values, "body", row_group_size=7)
    documents = read(Parquet(paths=str(tmp_path), column="body"), tolerant(tmp_path))
    assert documents == [(text, f"{path}:{row}") for row, text in enumerate(FRUIT * 200, 1)]


@pytest.mark.parametrize("kind", [TextFiles, JsonLines, Parquet])
@pytest.mark.parametrize("missing", ["nowhere", "*.none", "", "folder"])
def test_paths_that_name_nothing_are_refused(tmp_path, kind, missing):
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / missing) if missing else ""
    with pytest.raises(ValueError, match=r"data\.sources\.books\.paths"):
        kind(paths=[path], name="books")


@pytest.mark.parametrize(
    "options, key",
    [
        ({"split": "test"}, "split"),
        ({"validation_share": 1.0}, "validation_share"),
        ({"split": "validation", "validation_share": 0}, "validation_share"),
        ({"suffixes": []}, "suffixes"),
        ({"paths": 3}, "paths"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, key):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=rf"data\.sources\.books\.{key}"):
        TextFiles(**{"paths": str(tmp_path), "name": "books", **options})


def test_parquet_column_is_checked(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1, 2], "number")
    for column, message in [("text", "is not in .*'number'"), ("number", "holds int64")]:
        with pytest.raises(ValueError, match=rf"data\.sources\.books\.column='{column}'.*{message}"):
            read(Parquet(paths=str(tmp_path), column=column, name="books"), tolerant(tmp_path))


def test_hydra_builds_sources_and_refuses_typos(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(FRUIT))
    config = OmegaConf.create({"_target_": "data.text.JsonLines", "paths": [str(tmp_path)], "split": "all"})
    source = instantiate(config)
    assert len(read(source, tolerant(tmp_path))) == 3
    assert json.dumps(source.fingerprint()) == json.dumps(JsonLines(paths=str(tmp_path)).fingerprint())
    with pytest.raises(Exception, match="fields"):
        instantiate(config, fields="text")


def test_split_rule_is_pinned():
    """The rule names the documents held out; changing it would leak validation text into training."""
    held_out = [name for name in map(str, range(100)) if in_split(name, "validation", 0.1)]
    assert held_out == ["18", "29", "47", "55", "66", "71", "72", "90", "99"]
    share = sum(in_split(f"file-{index}", "validation", 0.05) for index in range(20_000)) / 20_000
    assert abs(share - 0.05) < 0.006


def make_files(kind, root):
    root.mkdir(parents=True)
    if kind is TextFiles:
        for index in range(60):
            (root / f"{index}.txt").write_text(f"document {index}")
    for part in range(2):
        texts = [f"document {part} {index}" for index in range(60)]
        if kind is JsonLines:
            (root / f"{part}.jsonl").write_bytes(lines_of(texts))
        if kind is Parquet:
            write_parquet(root / f"{part}.parquet", texts)


@pytest.mark.parametrize("kind", [TextFiles, JsonLines, Parquet])
def test_split_is_disjoint_stable_and_survives_a_move(tmp_path, kind):
    make_files(kind, tmp_path / "here")
    make_files(kind, tmp_path / "there" / "moved")

    def texts(folder, split):
        source = kind(paths=str(tmp_path / folder), split=split, validation_share=0.3)
        documents = read(source, tolerant(tmp_path))
        assert documents == read(source, tolerant(tmp_path))
        return [text for text, _ in documents]

    train, validation, everything = (texts("here", split) for split in ("train", "validation", "all"))
    assert train and validation and not set(train) & set(validation)
    assert sorted(train + validation) == sorted(everything)
    assert texts("there/moved", "validation") == validation
    make_files(kind, tmp_path / "here" / "more")  # newcomers move no one
    assert set(validation) <= set(texts("here", "validation"))


def test_bad_line_belongs_to_one_split(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n" * 50)
    counts = []
    for split in ("train", "validation"):
        quarantine = tolerant(tmp_path / split)
        read(JsonLines(paths=str(path), split=split, validation_share=0.5), quarantine)
        counts.append(len(kept(quarantine)))
    assert sum(counts) == 50 and min(counts) > 10


@pytest.mark.parametrize("kind", [TextFiles, JsonLines, Parquet])
def test_fingerprint_changes_with_files_and_options(tmp_path, kind):
    make_files(kind, tmp_path / "root")
    changed = sorted((tmp_path / "root").iterdir())[0]

    def fingerprint(**options):
        return json.dumps(kind(paths=str(tmp_path / "root"), **options).fingerprint())

    before = fingerprint()
    assert (
        before == fingerprint() == fingerprint(validation_share=0.5, name="other")
    )  # neither matters to `all`
    assert len({before, fingerprint(split="train"), fingerprint(split="train", validation_share=0.5)}) == 3
    if kind is not TextFiles:
        assert fingerprint(**{"field" if kind is JsonLines else "column": "body"}) != before
    status = changed.stat()
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    os.utime(
        changed, ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # same size, same time: the content decides
    after = fingerprint()
    changed.rename(changed.with_stem("renamed"))
    assert len({before, after, fingerprint()}) == 3


def test_fingerprint_of_a_large_file_follows_its_ends_and_time(tmp_path):
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(20 * 2**20)
    source = TextFiles(paths=str(path))
    seen = [source.fingerprint()["sha256"]]
    os.utime(path, ns=(1, 1))
    seen.append(source.fingerprint()["sha256"])
    with path.open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    seen.append(source.fingerprint()["sha256"])
    assert len(set(seen)) == 3
