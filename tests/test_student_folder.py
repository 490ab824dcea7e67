"""Student folders on disk: written whole or not at all, and damaged ones refused in words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exported import TOKENIZER, assert_close, exported_class, tiny, written
from safetensors.torch import load_file, save_file
from tiny import LAYERS, random_ids, student_config, tiny_teacher
from transformers import AutoTokenizer

from models.student_folder import Student, load_student, save_student
from models.whole_folder import whole_folder


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """An exported student; `save_student` writes the same files, but for the config."""
    return written(tmp_path_factory.mktemp("exports") / "student", tiny("qwen2-hybrid-radlads"))


def cut(path: Path) -> None:
    """Leaves half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, **values) -> None:
    """Sets keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def drop_tensor(path: Path) -> None:
    """Takes the head's weight out of a safetensors file."""
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, {"format": "pt"})


def reshape_tensor(path: Path) -> None:
    """Gives the last norm a wrong width."""
    save_file(load_file(path) | {"model.norm.weight": torch.ones(5)}, path, {"format": "pt"})


DAMAGES = {
    "no weights": ("model.safetensors", Path.unlink, "has no weights"),
    "half the weights": ("model.safetensors", cut, "model.safetensors is damaged or cut short"),
    "a tensor lost": ("model.safetensors", drop_tensor, "1 missing (lm_head.weight)"),
    "a wrong shape": ("model.safetensors", reshape_tensor, "1 of another shape (model.norm.weight)"),
    "half the description": ("student.json", cut, "student.json is missing or damaged"),
    "no plan": (
        "student.json",
        lambda p: change(p, layer_plan=None),
        "student.json is damaged or of another",
    ),
    "a short plan": ("student.json", lambda p: change(p, layer_plan=["rwkv7"]), "the teacher has 3 layers"),
    "unknown mixer": ("student.json", lambda p: change(p, mixers={"rwkv9": {}}), "KeyError: 'rwkv9'"),
    "unknown option": ("student.json", lambda p: change(p, mixers={"rwkv7": {"speed": 9}}), "'speed'"),
    "a list": ("student.json", lambda p: p.write_text("[]"), "holds no mapping"),
    "no config": ("config.json", Path.unlink, "config.json is missing or damaged"),
    "half the config": ("config.json", cut, "config.json is missing or damaged"),
    "unknown family": (
        "config.json",
        lambda p: change(p, parent={"model_type": "x"}),
        "config.json is missing or",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_words(damage, export, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(export, folder)
    file, harm, message = DAMAGES[damage]
    harm(folder / file)
    with pytest.raises(ValueError) as error:
        load_student(folder)
    assert (
        message in str(error.value) and str(folder) in str(error.value) and "Name another" in str(error.value)
    )


def test_a_student_with_tied_embeddings_comes_back(tmp_path):
    model = tiny_teacher("qwen2_tied").requires_grad_(True)
    config = student_config((0, 1, 2))
    student = Student(model, ["attention"] * LAYERS, config)
    save_student(tmp_path / "student", student, AutoTokenizer.from_pretrained(TOKENIZER))
    assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")
    folder = written(tmp_path / "export", load_student(tmp_path / "student"))
    ids = random_ids(1, 12)
    with torch.no_grad():
        found, info = exported_class(folder).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and found.lm_head.weight is found.model.embed_tokens.weight
        assert_close(found.eval()(ids).logits, model(ids).logits)


# --- written whole or not at all ----------------------------------------------------------------------------


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder, left_behind = tmp_path / "deep" / "folder", tmp_path / "deep" / "folder.writing"
    left_behind.mkdir(parents=True)
    (left_behind / "rest").touch()
    with whole_folder(folder) as unfinished:
        (unfinished / "first").write_text("1")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["first"]
    with pytest.raises(RuntimeError, match="full"), whole_folder(folder) as unfinished:
        (unfinished / "second").write_text("2")
        raise RuntimeError("the disk is full")
    assert [path.name for path in folder.iterdir()] == ["first"]
    with whole_folder(folder) as unfinished:
        (unfinished / "third").write_text("3")
    assert [path.name for path in folder.iterdir()] == ["third"]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
