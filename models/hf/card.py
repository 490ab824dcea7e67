"""The model card of an exported student."""

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import transformers

from models.layer_plan import ATTENTION, INSERTED, is_inserted, mixer_name, teacher_numbers, teacher_part
from models.student import count_parameters
from models.student_folder import Student, used_mixers

LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a student comes from.

    Args:
        teacher: name of the converted model, a Hub id or a folder's; None where it is unknown.
        revision: its commit or tag on the Hub.
        licence: the teacher's, as its own card tells it; None where that is unknown.
        results: Markdown table of the run's results, "" where there is none.
        state_bytes: decoding memory of one row, or None where it was not measured.
    """

    teacher: str | None = None
    revision: str | None = None
    licence: str | None = None
    results: str = ""
    state_bytes: int | None = None


def licence_of(folder: Path | None) -> str | None:
    """The licence that a model folder's own card names in its head, or None."""
    card = folder / "README.md" if folder is not None else None
    if card is None or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---")
    found = LICENCE.search(parts[1]) if len(parts) > 2 else None
    return found[1] if found else None


def model_card(student: Student, origin: Origin) -> str:
    """README.md of an export."""
    results = "No results were kept beside this student.\n"
    if origin.results:
        results = f"On held-out text, losses in nats/token; the last stage is this model.\n\n{origin.results}"
    sections = [
        _head(origin),
        _what_it_is(student, origin),
        _how_to_use(),
        f"## Results\n\n{results}",
        _licence(origin),
        _limits(student),
    ]
    return "\n".join(sections)


def plan_in_words(plan: list[str]) -> str:
    """`0-2 rwkv7, + sparse, 3 attention`: neighbouring layers that are alike share an entry; an inserted one
    has a `+` for a number."""
    words = []
    for entry, group in groupby(zip(plan, teacher_numbers(plan), strict=True), key=lambda pair: pair[0]):
        numbers = [number for _, number in group]
        span = f"{numbers[0]}{f'-{numbers[-1]}' if len(numbers) > 1 else ''}"
        words.append(f"{INSERTED * len(numbers) if is_inserted(entry) else span} {mixer_name(entry)}")
    return ", ".join(words)


def _head(origin: Origin) -> str:
    """The card's YAML head; a Hub model is linked as the base."""
    lines = ["---", *([f"license: {origin.licence}"] if origin.licence else [])]
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    if origin.teacher and origin.revision and HUB_ID.fullmatch(origin.teacher):
        lines.append(f"base_model: {origin.teacher}")
    return "\n".join([*lines, "tags: [transmute, rwkv, custom_code]", "---", ""])


def _what_it_is(student: Student, origin: Origin) -> str:
    parent = student.model.config
    name = Path(origin.teacher).name if origin.teacher else parent.model_type
    revision = f", revision {origin.revision}" if origin.revision else ""
    rows = {
        "converted from": f"{origin.teacher}{revision}" if origin.teacher else "unknown",
        "architecture": f"{parent.model_type}, {_layers(student.plan)} of width {parent.hidden_size}",
        "layer plan": plan_in_words(student.plan),
        "mixers": "; ".join(_options_in_words(n, o) for n, o in used_mixers(student).items()) or "none",
        "parameters": f"{count_parameters(student.model):,}, float32, safetensors",
    }
    if origin.state_bytes is not None:
        rows["decoding memory"] = f"{origin.state_bytes:,} bytes per row, at the length of a training row"
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return (
        f"# {name}, converted by Transmute\n\n"
        "A Transformer language model with mixers in the place of softmax attention, in the layers that the "
        "plan names.\n\n| | |\n|---|---|\n" + table
    )


def _layers(plan: list[str]) -> str:
    inserted = len(plan) - len(teacher_part(plan))
    return f"{len(plan)} layers{f', {inserted} of them inserted,' if inserted else ''}"


def _options_in_words(name: str, options: dict[str, object]) -> str:
    said = ", ".join(f"{key}={value}" for key, value in options.items() if key != "backend")
    return f"{name} ({said})" if said else name


def _how_to_use() -> str:
    return f"""## Load and generate

The code of the model is `modeling_transmute.py` in this folder, so it has to be trusted: read it first.
It needs torch and transformers; it was made with torch {torch.__version__} and transformers
{transformers.__version__}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["def area(radius):", "import os"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40)))
```

`dtype=torch.bfloat16` loads it in 16 bits; states stay float32. `model(input_ids=ids, labels=ids).loss` is
the loss for fine-tuning. Transmute loads the folder with its own code: `python eval.py model=<folder>`.
"""


def _licence(origin: Origin) -> str:
    if origin.licence:
        said = f"The card of {origin.teacher} names the licence {origin.licence}."
    elif origin.teacher:
        said = f"The licence of {origin.teacher} is not known here; look it up before you publish this model."
    else:
        said = "What this model was converted from is not known here."
    return f"""## Licence

The weights come from the teacher's: its licence goes on to hold for them. {said}
`modeling_transmute.py` is under Apache-2.0, as Transmute is.
"""


def _limits(student: Student) -> str:
    limits = [
        "A row is one text. Padding is read from `attention_mask`, on either side; packed documents are not.",
        "Operators run in plain torch here. Transmute's own kernels are faster, above all in training.",
        "Attention weights can be returned for the layers that kept attention only.",
        "The state is a summary of the text: no cache can be cropped, so assisted decoding does not work.",
        "`attn_implementation` may be sdpa or eager.",
    ]
    if ATTENTION in map(mixer_name, student.plan):
        limits.append("The layers that kept attention have keys and values, which grow with the text.")
    return "## Limits\n\n" + "".join(f"- {limit}\n" for limit in limits)
