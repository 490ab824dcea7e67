"""Teacher families: where a Hugging Face decoder keeps its attention, and what its projections are called.

A new family is one entry in `ARCHITECTURES`.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """How one family names its parts.

    Args:
        layers: path of the list of decoder layers below `model.base_model`.
        attention: attribute of a decoder layer that holds its attention module, called by keyword with
            hidden_states, position_embeddings, attention_mask, past_key_values.
        query, key, value, output: projections of that module.
        query_norm, key_norm: per-head RMSNorm of queries and keys, or None.
        rotary: whether position_embeddings = (cos, sin) are applied to queries and keys.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    rotary: bool = True


ARCHITECTURES = {
    "qwen2": Architecture(),
    "llama": Architecture(),
    "qwen3": Architecture(query_norm="q_norm", key_norm="k_norm"),
}


def architecture_of(model_type: str) -> Architecture:
    """The entry of a family.

    Raises:
        ValueError: for a family without an entry, with what one needs.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"teacher: the architecture {model_type!r} is unknown; known are "
            f"{', '.join(sorted(ARCHITECTURES))}. "
            "Add an entry to ARCHITECTURES in models/architectures.py that names its layers, attention "
            "module and "
            "projections, and a test that an all-attention plan reproduces its logits."
        )
    return ARCHITECTURES[model_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a teacher or a student."""
    return model.base_model.get_submodule(architecture_of(model.config.model_type).layers)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer index -> the module that stands where the teacher has its attention."""
    name = architecture_of(model.config.model_type).attention
    return {index: getattr(layer, name) for index, layer in enumerate(decoder_layers(model))}


def replace_attention(model: PreTrainedModel, modules: dict[int, nn.Module]) -> dict[int, nn.Module]:
    """Puts modules where layers have their attention; returns what stood there before."""
    name = architecture_of(model.config.model_type).attention
    before = {}
    for index, module in modules.items():
        layer = decoder_layers(model)[index]
        before[index] = getattr(layer, name)
        setattr(layer, name, module)
    return before
