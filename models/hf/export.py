"""Writes a student as a Hugging Face folder that needs nothing of this repository, and checks it."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from models.hf import check_export
from models.hf.bundle import bundle
from models.hf.modeling import TransmuteConfig, TransmuteForCausalLM
from models.parallelize import full_tensors
from models.student import student_mixers
from models.student_folder import Student, used_mixers, write_student

MODELING = "modeling_transmute"
LARGEST_DIFFERENCE = 1e-5  # of a logit, in float32


def write_export(
    folder: Path,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    *,
    card: str,
    facts: dict[str, Any],
) -> None:
    """Writes config, weights, tokenizer, modeling file and model card into an empty folder.

    Args:
        folder: exists.
        student: on the CPU.
        tokenizer: its own.
        card: text of README.md.
        facts: plain data kept in `student.json` beside plan and options.
    """
    write_student(folder, student, full_tensors(student.model), tokenizer, facts)
    (folder / "config.json").write_text(export_config(student).to_json_string(use_diff=False))
    (folder / f"{MODELING}.py").write_text(bundle(used_mixers(student)))
    (folder / "README.md").write_text(card)


def export_config(student: Student) -> TransmuteConfig:
    """The config of an exported student; mixers choose the backend of their operator themselves there."""
    mixers = {
        name: options | ({"backend": "auto"} if "backend" in options else {})
        for name, options in used_mixers(student).items()
    }
    auto_map = {
        "AutoConfig": f"{MODELING}.{TransmuteConfig.__name__}",
        "AutoModelForCausalLM": f"{MODELING}.{TransmuteForCausalLM.__name__}",
    }
    return TransmuteConfig(
        parent=student.model.config.to_dict(),
        layer_plan=list(student.plan),
        mixers=mixers,
        architectures=[TransmuteForCausalLM.__name__],
        auto_map=auto_map,
        dtype="float32",
    )


def check_folder(folder: Path, student: Student, tokenizer: PreTrainedTokenizerBase) -> float:
    """Loads an exported folder in a fresh process without this repository, and compares it with its student.

    Args:
        folder: what `write_export` wrote.
        student: the same; its operators are left on the backend that the export has.
        tokenizer: the same.

    Returns:
        The largest absolute difference of a logit, over a forward of left-padded rows and a decoding of them.

    Raises:
        ValueError: where the folder does not load, or gives other logits or tokens.
    """
    _use_portable_backends(student)
    prompt = check_export.inputs(student.model.config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.safetensors"
        save_file(prompt | check_export.outputs(student.model.eval(), **prompt), reference)
        facts = _as_a_stranger(folder.resolve(), reference, scratch)
    wrong = []
    if not facts["difference"] <= LARGEST_DIFFERENCE:  # NaN included
        wrong.append(
            f"logits differ by {facts['difference']:.3g} (the largest is {facts['largest_logit']:.3g})"
        )
    if facts["wrong_keys"]:
        wrong.append(f"tensors do not fit: {facts['wrong_keys'][:3]}")
    if facts["token_ids"] != tokenizer(check_export.TEXT)["input_ids"]:
        wrong.append("the tokenizer gives other tokens")
    if wrong:
        raise ValueError(
            f"verify: the exported model is not the student: {'; '.join(wrong)}; nothing was written. It is "
            "a fault of the export, unless the student's weights are not finite."
        )
    return facts["difference"]


def _as_a_stranger(folder: Path, reference: Path, scratch: str) -> dict[str, Any]:
    """Runs check_export.py in an empty folder; nothing of ours, no network and no cache of other code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
    done = subprocess.run(
        [sys.executable, "-I", check_export.__file__, str(folder), str(reference)],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"verify: the export does not load in a fresh process; nothing was written.\n{done.stderr}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _use_portable_backends(student: Student) -> None:
    """Puts the mixers on the backend that exported ones use, so that only the export is compared."""
    for mixer in student_mixers(student.model).values():
        if hasattr(mixer.options, "backend"):
            mixer.options = dataclasses.replace(mixer.options, backend="chunked")
