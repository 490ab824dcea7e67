"""An exported folder is the student: alone in a process without this repository, and for our own tools."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exported import STUDENTS, TOKENIZER, assert_close, exported_class, greedy, tiny, written
from runs import REPOSITORY
from safetensors.torch import load_file, save_file
from tiny import random_ids
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

import export as script
from models.hf import TransmuteForCausalLM, check_export, export
from models.hf.card import Origin, licence_of, model_card, plan_in_words
from models.hf.export import MODELING, check_folder
from models.student import student_mixers
from models.student_folder import Student, load_model, load_student, model_folder, save_student
from models.teacher import TeacherConfig, load_teacher

STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

facts = {}
for folder in sys.argv[1:]:
    options = {"trust_remote_code": True, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        logits = model.eval()(ids).logits
        model.save_pretrained("again")
        again, info_again = AutoModelForCausalLM.from_pretrained("again", **options)
        same = torch.equal(again.eval()(ids).logits, logits)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    text = model.generate(**prompt, max_new_tokens=5, do_sample=False).tolist()
    wrong = [sorted(map(str, keys)) for found in (info, info_again) for keys in found.values()]
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("import os")["input_ids"]
    facts[folder] = {"logits": logits.tolist(), "same": same, "text": text, "wrong": sum(wrong, []),
                     "tokens": tokens, "module": type(model).__module__}
facts["modules"] = sorted(sys.modules)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Path, Student]]:
    """Every student of STUDENTS, and its export."""
    root, students = tmp_path_factory.mktemp("exports"), {name: tiny(name) for name in STUDENTS}
    return {name: (written(root / name, student), student) for name, student in students.items()}


@pytest.fixture(params=STUDENTS, scope="module")
def pair(request, exports) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The exported model, by its own file, and the student."""
    folder, student = exports[request.param]
    return exported_class(folder).from_pretrained(folder).eval(), student.model


# --- in a process without this repository -------------------------------------------------------------------


def test_a_stranger_gets_the_student(exports, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *(str(folder) for folder, _ in exports.values())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    ours = {"models", "kernels", "conf", "data", "pipeline", "callbacks", "reports"}
    assert not {name.partition(".")[0] for name in facts["modules"]} & ours
    ids = torch.arange(60).view(2, 30)
    for folder, student in exports.values():
        found = facts[str(folder)]
        assert found["module"].startswith("transformers_modules") and found["module"].endswith(MODELING)
        assert found["wrong"] == [] and found["same"]
        with torch.no_grad():
            assert_close(torch.tensor(found["logits"]), student.model(ids).logits)
        assert found["text"] == greedy(student.model, ids, 5).tolist()
        assert found["tokens"] == AutoTokenizer.from_pretrained(TOKENIZER)("import os")["input_ids"]


# --- the modeling file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(pair, side):
    exported, student = pair
    lengths, total = (9, 31, 3), 31
    ids, mask = random_ids(3, total), torch.zeros(3, total, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(total - length, None) if side == "left" else slice(length)] = 1
    logits = exported(ids, attention_mask=mask).logits
    assert_close(logits[mask.bool()], student(ids, attention_mask=mask).logits[mask.bool()])
    for row in range(3):
        real = mask[row].bool()
        assert_close(logits[row, real], exported(ids[row, real][None]).logits[0])


@torch.no_grad()
def test_token_by_token_is_the_full_forward(pair):
    exported, _ = pair
    ids, cache = random_ids(2, 20), DynamicCache(config=pair[0].config)
    steps = [exported(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(20)]
    assert_close(torch.cat(steps, 1), exported(ids).logits, 1e-4)
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_generation_in_a_padded_batch_and_by_beams(pair):
    exported, _ = pair
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[0, :7] = 0
    found = exported.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found[0, 7:].tolist() == greedy(exported, ids[:1, 7:], 8)[0].tolist()
    assert found[1].tolist() == greedy(exported, ids[1:], 8)[0].tolist()
    options = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    ids = random_ids(2, 9)
    beams = [
        exported.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cached, **options).tolist()
        for cached in (True, False)
    ]
    assert beams[0] == beams[1]


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_labels_give_the_loss_and_the_gradients_of_the_student(pair, recompute):
    exported, student = pair
    ids = random_ids(2, 21)
    labels = ids.clone()
    labels[0, :5] = -100
    if recompute:
        exported.gradient_checkpointing_enable()
    exported.train()
    loss = exported(ids, labels=labels, use_cache=False).loss
    wanted = F.cross_entropy(student(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(loss, wanted)
    names = dict(student.named_parameters())
    assert sorted(names) == sorted(dict(exported.named_parameters()))
    trained = [name for name in names if ".index." not in name]  # an index learns from attention alone
    given = torch.autograd.grad(loss, [dict(exported.named_parameters())[name] for name in trained])
    expected_gradients = torch.autograd.grad(wanted, [names[name] for name in trained])
    for found, expected in zip(given, expected_gradients, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7
    exported.eval().gradient_checkpointing_disable()


@torch.no_grad()
def test_half_precision_loads_and_stays_near(exports):
    for folder, student in exports.values():
        ids = random_ids(2, 30)
        model = exported_class(folder).from_pretrained(folder, dtype=torch.bfloat16).eval()
        assert model.lm_head.weight.dtype == torch.bfloat16
        wanted = student.model(ids).logits.log_softmax(-1)
        for found in (model(ids).logits, model.to(torch.bfloat16)(ids).logits):
            difference = wanted.exp() * (wanted - found.float().log_softmax(-1))
            assert difference.sum(-1).mean() < 0.01  # KL in nats/token


def test_tensors_that_no_checkpoint_brings_get_the_start_of_their_mixer(exports, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(exports["qwen3-first_kept-arwkv"][0], folder)
    tensors = load_file(folder / "model.safetensors")
    lost = [
        f"model.layers.2.self_attn.{name}"
        for name in ("bonus", "decay.bias", "decay.down.weight", "gate.up.weight")
    ]
    save_file(
        {k: v for k, v in tensors.items() if k not in lost}, folder / "model.safetensors", {"format": "pt"}
    )
    model, info = exported_class(folder).from_pretrained(folder, output_loading_info=True)
    assert sorted(map(str, info["missing_keys"])) == sorted(lost)
    mixer = model.model.layers[2].self_attn
    assert not mixer.bonus.any() and not mixer.decay.down.weight.any() and not mixer.gate.up.weight.any()
    assert mixer.decay.bias.min() == -6.5 and mixer.decay.bias.max() == -1.5
    assert torch.equal(mixer.decay.up.weight, tensors["model.layers.2.self_attn.decay.up.weight"])


def test_a_model_made_of_the_config_alone_is_a_student_at_its_start(exports):
    folder, _ = exports["qwen2-hybrid-radlads"]
    made = exported_class(folder)
    model = made(made.config_class.from_pretrained(folder))
    mixer = model.model.layers[0].self_attn
    assert not mixer.gate.up.weight.any() and not mixer.decay.down.weight.any()
    assert model.config.vocab_size == model.config.get_text_config().vocab_size == model.lm_head.out_features


# --- our own tools ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_our_tools_load_an_export_and_run_none_of_its_code(exports, tmp_path):
    ids = random_ids(2, 16)
    for name, (folder, student) in exports.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / f"{MODELING}.py").write_text("raise SystemExit('the code of the folder was run')")
        wanted = student.model(ids).logits
        assert torch.equal(load_model(model_folder(str(copy)))(ids).logits, wanted)
        again = load_student(copy)
        assert (again.plan, again.config.mixers) == (student.plan, _used(student))
        AutoTokenizer.from_pretrained(copy)
        teacher = load_teacher(TeacherConfig(path=str(copy), trust_remote_code=True))
        assert type(teacher) is TransmuteForCausalLM
        assert_close(teacher(ids).logits, wanted)


def _used(student: Student) -> dict:
    return {name: options for name, options in student.config.mixers.items() if name in student.plan}


def test_an_export_can_be_exported_again(exports, tmp_path):
    folder, _ = exports["qwen2-pure-arwkv"]
    again = written(tmp_path / "again", load_student(folder))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"difference": 1.1e-5}, "logits differ by 1.1e-05"),
        ({"difference": float("nan")}, "logits differ by nan"),
        ({"wrong_keys": ["lm_head.weight"]}, r"tensors do not fit: \['lm_head.weight'\]"),
        ({"token_ids": [1, 2]}, "other tokens"),
    ],
)
def test_an_export_that_is_not_the_student_is_refused(facts, message, exports, monkeypatch):
    folder, student = exports["llama-all_kept"]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    good = {"difference": 9e-6, "largest_logit": 3.0, "wrong_keys": []}
    good["token_ids"] = tokenizer(check_export.TEXT)["input_ids"]
    monkeypatch.setattr(export, "_as_a_stranger", lambda *_: good)
    assert check_folder(folder, student, tokenizer) == 9e-6
    monkeypatch.setattr(export, "_as_a_stranger", lambda *_: good | facts)
    with pytest.raises(ValueError, match=f"verify: .*{message}"):
        check_folder(folder, student, tokenizer)


# --- the model card -----------------------------------------------------------------------------------------


def test_the_card_says_where_the_model_comes_from(exports, tmp_path):
    _, student = exports["qwen2-hybrid-radlads"]
    assert licence_of(TOKENIZER) == "apache-2.0" and licence_of(tmp_path) is None and licence_of(None) is None
    origin = Origin(teacher="Qwen/Qwen2.5-7B", revision="d149729", licence="apache-2.0", results="| loss |\n")
    card = model_card(student, origin)
    for part in (
        "license: apache-2.0\n",
        "base_model: Qwen/Qwen2.5-7B\n",
        "0 rwkv7, 1 attention, 2 rwkv7",
        "| loss |",
    ):
        assert part in card
    unknown = model_card(student, Origin())
    assert "license:" not in unknown and "base_model" not in unknown and "No results were kept" in unknown
    assert plan_in_words(["a", "a", "a", "b", "a"]) == "0-2 a, 3 b, 4 a"


# --- the script ---------------------------------------------------------------------------------------------


def run_script(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """export.py to the end."""
    command = [sys.executable, "export.py", f"paths.outputs={folder}", *overrides]
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def test_the_script_exports_a_run(tmp_path):
    run, tokenizer = tmp_path / "run", AutoTokenizer.from_pretrained(TOKENIZER)
    student = tiny("qwen2-hybrid-radlads", vocab_size=len(tokenizer))
    save_student(run / "student", student, tokenizer, stage="distill")
    (run / "config.yaml").write_text("teacher:\n  path: assets/tiny_qwen2\n  revision: null\n")
    done = run_script(tmp_path / "outputs", f"run={run}")
    assert done.returncode == 0, done.stderr
    assert "largest difference of a logit: 0" in done.stdout
    assert json.loads((run / "export" / "student.json").read_text())["stage"] == "distill"
    card = (run / "export" / "README.md").read_text()
    assert "license: apache-2.0" in card and "assets/tiny_qwen2" in card
    assert torch.equal(
        student_mixers(load_model(run / "export"))[0].key.weight, student_mixers(student.model)[0].key.weight
    )
    with pytest.raises(ValueError, match="holds an export; .*overwrite=true"):
        script.check_output(run / "export", False)
    script.check_output(run / "export", True)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_student(tmp_path / "student", tiny("qwen2-hybrid-radlads"), AutoTokenizer.from_pretrained(TOKENIZER))
    done = run_script(tmp_path / "outputs", f"run={tmp_path}")
    assert done.returncode == 2 and "do not belong together" in done.stderr
    assert not (tmp_path / "export").exists()


def test_a_wrong_run_is_said_in_a_line(tmp_path):
    done = run_script(tmp_path, f"run={tmp_path}/nowhere")
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f"Error: run={tmp_path}/nowhere is neither a run folder")
    )


def test_sources_and_places_are_checked_before_anything_is_loaded(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="has no finished student; finish it with train.py ckpt_path="):
        script.student_source(tmp_path)
    for folder in (tmp_path / "student", tmp_path / "stage"):
        folder.mkdir()
        (folder / "student.json").touch()
    assert (
        script.student_source(tmp_path) == script.student_source(tmp_path / "student") == tmp_path / "student"
    )
    assert script.student_source(tmp_path / "stage") == tmp_path / "stage"
    script.check_output(tmp_path / "new", False)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and is no export"):
            script.check_output(tmp_path, overwrite)
