"""Block expansion: decoder layers between those of the teacher that compute nothing at first.

An inserted layer is a copy of the layer before it, whose mixer and feed-forward layer end in projections that
are 0. It hands on what it gets, bit for bit, until these have learned something; everything else in it starts
from a useful place (RWKV-X, arXiv 2504.21463).
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from models.architectures import Architecture, architecture_of, attention_modules, decoder_layers
from models.config import StudentConfig
from models.layer_plan import is_inserted, mixer_name, teacher_numbers
from models.mixers.base import Mixer
from models.student import inserted_layers, teacher_places
from models.transfer import TransferRow, module_name, origins

PER_LAYER = ("layer_types", "no_rope_layers")  # fields of a Hugging Face config that list the layers


def check_expansion(config: StudentConfig, plan: Sequence[str], model_type: str) -> None:
    """Refuses inserted layers that would not be silent at first.

    Args:
        config: the student's.
        plan: resolved.
        model_type: of the teacher.

    Raises:
        ValueError: for a family whose feed-forward output is unknown, or an inserted mixer whose values the
            layers after it would mix in.
    """
    if not any(map(is_inserted, plan)):
        return
    if not architecture_of(model_type).feed_forward_output:
        raise ValueError(
            f"student.layer_plan: layers cannot be inserted into {model_type!r}, whose feed-forward layers "
            "have no output projection that is known; leave expansion and entries with + out, or give its "
            "entry in ARCHITECTURES (models/architectures.py) a feed_forward_output."
        )
    for name in sorted({mixer_name(entry) for entry in plan}):
        first = next(entry for entry in plan if mixer_name(entry) == name)
        shares = config.is_mixer(name) and getattr(config.options(name), "value_residual", False)
        if shares and is_inserted(first) and name in plan:
            raise ValueError(
                f"student.layer_plan: the first {name} layer is an inserted one, and student.mixers.{name}."
                "value_residual mixes its values into the others: the student would not start as it does "
                f"without it. Insert another mixer, have a {name} layer before it, or set value_residual="
                "false."
            )


def expand(model: PreTrainedModel, plan: Sequence[str]) -> None:
    """Inserts silent layers into a plain Transformer, in place, and makes its config say so.

    Args:
        model: has the teacher's layers, with its attention.
        plan: resolved; only which entries are inserted counts here.
    """
    if not any(map(is_inserted, plan)):
        return
    architecture, layers = architecture_of(model.config.model_type), decoder_layers(model)
    numbers, shared = teacher_numbers(plan), {id(model.config): model.config}
    blocks = []
    for entry, number in zip(plan, numbers, strict=True):
        block = layers[number]
        if is_inserted(entry):
            block = copy.deepcopy(block, dict(shared))
            silence(block, architecture)
        blocks.append(block)
    model.base_model.set_submodule(architecture.layers, nn.ModuleList(blocks))
    expand_config(model.config, numbers)
    number_layers(model)


@torch.no_grad()
def silence(layer: nn.Module, architecture: Architecture) -> None:
    """Sets to 0 what a decoder layer's attention, or mixer, and its feed-forward layer end in."""
    for name in silent_tensors(layer, architecture):
        layer.get_parameter(name).zero_()


def silent_tensors(layer: nn.Module, architecture: Architecture) -> list[str]:
    """Names, within a decoder layer, of the tensors that `silence` sets to 0."""
    mixing = getattr(layer, architecture.attention)
    output = "output" if isinstance(mixing, Mixer) else architecture.output
    ends = (f"{architecture.attention}.{output}", *architecture.feed_forward_output)
    return [
        name
        for name, _ in layer.named_parameters()
        if any(name == end or name.startswith(f"{end}.") for end in ends)
    ]


def expand_config(config: PretrainedConfig, numbers: Sequence[int]) -> None:
    """Makes a Hugging Face config describe the model with its inserted layers, in place.

    Args:
        config: of the teacher.
        numbers: for each layer that the model now has, the teacher's layer whose kind it has.
    """
    kinds = {name: getattr(config, name, None) for name in PER_LAYER}
    dense = None if getattr(config, "mlp_only_layers", None) is None else _dense_layers(config)
    config.num_hidden_layers = len(numbers)
    for name, given in kinds.items():
        if given is not None:
            setattr(config, name, [given[number] for number in numbers])
    if dense is not None:
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [place for place, number in enumerate(numbers) if number in dense]


def _dense_layers(config: PretrainedConfig) -> set[int]:
    """The layers of a model with experts that have none."""
    every, count = config.decoder_sparse_step, config.num_hidden_layers
    return {i for i in range(count) if i in config.mlp_only_layers or (i + 1) % every}


def number_layers(model: PreTrainedModel) -> None:
    """Tells every layer its place in the model, by which it finds what is its own in a decoding cache."""
    for place, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if isinstance(module, Mixer):
                module.layer_index = place
            elif hasattr(module, "layer_idx"):
                module.layer_idx = place


def inserted_rows(
    teacher: PreTrainedModel, student: PreTrainedModel, config: StudentConfig
) -> list[TransferRow]:
    """A row of the transfer table for every tensor of the inserted layers: copied from the layer before, set
    to 0, or new."""
    architecture = architecture_of(teacher.config.model_type)
    own, rows = teacher_places(student), []
    for place in inserted_layers(student):
        layer, number = decoder_layers(student)[place], sum(other < place for other in own) - 1
        target, source = module_name(student, layer), module_name(teacher, decoder_layers(teacher)[number])
        silent, mixing = silent_tensors(layer, architecture), attention_modules(student)[place]
        moved = origins(mixing, architecture) if isinstance(mixing, Mixer) else None
        for name, tensor in layer.named_parameters():
            part = name.removeprefix(f"{architecture.attention}.")
            origin, action = f"{source}.{name}", "copied" if config.start != "random" else "random"
            if name in silent:
                origin, action = "", "zero"
            elif part != name and moved is not None:
                origin, action = "", "new"
                if part in moved:
                    origin = f"{source}.{architecture.attention}.{moved[part].name}"
                    action = moved[part].action_as("copied") if config.start == "transfer" else "random"
            rows.append(TransferRow(origin, f"{target}.{name}", action, str(list(tensor.shape))))
    return rows
