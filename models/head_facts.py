"""What a few rows say of attention heads and of the mixers beside them: how far and how evenly heads look,
how loud they are, how far a mixer is from its attention.

Shape letters: B rows, T tokens, n tokens of one row, D hidden width, H heads, N head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import ranks
from models.align import beside_attention
from models.architectures import architecture_of, attention_modules
from models.backbone import document_positions
from models.evaluation import own_batches
from models.mixers.base import Mixer

SCALES = (0.1, 10.0)  # of a head's output, at least and at most


class HeadFacts(NamedTuple):
    """Sums over tokens for the heads of one layer, each [H] float64; what concerns the layer is repeated.

    Args:
        tokens: that were looked at.
        distance: attention distances, tokens.
        choosing: tokens that see more than themselves.
        entropy: of attention over ln(tokens seen), over `choosing`.
        product, energy: of the student's head outputs with the teacher's, and with themselves.
        layer_target, layer_error: energy of the teacher's layer output, and of the student's distance to it.
    """

    tokens: Tensor
    distance: Tensor
    choosing: Tensor
    entropy: Tensor
    product: Tensor
    energy: Tensor
    layer_target: Tensor
    layer_error: Tensor

    @property
    def mean_distance(self) -> Tensor:
        """[H] tokens."""
        return self.distance / self.tokens.clamp_min(1)

    @property
    def mean_entropy(self) -> Tensor:
        """[H], from 0 (one token is seen) to 1 (all alike)."""
        return self.entropy / self.choosing.clamp_min(1)

    @property
    def scale(self) -> Tensor:
        """[H] factors that bring the student's heads nearest to the teacher's (least squares), within
        SCALES."""
        return (self.product / self.energy.clamp_min(1e-12)).clamp(*SCALES)

    @property
    def error(self) -> Tensor:
        """[H], all alike: squared error of the layer's output over the target's energy; zero output has 1."""
        return self.layer_error / self.layer_target.clamp_min(1e-12)


def observe(
    mixers: dict[int, Mixer],
    teacher: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    probabilities: bool,
) -> dict[int, HeadFacts]:
    """What the rows say of layers; the mixers read the teacher's own hidden states.

    One row at a time, so that the attention of one layer and row [1,H,T,T] is the most that is held. Several
    processes divide the rows among themselves and return the same; all must call it.

    Args:
        mixers: layer index -> mixer with the teacher's head count, and an `output` projection.
        teacher: on the mixers' device.
        batches: input_ids and document_ids [B,T].
        probabilities: whether distances and entropies are wanted; they are 0 otherwise.

    Raises:
        ValueError: where the teacher's attention tells no probabilities.
    """
    attention = attention_modules(teacher)
    projection = architecture_of(teacher.config.model_type).output
    sums: dict[int, Tensor] = {}

    def visit(counts: bool, index: int, kwargs: dict[str, Any], given: tuple[Tensor, ...]) -> None:
        mixer = mixers[index]
        output, _ = mixer(**in_float32(kwargs))
        real = document_ids[0] >= 0
        outputs = [x[0][real].double() for x in (given[0], output)]
        heads = [
            x[index][0][real].double().unflatten(-1, (-1, mixer.shape.head_size))
            for x in (teacher_heads, student_heads)
        ]
        reach = attention_reach(probabilities_of(given), document_ids) if probabilities else None
        facts = torch.stack(_facts(heads, outputs, reach))
        sums[index] = sums.get(index, torch.zeros_like(facts)) + facts * counts

    with (
        torch.no_grad(),
        telling_probabilities(teacher) if probabilities else nullcontext(),
        _inputs({index: getattr(attention[index], projection) for index in mixers}) as teacher_heads,
        _inputs({index: mixer.output for index, mixer in mixers.items()}) as student_heads,
    ):
        for counts, row in own_rows(batches, next(teacher.parameters()).device):
            document_ids = row["document_ids"]
            beside_attention(list(mixers), teacher, row, partial(visit, counts))
    return {index: HeadFacts(*ranks.total(sums[index])) for index in mixers}


def attention_reach(probabilities: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far and how evenly the heads of one row look.

    Args:
        probabilities: [1,H,T,T] of attention, 0 where a token may not look.
        document_ids: [1,T], -1 on padding.

    Returns:
        Sums over tokens, float64: of distances [H], of entropies over ln(tokens seen) [H], and the number of
        tokens that see more than themselves.
    """
    real, seen = document_ids[0] >= 0, document_positions(document_ids)[0] + 1
    chances = probabilities[0].float()
    places = torch.arange(len(seen), device=chances.device, dtype=torch.float32)
    distance = (places - chances @ places)[:, real]
    chooses = real & (seen > 1)
    entropy = torch.special.entr(chances[:, chooses]).sum(-1) / seen[chooses].log()
    return distance.double().sum(-1), entropy.double().sum(-1), chooses.sum().double()


def own_rows(
    batches: Sequence[dict[str, Tensor]], device: torch.device
) -> Iterator[tuple[bool, dict[str, Tensor]]]:
    """This process's share of the rows, one at a time on a device, each with whether it counts: where the
    last round is not full, a process repeats a row."""
    for index, row in own_batches(single_rows(batches)):
        yield index is not None, {name: tensor.to(device) for name, tensor in row.items()}


def single_rows(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches of one row each: [B,T] -> B times [1,T]."""
    return [
        {name: tensor[index : index + 1] for name, tensor in batch.items()}
        for batch in batches
        for index in range(len(batch["input_ids"]))
    ]


def _facts(heads: list[Tensor], outputs: list[Tensor], reach: tuple[Tensor, ...] | None) -> HeadFacts:
    """Of one row, from [n,H,N] and [n,D] of teacher and student."""
    (target_heads, own_heads), (target, own) = heads, outputs
    distance, entropy, choosing = reach or (own_heads.new_zeros(()),) * 3
    each = own_heads.new_ones(own_heads.shape[1])
    return HeadFacts(
        tokens=each * len(own),
        distance=each * distance,
        choosing=each * choosing,
        entropy=each * entropy,
        product=(target_heads * own_heads).sum((0, 2)),
        energy=own_heads.square().sum((0, 2)),
        layer_target=each * target.square().sum(),
        layer_error=each * (target - own).square().sum(),
    )


@contextmanager
def telling_probabilities(teacher: PreTrainedModel) -> Iterator[None]:
    """Makes the teacher's attention tell its probabilities while the block runs."""
    usual = teacher.config._attn_implementation
    teacher.set_attn_implementation("eager")
    try:
        yield
    finally:
        teacher.set_attn_implementation(usual)


@contextmanager
def _inputs(modules: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Key -> the newest input of each module, filled while the block runs."""
    seen: dict[int, Tensor] = {}

    def keep(key: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.update({key: args[0].detach()})

    handles = [module.register_forward_pre_hook(keep(key)) for key, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def in_float32(value: Any) -> Any:
    """Float tensors, also those in tuples and dictionaries, in float32, as mixers have their weights."""
    if isinstance(value, dict):
        return {name: in_float32(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(in_float32(part) for part in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def probabilities_of(given: tuple[Tensor, ...]) -> Tensor:
    """[B,H,T,T] of what an attention module has returned.

    Raises:
        ValueError: where it tells none.
    """
    if len(given) < 2 or given[1] is None:
        raise ValueError(
            "teacher: its attention tells no probabilities; set stage.calibrate.decay=false and "
            "stage.calibrate.rate=false."
        )
    return given[1]
