"""The teacher cache: what is written is read, a killed writer goes on, and a wrong cache is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_inputs import TEXTS, ListSource
from test_datamodule import attach, equal, module

from data import teacher_cache_writer
from data.loader import collate
from data.packing import Row
from data.teacher_cache import CHECKSUMS, MANIFEST, TeacherCache, check_cache, flat, part_folder, row_checksum
from data.teacher_cache_writer import TeacherCacheWriter

TOP_K, VOCABULARY, PER_PART = 3, 300, 4


def inputs(data, **changes) -> dict:
    """What the caches of these tests are made from."""
    own = {"top_k": TOP_K, "rows_per_part": PER_PART, "vocabulary": VOCABULARY, "teacher": {"weights": "abc"}}
    return {**own, "temperature": 1.0, "data": data.row_inputs(), **changes}


def targets(rows: list[Row]) -> dict[str, np.ndarray]:
    """A teacher whose word depends on the tokens of a row."""
    ids = np.stack([row.input_ids for row in rows])[..., None]
    logs = -np.log1p(ids + np.arange(TOP_K))
    return {
        "teacher_ids": (ids + np.arange(TOP_K)) % VOCABULARY,
        "teacher_logs": logs,
        "teacher_tail": logs.sum(-1),
        CHECKSUMS: np.asarray([row_checksum(row) for row in rows]),
    }


def write(data, folder: Path, rows: int, stop_after: int | None = None, **changes) -> TeacherCacheWriter:
    """Writes what is missing; with `stop_after` it is killed within the part after so many."""
    writer = TeacherCacheWriter(folder, inputs(data, **changes), rows, {})
    source, missing = data.train_rows(), writer.begin()
    for count, number in enumerate(missing):
        if count == stop_after:
            unfinished = part_folder(folder, number).with_name(f".writing-part-{number:05d}")
            unfinished.mkdir()
            (unfinished / "teacher_ids.npy").write_bytes(b"half of it")
            return writer
        writer.write(number, targets([source.row(index) for index in writer.rows_of(number)]))
    writer.finish()
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_batch_brings_what_was_written_on_its_rows(tmp_path):
    data, folder = module(tmp_path / "tokens"), tmp_path / "cache"
    write(data, folder, rows=10)
    data.teach_from(str(folder))
    plain = list(attach(module(tmp_path / "tokens"), max_steps=3).train_dataloader())
    taught = list(attach(data, max_steps=3).train_dataloader())
    assert equal(plain, [{name: batch[name] for name in plain[0]} for batch in taught])
    for batch in taught:
        rows = [Row(*(batch[name][i].numpy() for name in Row._fields)) for i in range(3)]
        wanted = targets(rows)
        assert torch.equal(batch["teacher_ids"], torch.from_numpy(wanted["teacher_ids"]).int())
        assert torch.equal(batch["teacher_logs"], torch.from_numpy(wanted["teacher_logs"]).half())
        assert torch.equal(batch["teacher_tail"], torch.from_numpy(wanted["teacher_tail"]).float())
        assert batch["teacher_ids"].shape == (3, 16, TOP_K)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_brings_the_same_targets(tmp_path, workers):
    def loader(rank=0, world_size=1):
        data = module(tmp_path / "tokens", workers=workers)
        data.teach_from(str(tmp_path / "cache"))
        return attach(data, rank, world_size, max_steps=6 // world_size).train_dataloader()

    write(module(tmp_path / "tokens"), tmp_path / "cache", rows=18)
    whole = list(loader())
    resumed = loader()
    resumed.load_state_dict({"rows_consumed": 9})
    assert equal(list(resumed), whole[3:])
    ranks = [list(loader(rank, 2)) for rank in (0, 1)]
    assert equal([batch for pair in zip(*ranks, strict=True) for batch in pair], whole)


def test_a_killed_writer_goes_on_and_leaves_the_same_files(tmp_path):
    data = module(tmp_path / "tokens")
    write(data, tmp_path / "whole", rows=10)
    folder = tmp_path / "killed"
    write(data, folder, rows=10, stop_after=1)
    before = os.stat(part_folder(folder, 0) / "teacher_ids.npy").st_mtime_ns
    with pytest.raises(ValueError, match="is not complete; run stages"):
        check_cache(folder, inputs(data), 10)
    with pytest.raises(ValueError, match="not complete"):
        data.teach_from(str(folder))
    write(data, folder, rows=10)
    assert os.stat(part_folder(folder, 0) / "teacher_ids.npy").st_mtime_ns == before, "it began anew"
    assert contents(folder) == contents(tmp_path / "whole")
    check_cache(folder, inputs(data), 10)


def test_a_failure_within_a_file_leaves_no_part(tmp_path, monkeypatch):
    data, folder = module(tmp_path / "tokens"), tmp_path / "cache"
    data.prepare_data()

    def fails(file, array):
        file.write(b"x" * 10)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache_writer.np, "save", fails)
        with pytest.raises(OSError, match="No space"):
            write(data, folder, rows=10)
    assert not list(folder.glob("part-*"))
    write(data, folder, rows=10)
    check_cache(folder, inputs(data), 10)


def test_a_cache_grows_and_never_shrinks(tmp_path):
    data, folder = module(tmp_path / "tokens"), tmp_path / "cache"
    write(data, tmp_path / "long", rows=10)
    write(data, folder, rows=5)  # its second part is short
    with pytest.raises(ValueError, match="holds 5 rows, the stage needs 10"):
        check_cache(folder, inputs(data), 10)
    write(data, folder, rows=10)
    assert contents(folder) == contents(tmp_path / "long")
    write(data, folder, rows=5)
    assert contents(folder) == contents(tmp_path / "long")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 2}, r"data\.seed \(1 there, 2 here\)"),
        ({"row_length": 17}, r"data\.row_length \(16 there, 17 here\)"),
        ({"sources": {"list": ListSource(texts=TEXTS[:50], split="train", validation_share=0.3)}}, "sha256"),
        ({"sources": {"other": ListSource(split="train", validation_share=0.3)}}, r"data\.sources\.list"),
        ({"repeated_share": 0.5}, r"data\.repeated_share"),
        ({"cross_documents": True}, r"data\.cross_documents"),
        ({"max_tokens": 500}, r"data\.max_tokens"),
    ],
)
def test_other_rows_are_refused_by_what_differs(tmp_path, changes, named):
    write(module(tmp_path / "tokens"), tmp_path / "cache", rows=5)
    other = module(tmp_path / "tokens", **changes)
    with pytest.raises(ValueError, match=f"objective.teacher_cache=.*made from something else: .*{named}"):
        check_cache(tmp_path / "cache", inputs(other), 5)
    with pytest.raises(ValueError, match=f"stage.cache_teacher.folder=.*{named}"):
        TeacherCacheWriter(tmp_path / "cache", inputs(other), 5, {}).begin()


@pytest.mark.parametrize("key", ["teacher", "temperature", "top_k", "rows_per_part", "vocabulary"])
def test_another_teacher_or_cut_is_refused(tmp_path, key):
    data = module(tmp_path / "tokens")
    write(data, tmp_path / "cache", rows=5)
    value = {"weights": "def"} if key == "teacher" else 7
    with pytest.raises(ValueError, match=f"made from something else: {key}"):
        check_cache(tmp_path / "cache", inputs(data, **{key: value}), 5)


def test_rows_that_changed_unseen_are_refused_when_they_come(tmp_path):
    """Whatever a fingerprint overlooks, the row itself is compared."""
    data, folder = module(tmp_path / "tokens"), tmp_path / "cache"
    write(data, folder, rows=8)
    cache, row = TeacherCache(folder), data.train_rows().row(5)
    assert cache.taught(5, row).teacher_ids.shape == (16, TOP_K)
    for name in Row._fields:
        changed = row._replace(**{name: np.roll(getattr(row, name), 1) + 1})
        with pytest.raises(ValueError, match="row 5 holds other tokens than the model saw"):
            cache.taught(5, changed)
    with pytest.raises(ValueError, match="ends after 8 rows"):
        cache.taught(8, row)


def damage_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["teacher_ids", "teacher_logs", "teacher_tail", CHECKSUMS])
def test_one_flipped_bit_is_found_and_mended_by_writing_again(tmp_path, name):
    data, folder = module(tmp_path / "tokens"), tmp_path / "cache"
    write(data, folder, rows=8)
    before = contents(folder)
    damage_byte(part_folder(folder, 1) / f"{name}.npy")
    cache, rows = TeacherCache(folder), data.train_rows()
    cache.taught(3, rows.row(3))
    with pytest.raises(
        ValueError, match="part 1 is damaged .*checksum differs.*; delete .*part-00001, and run"
    ):
        cache.taught(4, rows.row(4))
    shutil.rmtree(part_folder(folder, 1))
    with pytest.raises(ValueError, match="of part 1 is missing or cut"):
        check_cache(folder, inputs(data), 8)
    write(data, folder, rows=8)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "holds no such cache; write one"),
        ("{", "cannot be used"),
        ('{"format": 0}', "format 0, not 1"),
        ('{"format": 1}', "keys are missing"),
    ],
)
def test_a_missing_or_broken_manifest_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=f"objective.teacher_cache=.*{words}"):
        check_cache(tmp_path, {}, 1)


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    data, folder = module(tmp_path / "tokens"), tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("mine")
    with pytest.raises(ValueError, match="stage.cache_teacher.folder=.*holds files of something else"):
        write(data, folder, rows=5)
    assert (folder / "chapter.txt").read_text() == "mine"


def test_the_first_rows_again_and_again_need_no_more_than_them(tmp_path):
    data = module(tmp_path / "tokens", repeat_first_rows=3)
    write(data, tmp_path / "cache", rows=3)
    data.teach_from(str(tmp_path / "cache"))
    rows = data.train_rows()
    assert equal([collate([rows.row(1)])], [collate([rows.row(100 * 3 + 1)])])


def test_large_vocabularies_keep_their_ids(tmp_path):
    data = module(tmp_path / "tokens")
    writer = TeacherCacheWriter(tmp_path / "cache", inputs(data, vocabulary=152_064), 2, {})
    writer.begin()
    rows = [data.train_rows().row(index) for index in range(2)]
    writer.write(0, {**targets(rows), "teacher_ids": np.full((2, 16, TOP_K), 152_063)})
    writer.finish()
    assert (TeacherCache(tmp_path / "cache").taught(1, rows[1]).teacher_ids == 152_063).all()


def test_flat_joins_keys_and_keeps_lists_as_json_does():
    nested = {"a": {"b": 1, "c": {}}, "d": (1, 2)}
    assert flat(nested) == flat(json.loads(json.dumps(nested))) == {"a.b": 1, "a.c": {}, "d": [1, 2]}
