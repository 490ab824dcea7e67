"""Teacher families: where a Hugging Face decoder keeps its attention, what its projections are called, and
how it turns a hidden state into queries and keys.

A new family is one entry in `ARCHITECTURES`.
"""

import logging
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """How one family names its parts, and what its attention does beyond projecting.

    Head counts, head size, biases, the scale of scores and epsilons are read from the attention module.

    Args:
        layers: path of the list of decoder layers below `model.base_model`.
        attention: attribute of a decoder layer that holds its attention module, called by keyword with
            hidden_states, position_embeddings, attention_mask, past_key_values.
        query, key, value, output: projections of that module.
        fused: one projection that holds the rows of query, key and value, in this order, in the place of the
            three; None where they are apart.
        query_norm, key_norm: RMSNorm of queries and keys, before the rotation; None where there is none.
        norm_scope: `head` (each head is normalised by itself) or `width` (all heads together).
        norm_offset: what those norms add to their weight: 1 in families whose weight is counted from 1.
        rotation: `half` (channel i turns with channel i + R/2) or `interleaved` (2i with 2i + 1), of the R
            channels that the cosine table has; channels beyond R do not turn.
        rotates: attribute of the attention module that tells whether it rotates; None means always.
        masks_by_layer_type: whether the backbone takes a mask per name in config.layer_types; otherwise it
            takes one mask for all layers, with a window where config.sliding_window is set.
        feed_forward_output: paths, in a decoder layer, of the modules or tensors whose weights make what
            the feed-forward layer adds; a layer has at least one of them. With these and `output` at 0 a
            layer adds nothing. Empty where there are no such tensors: layers cannot be inserted then
            (models/expansion.py).
    """

    layers: str = "layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm_scope: str = "head"
    norm_offset: float = 0.0
    rotation: str = "half"
    rotates: str | None = None
    masks_by_layer_type: bool = False
    feed_forward_output: tuple[str, ...] = ("mlp.down_proj",)


ARCHITECTURES = {
    "gemma2": Architecture(masks_by_layer_type=True),
    "gemma3_text": Architecture(
        query_norm="q_norm", key_norm="k_norm", norm_offset=1.0, masks_by_layer_type=True
    ),
    "glm4": Architecture(rotation="interleaved"),
    "llama": Architecture(),
    "mistral": Architecture(),
    "olmo2": Architecture(query_norm="q_norm", key_norm="k_norm", norm_scope="width"),
    "phi3": Architecture(fused="qkv_proj"),
    "qwen2": Architecture(masks_by_layer_type=True),
    "qwen3": Architecture(query_norm="q_norm", key_norm="k_norm", masks_by_layer_type=True),
    "qwen3_moe": Architecture(
        query_norm="q_norm",
        key_norm="k_norm",
        feed_forward_output=("mlp.down_proj", "mlp.experts.down_proj"),
    ),
    "smollm3": Architecture(rotates="use_rope", masks_by_layer_type=True),
}


def architecture_of(model_type: str) -> Architecture:
    """The entry of a family.

    Raises:
        ValueError: for a family without an entry, with what one needs.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"teacher: the architecture {model_type!r} is unknown; known are "
            f"{', '.join(sorted(ARCHITECTURES))}. Add an entry to ARCHITECTURES in models/architectures.py "
            "that names its layers, attention module, projections, q/k norms, rotation and masks, and "
            "a small instance to PARENTS in tests/tiny.py, for the tests that compare queries, keys, values "
            "and logits with the teacher's own."
        )
    return ARCHITECTURES[model_type]


def check_family(config: PretrainedConfig) -> None:
    """Refuses a teacher that has no entry.

    Raises:
        ValueError: with what an entry needs; for a model of text and more, with what to take instead.
    """
    inner = config.get_text_config()
    if config.model_type not in ARCHITECTURES and inner.model_type in ARCHITECTURES:
        raise ValueError(
            f"teacher: {config.model_type!r} reads more than text, and only its language model, "
            f"{inner.model_type!r}, can be converted. Save that as a folder of its own, for teacher.path: "
            "make AutoModelForCausalLM.from_config(whole.config.get_text_config()), load the state_dict of "
            "whole.model.language_model into its `model` and that of whole.lm_head into its `lm_head`, and "
            "call save_pretrained on it and on the tokenizer."
        )
    architecture_of(config.model_type)


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


def keep_score_caps(model: PreTrainedModel) -> None:
    """Makes a model that caps its attention scores run them eagerly where it would run sdpa, which leaves the
    cap out without a word: another function than the one that was trained."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        log.info("%s caps its attention scores: attention=eager, since sdpa cannot.", config.model_type)
