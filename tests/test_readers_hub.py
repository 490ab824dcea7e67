"""The source that reads through the `datasets` library, offline on local files."""

import gzip
import json

import pytest
from reader_inputs import FRUIT, kept, lines_of, noise, read, tolerant, write_parquet

from data.hub import HubDataset
from data.quarantine import BadDataError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and no cache outside the test's own folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def hub(path, **options):
    return HubDataset(path="json", data_files=str(path), name="web", **options)


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_reads_local_builders(tmp_path, offline, streaming):
    lines = tmp_path / "a.jsonl.gz"
    lines.write_bytes(gzip.compress(lines_of(FRUIT * 20)))
    documents = read(hub(lines, streaming=streaming), tolerant(tmp_path))
    assert documents == [(text, f"json/train({lines}):{row}") for row, text in enumerate(FRUIT * 20, 1)]
    table = write_parquet(tmp_path / "a.parquet", FRUIT * 20, "body")
    source = HubDataset(path="parquet", data_files=[str(table)], field="body", streaming=streaming)
    assert [text for text, _ in read(source, tolerant(tmp_path))] == FRUIT * 20


def test_hub_reads_a_local_folder(tmp_path, offline):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines_of(FRUIT))
    (folder / "test.jsonl").write_bytes(lines_of(["test"]))
    source = HubDataset(path=str(folder), dataset_split="test")
    assert read(source, tolerant(tmp_path)) == [("test", f"{folder}/test:1")]
    before = source.fingerprint()
    (folder / "test.jsonl").write_bytes(lines_of(["tess"]))
    assert source.fingerprint() != before


def test_hub_limit_splits_and_bad_rows(tmp_path, offline):
    path = tmp_path / "a.jsonl"
    rows = [f"document {index}" for index in range(100)]
    rows[3], rows[4] = None, " "
    path.write_bytes(lines_of(rows))
    quarantine = tolerant(tmp_path)
    assert len(read(hub(path, max_documents=10), quarantine)) == 8
    origins = [(record["origin"][-2:], record["reason"]) for record in kept(quarantine)]
    assert origins == [(":4", "missing_field"), (":5", "empty")]
    both = [
        {text for text, _ in read(hub(path, split=split, validation_share=0.3), tolerant(tmp_path))}
        for split in ("train", "validation")
    ]
    assert all(both) and not both[0] & both[1] and len(both[0] | both[1]) == 98


def test_hub_stops_where_the_library_cannot_read_on(tmp_path, offline):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(noise(30_000), 1)[:-1000])
    with pytest.raises(BadDataError, match=r"data\.sources\.web\.path.*JsonLines"):
        read(hub(path), tolerant(tmp_path))


@pytest.mark.parametrize(
    "options, key",
    [
        ({"path": "json"}, "data_files"),
        ({"path": "json", "data_files": "nowhere/*.jsonl"}, "data_files"),
        ({"path": "json", "data_files": {"train": "a"}}, "data_files"),
        ({"path": "owner/name", "max_documents": 0}, "max_documents"),
    ],
)
def test_hub_refuses_bad_options(options, key):
    with pytest.raises(ValueError, match=rf"data\.sources\.web\.{key}"):
        HubDataset(**options, name="web")


def test_hub_errors_name_the_key(tmp_path, offline):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(FRUIT))
    for source, key in [
        (hub(path, field="body"), "field='body' is not in json.*'text'"),
        (hub(path, dataset_split="test"), "path='json'.*dataset_split=test.*test"),
        (HubDataset(path="nobody/nothing", name="web"), "path='nobody/nothing'.*cannot be opened"),
    ]:
        with pytest.raises(ValueError, match=rf"data\.sources\.web\.{key}"):
            read(source, tolerant(tmp_path))


def test_hub_fingerprint(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(FRUIT))
    before = json.dumps(hub(path).fingerprint())
    assert json.dumps(hub(path, max_documents=5).fingerprint()) != before
    path.write_bytes(lines_of(FRUIT[::-1]))
    assert json.dumps(hub(path).fingerprint()) != before
    pinned = HubDataset(path="owner/name", revision="abc").fingerprint()
    assert pinned["revision"] == "abc" and "files" not in pinned
