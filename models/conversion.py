"""Builds a student from a teacher, moves the weights, and accounts for every tensor."""

import copy
import logging
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.architectures import (
    Architecture,
    architecture_of,
    attention_modules,
    decoder_layers,
    replace_attention,
)
from models.backbone import provide_context
from models.config import StudentConfig
from models.layer_plan import ATTENTION
from models.mixers import MIXERS, AttentionShape, Mixer
from models.student import student_mixers

log = logging.getLogger(__name__)
# Mixer part -> field of Architecture that names the teacher's part.
INHERITED = {
    "receptance": "query",
    "key": "key",
    "value": "value",
    "output": "output",
    "receptance_norm": "query_norm",
    "key_norm": "key_norm",
}


class TransferRow(NamedTuple):
    """What became of one tensor: source in the teacher ("" for a new one), target in the student ("" if
    dropped)."""

    source: str
    target: str
    action: str
    shape: str


def attention_shape(attention: nn.Module, architecture: Architecture) -> AttentionShape:
    """Reads head counts, biases and norms from an attention module.

    Raises:
        ValueError: where a projection is missing.
    """
    parts = {}
    for name in ("query", "key", "value", "output"):
        parts[name] = getattr(attention, getattr(architecture, name), None)
        if parts[name] is None:
            raise ValueError(
                f"teacher: {type(attention).__name__} has no {getattr(architecture, name)!r}; "
                "correct its entry in ARCHITECTURES in models/architectures.py."
            )
    size = attention.head_dim
    norm = getattr(attention, architecture.query_norm) if architecture.query_norm else None
    return AttentionShape(
        hidden_size=parts["query"].in_features,
        heads=parts["query"].out_features // size,
        kv_heads=parts["key"].out_features // size,
        head_size=size,
        query_bias=parts["query"].bias is not None,
        key_bias=parts["key"].bias is not None,
        value_bias=parts["value"].bias is not None,
        output_bias=parts["output"].bias is not None,
        query_norm=architecture.query_norm is not None,
        key_norm=architecture.key_norm is not None,
        norm_eps=getattr(norm, "variance_epsilon", 1e-6),
    )


def build_student(
    teacher: PreTrainedModel, config: StudentConfig, plan: list[str]
) -> tuple[PreTrainedModel, list[TransferRow]]:
    """Makes a trainable float32 student of a teacher, which stays as it is.

    Args:
        teacher: the pretrained model.
        config: mixer options and start.
        plan: one name per decoder layer.

    Returns:
        The student, on the teacher's device, and a row for every teacher tensor and every new one.

    Raises:
        ValueError: for an unknown family or a head size that a mixer does not support.
    """
    student = copy.deepcopy(teacher).float()
    if config.start == "random":
        student = AutoModelForCausalLM.from_config(
            copy.deepcopy(teacher.config), attn_implementation=teacher.config._attn_implementation
        ).float()
    student.to(teacher.device)
    untied = _untie(student)
    install_mixers(student, config, plan)
    inherit = config.start == "transfer"
    for index, mixer in ((i, m) for i, m in attention_modules(student).items() if isinstance(m, Mixer)):
        _fill(mixer, attention_modules(teacher)[index], architecture_of(teacher.config.model_type), inherit)
    return student.requires_grad_(True).train(), transfer_table(teacher, student, config, untied)


def check_plan(config: StudentConfig, hf_config: PretrainedConfig) -> list[str]:
    """The layer plan for a teacher of which only the config is known.

    Raises:
        ValueError: for an unknown family, a plan that does not fit its layers, or a head size that a mixer
            lacks.
    """
    architecture_of(hf_config.model_type)
    plan = config.layer_plan.resolve(hf_config.num_hidden_layers, list(MIXERS))
    size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    for name in sorted(set(plan) - {ATTENTION}):
        if size not in MIXERS[name].head_sizes:
            raise ValueError(
                f"student.layer_plan: {name} needs a head size in {MIXERS[name].head_sizes}; the teacher "
                f"has {size}. "
                "Keep attention in its layers."
            )
    return plan


def install_mixers(model: PreTrainedModel, config: StudentConfig, plan: list[str]) -> None:
    """Replaces attention modules by new mixers as the plan says, and lets the model make its own context."""
    architecture = architecture_of(model.config.model_type)
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    replaced = [index for index, name in enumerate(plan) if name != ATTENTION]
    for index in replaced:
        # Mixers are drawn on the CPU, wherever the model is; a model without weights gets them without.
        with torch.device("meta" if device.type == "meta" else "cpu"):
            mixer = MIXERS[plan[index]](
                attention_shape(attention_modules(model)[index], architecture),
                config.options(plan[index]),
                layer_index=index,
                layer_count=len(layers),
                first=index == replaced[0],
            )
        replace_attention(model, {index: mixer.to(device)})
    provide_context(model.base_model)


def restore_attention(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: list[int], *, trainable: bool
) -> dict[int, nn.Module]:
    """Gives layers of the student the teacher's attention back.

    Args:
        student, teacher: over the same architecture.
        layers: indices.
        trainable: whether the student gets its own float32 copy, for good; otherwise it borrows the teacher's
            module, until `replace_attention` puts the mixers back.

    Returns:
        The modules that stood there before.
    """
    modules = {index: attention_modules(teacher)[index] for index in layers}
    if trainable:
        modules = {
            index: copy.deepcopy(module).float().requires_grad_(True) for index, module in modules.items()
        }
    before = replace_attention(student, modules)
    if trainable:  # for good: another mixer may now be the first
        for mixer in list(student_mixers(student).values())[:1]:
            mixer.become_first()
    return before


def transfer_table(
    teacher: PreTrainedModel, student: PreTrainedModel, config: StudentConfig, untied: bool = False
) -> list[TransferRow]:
    """One row for every tensor of the teacher, and for every tensor that only the student has."""
    architecture = architecture_of(teacher.config.model_type)
    names = {}
    for index, mixer in ((i, m) for i, m in attention_modules(student).items() if isinstance(m, Mixer)):
        prefix = attention_prefix(teacher, index)
        for target, source in INHERITED.items():
            if getattr(architecture, source) and getattr(mixer, target, None) is not None:
                names[f"{prefix}.{getattr(architecture, source)}."] = f"{prefix}.{target}."
    new = dict(student.named_parameters())
    rows = []
    for source, tensor in teacher.named_parameters(remove_duplicate=False):
        prefix = next((p for p in names if source.startswith(p)), None)
        target = source if prefix is None else names[prefix] + source.removeprefix(prefix)
        if new.pop(target, None) is None:
            rows.append(TransferRow(source, "", "dropped", str(list(tensor.shape))))
            continue
        inherited = config.start == "transfer" or (config.start == "random_mixers" and prefix is None)
        action = ("kept" if prefix is None else "moved") if inherited else "random"
        if untied and tensor is teacher.get_output_embeddings().weight:
            action += ", untied"
        rows.append(TransferRow(source, target, action, str(list(tensor.shape))))
    rows += [TransferRow("", name, "new", str(list(tensor.shape))) for name, tensor in new.items()]
    return rows


def attention_prefix(model: PreTrainedModel, index: int) -> str:
    """The name, within the model, of what stands in a layer where the teacher has its attention."""
    module = attention_modules(model)[index]
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _fill(mixer: Mixer, attention: nn.Module, architecture: Architecture, inherit: bool) -> None:
    """Copies the attention's projections and norms into the mixer, or draws projections at random."""
    for target, source in INHERITED.items():
        part = getattr(mixer, target, None)
        if part is None or getattr(architecture, source) is None:
            continue
        if inherit:
            part.load_state_dict(getattr(attention, getattr(architecture, source)).state_dict())
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _untie(model: PreTrainedModel) -> bool:
    """Gives a model with tied embeddings a head of its own; whether there was anything to do."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return False
    with torch.no_grad():
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True
