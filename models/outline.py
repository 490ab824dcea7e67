"""The numbers of a teacher or student that its cost depends on, counted from the model itself.

The model may live on the meta device (models.teacher.teacher_outline): 72 B parameters then cost no memory.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from models.architectures import attention_modules, decoder_layers
from models.layer_plan import ATTENTION
from models.student import aligned_mixers, count_parameters, inserted_layers


@dataclass(frozen=True)
class Outline:
    """What one model consists of, in parameters unless said.

    Args:
        parameters: all of them, shared ones once.
        embedding: the table that tokens are looked up in; 0 where the head shares it.
        head: hidden state -> logits.
        mixing: attention, or what stands in its place, over all layers.
        mixers: of these, what has replaced attention.
        inserted: of all, those of layers that the teacher does not have.
        largest_unit: the largest part of a layer that is gathered as one (models/parallelize.py).
        idle: of all, those of experts that the router does not choose for a token.
        plan: what each layer mixes tokens with, as in models/layer_plan.py.
        width, inner, head_size, feed_forward_width, vocabulary: D, heads x head size, N, the feed-forward
            layer's inner width (where layers have experts, of all those that a token goes through), V.
    """

    parameters: int
    embedding: int
    head: int
    mixing: int
    mixers: int
    inserted: int
    largest_unit: int
    idle: int
    plan: tuple[str, ...]
    width: int
    inner: int
    head_size: int
    feed_forward_width: int
    vocabulary: int

    @property
    def multiplied(self) -> int:
        """Parameters below the head that each token is multiplied with."""
        return self.parameters - self.embedding - self.head - self.idle


def outline(model: PreTrainedModel, plan: list[str]) -> Outline:
    """Counts a teacher or a student.

    Args:
        model: with weights or without.
        plan: an entry per layer; `attention` in every layer of a teacher.
    """
    config = model.config
    mixing = {index: count_parameters(module) for index, module in attention_modules(model).items()}
    units = [*mixing.values(), *(_rest(layer, mixing[i]) for i, layer in enumerate(decoder_layers(model)))]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Outline(
        parameters=count_parameters(model),
        embedding=0 if head.weight is embedding.weight else count_parameters(embedding),
        head=count_parameters(head),
        mixing=sum(mixing.values()),
        mixers=sum(map(count_parameters, aligned_mixers(model).values())),
        inserted=sum(count_parameters(decoder_layers(model)[place]) for place in inserted_layers(model)),
        largest_unit=max(units),
        idle=_idle(model),
        plan=tuple(plan),
        width=config.hidden_size,
        inner=head_size * config.num_attention_heads,
        head_size=head_size,
        feed_forward_width=_feed_forward_width(model),
        vocabulary=config.vocab_size,
    )


def teacher_plan(model: PreTrainedModel) -> list[str]:
    """The plan of a model without mixers."""
    return [ATTENTION] * model.config.num_hidden_layers


def _experts(layer: nn.Module, count: int) -> list[nn.Parameter]:
    """The weights [experts, ..., ...] of a layer whose tokens each go through some of `count` experts."""
    return [p for p in layer.parameters() if count and p.dim() == 3 and p.shape[0] == count]


def _idle(model: PreTrainedModel) -> int:
    count = getattr(model.config, "num_experts", 0)
    held = sum(p.numel() for layer in decoder_layers(model) for p in _experts(layer, count))
    return held * (count - model.config.num_experts_per_tok) // count if held else 0


def _feed_forward_width(model: PreTrainedModel) -> int:
    config, count = model.config, getattr(model.config, "num_experts", 0)
    if not any(_experts(layer, count) for layer in decoder_layers(model)):
        return config.intermediate_size
    return config.num_experts_per_tok * config.moe_intermediate_size


def _rest(layer: nn.Module, mixing: int) -> int:
    return count_parameters(layer) - mixing
