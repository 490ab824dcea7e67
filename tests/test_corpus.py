"""The embedded corpus, on the real standard library and on a small one made here, and the tokenizer."""

import os
import sysconfig

import pytest
from data_inputs import ListSource, tiny_tokenizer
from reader_inputs import kept, read, tolerant

from data.corpus import PythonSources


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Stands in for both roots; returns the folder of the standard library."""
    root = tmp_path / "lib"
    packages = tmp_path / "packages"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root), "purelib": str(packages)})
    for name in ("b.py", "a.py", "sub/c.py", "sub/tests/t.py", "test/x.py", "test_y.py", "sub/test_z.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "outside.py").write_text("# outside\n")
    packages.mkdir()
    (packages / "p.py").write_text("# p.py\n")
    return root


def test_the_standard_library_is_divided_without_tests(tmp_path):
    names = {}
    for split in ("train", "validation", "all"):
        documents = read(PythonSources(split=split), tolerant(tmp_path / split))
        names[split] = [origin for _, origin in documents]
        assert all(text.strip() for text, _ in documents)
    train, validation, everything = (set(names[split]) for split in ("train", "validation", "all"))
    assert not train & validation and train | validation == everything
    assert 0.01 < len(validation) / len(everything) < 0.12
    assert len(everything) == len(names["all"]) > 300
    parts = [set(name.lower().split("/")[:-1]) for name in everything]
    assert not any(folders & {"test", "tests", "idle_test", "site-packages"} for folders in parts)
    assert not any(name.rsplit("/", 1)[-1].startswith("test_") for name in everything)


def test_the_corpus_is_the_same_each_time(tmp_path):
    first, second = PythonSources(split="validation"), PythonSources(split="validation")
    assert read(first, tolerant(tmp_path / "a")) == read(second, tolerant(tmp_path / "b"))
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != PythonSources(split="train").fingerprint()


def test_files_in_order_each_one_document(tmp_path, library):
    (library / "large.py").write_text("#" * 300)
    (library / "empty.py").touch()
    os.symlink(library / "gone.py", library / "link.py")
    source = PythonSources(roots=["stdlib", "site-packages"], max_file_bytes=299)
    names = ["stdlib/a.py", "stdlib/b.py", "stdlib/sub/c.py", "site-packages/p.py"]
    assert read(source, tolerant(tmp_path)) == [(f"# {name.split('/', 1)[1]}\n", name) for name in names]


def test_a_bad_file_is_quarantined(tmp_path, library):
    (library / "a.py").write_bytes(b"# \xe9t\xe9\n")
    quarantine = tolerant(tmp_path)
    assert [origin for _, origin in read(PythonSources(), quarantine)] == ["stdlib/b.py", "stdlib/sub/c.py"]
    (record,) = kept(quarantine)
    assert (record["origin"], record["reason"]) == ("stdlib/a.py", "wrong_utf8")


def test_a_changed_file_changes_the_fingerprint(library):
    before = PythonSources().fingerprint()
    (library / "b.py").write_text("# B.py\n")  # of the same size
    assert PythonSources().fingerprint() != before


def test_wrong_roots_are_refused(library):
    with pytest.raises(ValueError, match=r"sources\.mine\.roots: 'lib' is unknown; choose from stdlib"):
        PythonSources(roots=["lib"], name="mine")
    with pytest.raises(ValueError, match=r"mine\.roots: 'stdlib' has no \.py file of at most 2"):
        PythonSources(max_file_bytes=2, name="mine").fingerprint()


def test_the_tokenizer_gives_any_text_back(tmp_path):
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 300 and tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    for text in ("def f(x):\n\treturn  x \n", " bîrne 🍐\r\n", "\x00\x7f don't , . ?", "日本語"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "never-written").exists()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    assert tiny_tokenizer.__wrapped__().get_vocab() == tokenizer.get_vocab()  # the same each time
    assert len(tiny_tokenizer(280)) == 280 and ListSource().texts
