"""Tiny students and their exports: what the tests of student folders and exports share."""

import importlib.util
import sys
from pathlib import Path

import torch
from runs import REPOSITORY
from tiny import ARWKV, LAYERS, convert, disturb, tiny_teacher
from transformers import AutoTokenizer, PreTrainedModel

from models.config import StudentConfig
from models.hf.card import Origin, model_card
from models.hf.export import MODELING, write_export
from models.layer_plan import LayerPlan
from models.mixers import MIXERS
from models.student_folder import Student
from models.whole_folder import whole_folder

TOKENIZER = REPOSITORY / "assets" / "tiny_qwen2"
# teacher family, layers that keep attention, mixer, its options; every mixer there is takes part
STUDENTS = {
    "qwen2-hybrid-radlads": ("qwen2", (1,), "rwkv7", {}),
    "llama-pure-radlads": ("llama_biased", (), "rwkv7", {"backend": "reference"}),
    "qwen3-first_kept-arwkv": ("qwen3", (0,), "rwkv7", ARWKV),
    "qwen2-pure-arwkv": ("qwen2_tied", (), "rwkv7", ARWKV | {"gate": "full"}),
    "llama-all_kept": ("llama", (0, 1, 2), "rwkv7", {}),
    "qwen3-attention": ("qwen3", (), "attention", {"rope": False, "gate": "low"}),
    **{f"qwen3-{name}": ("qwen3", (-1,), name, {}) for name in MIXERS if name not in ("rwkv7", "attention")},
}


def tiny(name: str, **teacher_options) -> Student:
    """One of STUDENTS, away from its start, so that no part is switched off by a zero."""
    family, keep, mixer, options = STUDENTS[name]
    plan = LayerPlan(mixer=mixer, keep=keep)
    config = StudentConfig(layer_plan=plan, mixers={mixer: MIXERS[mixer].options_class(**options)})
    model, _ = convert(tiny_teacher(family, **teacher_options), config)
    disturb(model, 0.1)
    return Student(model.eval(), plan.resolve(LAYERS, list(MIXERS)), config)


def written(folder: Path, student: Student) -> Path:
    """The student, exported."""
    with whole_folder(folder) as unfinished:
        card = model_card(student, Origin())
        write_export(unfinished, student, AutoTokenizer.from_pretrained(TOKENIZER), card=card, facts={})
    return folder


def exported_class(folder: Path) -> type[PreTrainedModel]:
    """The class of the folder's own modeling file; through transformers we would get ours."""
    spec = importlib.util.spec_from_file_location(
        "exported_" + folder.name.replace("-", "_"), folder / f"{MODELING}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.TransmuteForCausalLM


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """To a share of the values' scale."""
    assert torch.isfinite(found).all()
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Argmax of the full forward, again and again."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids
