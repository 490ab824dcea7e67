"""Builds a student from a teacher: mixers where attention was, with the weights that they inherit."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.architectures import (
    Architecture,
    architecture_of,
    attention_modules,
    check_family,
    decoder_layers,
    keep_score_caps,
    replace_attention,
)
from models.backbone import provide_context
from models.config import StudentConfig
from models.expansion import check_expansion, expand, inserted_rows, number_layers, silence
from models.layer_plan import from_file, is_inserted, mixer_name, teacher_numbers, teacher_part
from models.mixers import MIXERS, AttentionShape, Mixer
from models.student import student_mixers, teacher_places
from models.transfer import TransferRow, draw, fill, transfer_table

log = logging.getLogger(__name__)


def attention_shape(attention: nn.Module, architecture: Architecture) -> AttentionShape:
    """Reads head counts, biases, norms and positions from an attention module.

    Raises:
        ValueError: where a projection is missing.
    """
    names = [architecture.query, architecture.key, architecture.value]
    if architecture.fused:
        names = [architecture.fused] * 3
    for name in (*names, architecture.output):
        if getattr(attention, name, None) is None:
            raise ValueError(
                f"teacher: {type(attention).__name__} has no {name!r}; "
                "correct its entry in ARCHITECTURES in models/architectures.py."
            )
    query, key, value = (getattr(attention, name) for name in names)
    output, size = getattr(attention, architecture.output), attention.head_dim
    heads, kv_heads = output.in_features // size, key.out_features // size
    if architecture.fused:
        kv_heads = (kv_heads - heads) // 2
    norm = getattr(attention, architecture.query_norm) if architecture.query_norm else None
    return AttentionShape(
        hidden_size=query.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        query_bias=query.bias is not None,
        key_bias=key.bias is not None,
        value_bias=value.bias is not None,
        output_bias=output.bias is not None,
        query_norm=architecture.query_norm is not None,
        key_norm=architecture.key_norm is not None,
        norm_eps=1e-6 if norm is None else _epsilon(norm),
        norm_scope=architecture.norm_scope,
        norm_offset=architecture.norm_offset,
        read_scale=attention.scaling,
        rotated=architecture.rotates is None or bool(getattr(attention, architecture.rotates)),
        rotation=architecture.rotation,
        window=getattr(
            attention if architecture.masks_by_layer_type else attention.config, "sliding_window", None
        ),
        score_cap=getattr(attention, "attn_logit_softcapping", None),
    )


def _epsilon(norm: nn.Module) -> float:
    """Of an RMSNorm of transformers, which has two names for it."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def build_student(
    teacher: PreTrainedModel, config: StudentConfig, plan: list[str]
) -> tuple[PreTrainedModel, list[TransferRow]]:
    """Makes a trainable float32 student of a teacher, which stays as it is.

    Args:
        teacher: the pretrained model.
        config: mixer options and start.
        plan: resolved, one entry per decoder layer of the student.

    Returns:
        The student, on the teacher's device, and a row for every teacher tensor and every new one. What it
        computes, and what it draws at random, does not depend on inserted layers.

    Raises:
        ValueError: for an unknown family, a head size that a mixer does not support, or inserted layers that
            cannot be.
    """
    check_family(teacher.config)
    check_expansion(config, plan, teacher.config.model_type)
    student = copy.deepcopy(teacher).float()
    if config.start == "random":
        student = AutoModelForCausalLM.from_config(
            copy.deepcopy(teacher.config), attn_implementation=teacher.config._attn_implementation
        ).float()
    _restore_scales(student.to(teacher.device))
    untied = _untie(student)
    expand(student, plan)
    mixed = config.replaced(plan)
    for inserted in (False, True):  # so that inserted ones draw nothing before the others have
        places = [place for place in mixed if is_inserted(plan[place]) == inserted]
        _put_mixers(student, config, plan, places)
        _start_mixers(student, teacher, config, plan, places)
    _finish(student, plan)
    rows = transfer_table(teacher, student, config, untied) + inserted_rows(teacher, student, config)
    return student.requires_grad_(True).train(), rows


def _start_mixers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: StudentConfig,
    plan: list[str],
    places: list[int],
) -> None:
    """Gives new mixers what `config.start` says; an inserted one gets it from the layer before, and is
    silent."""
    architecture, numbers = architecture_of(teacher.config.model_type), teacher_numbers(plan)
    for place in places:
        mixer = attention_modules(student)[place]
        if config.start == "transfer":
            attention = dict(attention_modules(teacher)[numbers[place]].named_parameters())
            fill(mixer, attention, architecture)
        else:
            draw(mixer, getattr(student.config, "initializer_range", 0.02))
        if is_inserted(plan[place]):
            silence(decoder_layers(student)[place], architecture)


def check_plan(config: StudentConfig, hf_config: PretrainedConfig) -> list[str]:
    """The layer plan for a teacher of which only the config is known.

    Raises:
        ValueError: for an unknown family, a plan that does not fit its layers, a head size that a mixer
            lacks, or inserted layers that cannot be.
    """
    check_family(hf_config)
    layer_count = hf_config.num_hidden_layers
    plan = from_file(config.layer_plan, layer_count).resolve(layer_count, list(MIXERS))
    check_expansion(config, plan, hf_config.model_type)
    size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    for name in sorted({mixer_name(plan[place]) for place in config.replaced(plan)}):
        MIXERS[name].check_head_size(size)
    return plan


def install_mixers(model: PreTrainedModel, config: StudentConfig, plan: list[str]) -> None:
    """Replaces attention modules by new mixers as the plan says, and lets the model make its own context.

    Args:
        model: has a layer with attention for every entry of the plan, inserted ones among them.
        config: mixer options.
        plan: resolved.
    """
    _put_mixers(model, config, plan, config.replaced(plan))
    _finish(model, plan)


def _put_mixers(model: PreTrainedModel, config: StudentConfig, plan: list[str], places: list[int]) -> None:
    """Puts new mixers into some layers, those at the given places of the plan. A mixer starts according to
    the teacher's number of its layer, and finds its part of a cache by its place."""
    names, numbers = list(map(mixer_name, plan)), teacher_numbers(plan)
    depth = len(teacher_part(plan))
    for place in places:
        mixer = _new_mixer(
            attention_modules(model)[place],
            model,
            names[place],
            config.entry_options(plan[place]),
            layer_index=numbers[place],
            layer_count=depth,
            first=place == names.index(names[place]),
        )
        mixer.layer_index = place
        replace_attention(model, {place: mixer})


def _finish(model: PreTrainedModel, plan: list[str]) -> None:
    """Makes a model that has its mixers a student."""
    for layer, entry in zip(decoder_layers(model), plan, strict=True):
        layer.inserted = is_inserted(entry)
    keep_score_caps(model)
    provide_context(model.base_model)


def _new_mixer(attention: nn.Module, model: PreTrainedModel, name: str, options: Any, **place: Any) -> Mixer:
    """A mixer for one of a model's attention modules, on the model's device; `place` is layer_index,
    layer_count and first of the mixer's class, by the teacher's numbers."""
    device = next(model.parameters()).device
    # Mixers are drawn on the CPU, wherever the model is; a model without weights gets them without.
    with torch.device("meta" if device.type == "meta" else "cpu"):
        shape = attention_shape(attention, architecture_of(model.config.model_type))
        mixer = MIXERS[name](shape, options, **place)
    return mixer.to(device)


def restore_attention(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: list[int],
    *,
    trainable: bool,
    config: StudentConfig | None = None,
) -> dict[int, nn.Module]:
    """Gives layers of the student the teacher's attention back.

    Args:
        student, teacher: over the same architecture.
        layers: numbers of the teacher's.
        trainable: whether the student gets its own float32 copy, for good; otherwise it borrows the teacher's
            module, until `replace_attention` puts the mixers back.
        config: the student's; with it, a copy is what its config has for kept layers.

    Returns:
        The modules that stood there before, by their places in the student.
    """
    places = teacher_places(student)
    if not trainable:
        return replace_attention(student, {places[n]: attention_modules(teacher)[n] for n in layers})
    copies = {places[number]: kept_module(teacher, number, config) for number in layers}
    before = replace_attention(student, {i: module.requires_grad_(True) for i, module in copies.items()})
    number_layers(student)
    firsts = {type(mixer): mixer for mixer in reversed(student_mixers(student).values())}
    for mixer in firsts.values():  # those before it may have gone
        mixer.become_first()
    return before


def kept_module(
    teacher: PreTrainedModel,
    index: int,
    config: StudentConfig | None,
    attention: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """What stands in a kept layer: a float32 copy of the teacher's attention, or a mixer filled from it.

    Args:
        teacher: the pretrained model.
        index: of the layer.
        config: the student's, whose `layer_plan.kept` and options count; None is plain attention.
        attention: the tensors of the teacher's attention by name, whole, where the module has parts of them.
    """
    module = attention_modules(teacher)[index]
    if config is None or not config.is_mixer(config.layer_plan.kept):
        return copy.deepcopy(module).float()
    name, depth = config.layer_plan.kept, len(decoder_layers(teacher))
    options = config.options(name)
    mixer = _new_mixer(module, teacher, name, options, layer_index=index, layer_count=depth, first=False)
    fill(mixer, attention or dict(module.named_parameters()), architecture_of(teacher.config.model_type))
    return mixer


def _restore_scales(model: PreTrainedModel) -> None:
    """Sets the factors of scaled embeddings as the config has them: a teacher in 16 bits has rounded them,
    and a student that is loaded again has not."""
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale.fill_(module.scalar_embed_scale)


def _untie(model: PreTrainedModel) -> bool:
    """Gives a model with tied embeddings a head of its own; whether there was anything to do."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return False
    with torch.no_grad():
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True
