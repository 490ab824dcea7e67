"""Runs a Hugging Face decoder over packed rows: the one place where documents become masks and positions.

Shape letters: B rows, T tokens, D hidden width.
"""

import inspect
from collections import UserList
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from models.architectures import architecture_of

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as transformers calls them


class IndexLosses(UserList):
    """Losses that layers leave, one after the other. Not a list: FSDP hands a copy of those to each unit."""


@dataclass
class SequenceContext:
    """What every layer of one forward pass may need to know; lives as long as that pass.

    Args:
        document_ids: [B,T] int32, -1 on padding; None where each row is one document without padding.
        continues: [B] bool, whether the row's first real token continues the document that the decoding state
            comes from; None means yes.
        first_value: [B,T,G,N] value of the first RWKV layer, set by that layer and read by the later ones.
        local_gradients: whether `first_value` enters later layers without a gradient (layer-wise alignment).
        index_losses: where mixers that choose what they see put how far their index is from attention (a
            scalar each, nats); None asks for nothing.
    """

    document_ids: Tensor | None = None
    continues: Tensor | None = None
    first_value: Tensor | None = None
    local_gradients: bool = False
    index_losses: IndexLosses | None = None


def has_documents(document_ids: Tensor | None) -> bool:
    """Whether some row holds more than one document, or padding."""
    return document_ids is not None and bool((document_ids != document_ids[:1, :1]).any())


def document_positions(document_ids: Tensor) -> Tensor:
    """[B,T] int64 position of each token in its document; padding counts from 0 as well."""
    length = document_ids.shape[1]
    index = torch.arange(length, device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def document_mask(document_ids: Tensor, queries: int, window: int | None = None) -> Tensor:
    """[B,1,queries,T] bool, true where a query may see a key: same document, not later, not too far back.

    A padded query sees itself, so that no softmax is empty.

    Args:
        document_ids: [B,T].
        queries: the last so many tokens ask.
        window: tokens that each query sees at most, its own among them; None means all.
    """
    length = document_ids.shape[1]
    same = document_ids[:, -queries:, None] == document_ids[:, None, :]
    near = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    if window is not None:
        near = near.triu(1 - window)
    return (same & near[-queries:])[:, None]


def backbone_inputs(
    model: PreTrainedModel, document_ids: Tensor | None, queries: int, cache: Cache | None = None
) -> dict:
    """The keyword arguments that make `model.base_model` respect documents.

    Args:
        model: a teacher or a student.
        document_ids: [B,T] of all tokens so far, or None.
        queries: the last so many tokens are this call's input; the others are in the cache.
        cache: of the call; layers with a window may have dropped what no query sees any more.

    Raises:
        ValueError: where the teacher's attention implementation cannot take a mask per document.
    """
    if not has_documents(document_ids):
        return {"sequence_context": SequenceContext()}
    context = SequenceContext(document_ids[:, -queries:], continues=_continues(document_ids, queries))
    positions = document_positions(document_ids)[:, -queries:]
    mask = _backbone_mask(model, document_ids, queries, cache)
    return {"attention_mask": mask, "position_ids": positions, "sequence_context": context}


def _backbone_mask(
    model: PreTrainedModel, document_ids: Tensor, queries: int, cache: Cache | None
) -> Tensor | dict[str, Tensor]:
    """The mask that a backbone takes: one for all layers, or one for each kind of layer."""
    config = model.config.get_text_config()

    def mask_of(kind: str) -> Tensor:
        if kind == FULL:
            return _in_form(model, document_mask(document_ids, queries))
        mask = document_mask(document_ids, queries, config.sliding_window)
        return _in_form(model, mask[..., -_held_by_windows(cache, queries, mask.shape[-1]) :])

    if architecture_of(config.model_type).masks_by_layer_type:
        return {kind: mask_of(kind) for kind in {FULL, *config.layer_types}}
    return mask_of(FULL if getattr(config, "sliding_window", None) is None else SLIDING)


def _held_by_windows(cache: Cache | None, queries: int, tokens: int) -> int:
    """Keys that a layer with a window gets from the cache and this call, of all `tokens`."""
    layers = [] if cache is None else cache.layers
    first = next((layer for layer in layers if getattr(layer, "is_sliding", False)), None)
    return tokens if first is None else first.get_mask_sizes(queries)[0]


def _in_form(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """A boolean mask as the attention implementation wants it."""
    implementation = model.config._attn_implementation
    if implementation == "eager":
        lowest = torch.finfo(model.dtype).min
        return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
    if implementation != "sdpa":
        raise ValueError(
            f"teacher.attention={implementation} takes no mask per document; set teacher.attention=sdpa, "
            "or feed one document per row."
        )
    return mask


def _continues(document_ids: Tensor, queries: int) -> Tensor | None:
    """[B] whether the first real token of this call has the document of the last real one before it."""
    before, now = document_ids[:, :-queries], document_ids[:, -queries:]
    if not before.shape[1]:
        return None
    last = torch.where(before >= 0, before, -1).amax(1)  # ids do not decrease along a row
    first = torch.where(now >= 0, now, torch.iinfo(now.dtype).max).amin(1)
    return (first == last) | (now < 0).all(1)


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    document_ids: Tensor | None = None,
    cache: Cache | None = None,
    index_losses: IndexLosses | None = None,
) -> Tensor:
    """Final hidden states (after the last norm) of a causal language model: [B,T] -> [B,T,D].

    Args:
        model: a teacher or a student.
        input_ids: [B,T] int64.
        document_ids: [B,T] int32 or None; with a cache [B, tokens in the cache + T]. Attention, positions and
            recurrent states never cross a document.
        cache: decoding cache, read and advanced.
        index_losses: as in `SequenceContext`.
    """
    inputs = backbone_inputs(model, document_ids, input_ids.shape[1], cache)
    inputs["sequence_context"].index_losses = index_losses
    use_cache = cache is not None
    output = model.base_model(input_ids=input_ids, past_key_values=cache, use_cache=use_cache, **inputs)
    return output.last_hidden_state


class CappedHead(nn.Module):
    """Hidden states to logits, drawn into (-cap, cap) as `soft_capped` does."""

    def __init__(self, head: nn.Module, config: PreTrainedConfig):
        super().__init__()
        self.head, self._config = head, config

    def forward(self, hidden: Tensor) -> Tensor:
        """[...,D] -> [...,V]."""
        return soft_capped(self.head(hidden), self._config)


def output_head(model: PreTrainedModel) -> nn.Module:
    """Final hidden states [...,D] -> logits [...,V], as the model's own forward makes them."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    return head if getattr(config, "final_logit_softcapping", None) is None else CappedHead(head, config)


def soft_capped(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """Logits z as c tanh(z / c), where the config has such a cap c (Gemma 2, arXiv 2408.00118)."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def provide_context(backbone: nn.Module) -> None:
    """Makes a student usable like any Hugging Face model: builds the context where the caller gives none.

    Padding is read from the two-dimensional `attention_mask` [B, cached + T], and positions are counted from
    each row's first real token, as `generate` counts them.
    """

    names = list(inspect.signature(backbone.forward).parameters)

    def build(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(zip(names, args, strict=False)) | kwargs  # a mask may also be given by its place
        if kwargs.get("sequence_context") is not None:
            return (), kwargs
        kwargs["sequence_context"] = context = SequenceContext()
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):
            raise ValueError(
                "attention_mask: a mask for each kind of layer says nothing of padding; give one [B,T], and "
                "a cache that grows (not cache_implementation=static)."
            )
        if mask is not None and mask.dim() == 2 and not mask.all():
            entry = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            tokens = entry.shape[1]
            context.document_ids = mask[:, -tokens:].to(torch.int32) - 1
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -tokens:]
        return (), kwargs

    backbone.register_forward_pre_hook(build, with_kwargs=True)
