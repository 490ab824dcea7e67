"""A student as a Hugging Face model of its own: what an exported folder is loaded as.

`models/hf/bundle.py` turns this module and everything of ours that it needs into the folder's one modeling
file.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from models.backbone import soft_capped
from models.config import StudentConfig, options_from
from models.conversion import install_mixers
from models.layer_plan import LayerPlan, teacher_numbers, teacher_part
from models.mixers.base import Mixer


class TransmuteConfig(PreTrainedConfig):
    """The parent's config and what has become of its attention layers.

    Args:
        parent: config of the Transformer that was converted, with its `model_type`, and with the layers that
            were inserted.
        layer_plan: for each decoder layer the name of a mixer, or `attention`; with a `+` in front where the
            layer was inserted.
        mixers: mixer name -> its options.
    """

    model_type = "transmute"
    sub_configs = {"parent": AutoConfig}
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]

    parent: dict[str, Any] | PreTrainedConfig | None = None
    layer_plan: list[str] | None = None
    mixers: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.parent, dict):
            self.parent = AutoConfig.for_model(**self.parent)
        if self.parent is None or self.layer_plan is None:
            raise ValueError("config.json: a transmute model needs `parent` and `layer_plan`.")
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The parent's config: vocabulary, widths and the kinds of cache layers are the parent's."""
        return self.parent

    @property
    def vocab_size(self) -> int:
        """Entries of the embedding."""
        return self.parent.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.parent.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return self.parent.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of each decoder layer."""
        return self.parent.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """Tokens that the parent was made for."""
        return self.parent.max_position_embeddings

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return self.parent.tie_word_embeddings


class TransmuteForCausalLM(PreTrainedModel, GenerationMixin):
    """The parent with mixers where attention was.

    Its tensors are named as in the parent, but for the mixers'. A row is one text: padding, on either side,
    is read from `attention_mask`.
    """

    config_class = TransmuteConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TransmuteConfig):
        super().__init__(config)
        mixers = {name: options_from(name, options) for name, options in (config.mixers or {}).items()}
        student = StudentConfig(layer_plan=LayerPlan(layers=config.layer_plan), mixers=mixers)
        parent = AutoModelForCausalLM.from_config(config.parent)
        install_mixers(parent, student, list(config.layer_plan))
        self.model, self.lm_head = parent.base_model, parent.get_output_embeddings()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,V] of the next tokens, and with labels the mean cross-entropy in nats.

        Args:
            input_ids: [B,T] int64, or instead inputs_embeds [B,T,D].
            attention_mask: [B, tokens in the cache + T], 0 on padding; None where nothing is padded.
            position_ids: [B,T]; counted from each row's first real token where they are not given.
            past_key_values: decoding cache, read and advanced.
            labels: [B,T], the input ids themselves; they are shifted here, and -100 is ignored.
            use_cache: whether to return a cache.
            logits_to_keep: only so many last positions get logits (0: all), or those of the given indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = soft_capped(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.parent)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Gives mixers' tensors that no checkpoint has brought the start of a new mixer, the others the
        parent's."""
        plan = self.config.layer_plan
        numbers, depth = teacher_numbers(plan), len(teacher_part(plan))
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        firsts = {type(mixer): mixer for mixer in reversed(mixers)}.values()
        for mixer in mixers:
            missing = [name for name, tensor in mixer.named_parameters() if not _is_loaded(tensor)]
            if missing:
                place = {"layer_index": numbers[mixer.layer_index], "layer_count": depth}
                _start_anew(mixer, missing, **place, first=any(mixer is m for m in firsts))
        super().initialize_weights()


def _is_loaded(tensor: nn.Parameter) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


def _start_anew(mixer: Mixer, names: list[str], **place: Any) -> None:
    """Sets the named tensors to those of a new mixer in a `place` (layer_index, layer_count, first), and
    marks them, so that no general rule overwrites them."""
    fresh = type(mixer)(mixer.shape, mixer.options, **place)
    for name in names:
        tensor = mixer.get_parameter(name)
        tensor.copy_(fresh.get_parameter(name))
        tensor._is_hf_initialized = True
