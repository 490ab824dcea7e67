"""Induction heads: finds them in the teacher, and starts a student's bank of them from what they do.

Shape letters: B rows, T tokens, P tokens of a passage, D hidden width, H heads, n head size of the mixer,
M heads of the bank, N their size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import ranks
from models.align import beside_attention
from models.head_facts import SCALES, in_float32, own_rows, probabilities_of, telling_probabilities
from models.in_place import assign, whole
from models.mixers.base import Mixer
from models.mixers.induction_bank import HEAD_SIZE

SCORE = 0.1  # mean attention on what followed the earlier occurrence: an induction head has at least this
SMALLEST_VARIANCE = 1e-3  # of the largest one; directions below it are not blown up
SEED = 0  # of a bank's directions and angles
SHARPNESS = (
    2.5  # angles of a bank's cosines differ by so much (standard deviation): tokens less alike are apart
)
LEFT_OVER = 0.1  # of what a mixer's own head adds, where the bank does its work


@dataclass
class LayerInputs:
    """Sums over the rows that a layer has read.

    Args:
        tokens: that were read.
        total, square: sum of the hidden states [D], and of their outer products [D,D], float64.
        matched: [H] sum over `asked` tokens of the attention on the token that followed the same one before.
        asked: tokens of second copies, whose match is known.
    """

    tokens: Tensor
    total: Tensor
    square: Tensor
    matched: Tensor
    asked: Tensor

    @property
    def scores(self) -> Tensor:
        """[H] mean attention on the match: the prefix-matching score of arXiv 2209.11895."""
        return self.matched / self.asked.clamp_min(1)

    @property
    def mean(self) -> Tensor:
        """[D]."""
        return self.total / self.tokens

    @property
    def covariance(self) -> Tensor:
        """[D,D]."""
        return self.square / self.tokens - torch.outer(self.mean, self.mean)


def read_copies(
    layers: Sequence[int], teacher: PreTrainedModel, copies: Sequence[dict[str, Tensor]]
) -> dict[int, LayerInputs]:
    """Runs the teacher over passages shown twice; several processes divide the rows and return the same.

    Args:
        layers: indices.
        teacher: in evaluation mode.
        copies: batches of rows [B,2P] that hold one passage of P tokens twice.

    Raises:
        ValueError: where the teacher's attention tells no probabilities.
    """
    sums: dict[int, list[Tensor]] = {}

    def visit(counts: bool, index: int, kwargs: dict[str, Any], given: tuple[Tensor, ...]) -> None:
        hidden = kwargs["hidden_states"][0].double()
        attention = probabilities_of(given)[0].double()
        passage = len(hidden) // 2
        # The second copy's token t is the first copy's t - P, and what followed that one is t - P + 1.
        asked = torch.arange(passage, len(hidden) - 1, device=hidden.device)
        matched = attention[:, asked, asked - passage + 1].sum(-1)
        found = [hidden.new_tensor(len(hidden)), hidden.sum(0), hidden.T @ hidden, matched]
        found = [counts * part for part in (*found, hidden.new_tensor(len(asked)))]
        sums[index] = [a + b for a, b in zip(sums[index], found, strict=True)] if index in sums else found

    with torch.no_grad(), telling_probabilities(teacher):
        for counts, row in own_rows(copies, next(teacher.parameters()).device):
            beside_attention(layers, teacher, row, partial(visit, counts))
    return {index: LayerInputs(*(ranks.total(part) for part in parts)) for index, parts in sums.items()}


@torch.no_grad()
def start_bank(mixer: Mixer, inputs: LayerInputs) -> list[int]:
    """Starts a mixer's bank: it matches hidden states, and says what the layer's induction heads say of a
    match.

    Args:
        mixer: with an `induction` bank, and the teacher's values and output projection.
        inputs: of its layer.

    Returns:
        The induction heads; the mixer's own ones are left a tenth as loud.
    """
    bank, size = mixer.induction, mixer.shape.head_size
    heads = (inputs.scores >= SCORE).nonzero().flatten()
    channels = (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
    shared = channels // size // mixer.kv_repeats * size + channels % size  # the values' own channels
    pieces = list(zip(channels.split(HEAD_SIZE), shared.split(HEAD_SIZE), strict=True))
    count = bank.match.out_features // HEAD_SIZE
    maps = SHARPNESS * matching_maps(inputs, count * HEAD_SIZE)
    angles = torch.rand(len(maps), dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    parts = (bank.value.weight, bank.value.bias, bank.output.weight, mixer.output.weight)
    value, value_bias, output, own_output = map(whole, parts)
    own_value, own_bias = whole(mixer.value.weight), mixer.value.bias
    for number in range(count):
        said, source = pieces[number % len(pieces)]
        share = len(range(number % len(pieces), count, len(pieces)))  # of the bank's heads with this piece
        rows = slice(number * HEAD_SIZE, number * HEAD_SIZE + len(said))
        value[rows] = own_value[source]
        value_bias[rows] = 0.0 if own_bias is None else whole(own_bias)[source]
        output[:, rows] = own_output[:, said] / share
    own_output[:, channels] *= LEFT_OVER
    for parameter, values in zip(parts, (value, value_bias, output, own_output), strict=True):
        assign(parameter, values)
    assign(bank.match.weight, maps)
    assign(bank.match.bias, bank.turn * angles.to(maps) - maps @ inputs.mean)
    return heads.tolist()


def scale_banks(
    mixers: dict[int, Mixer], teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> None:
    """Makes each bank as loud as what the mixers beside it lack (least squares over the rows).

    Args:
        mixers: layer index -> mixer with a bank.
        teacher: in evaluation mode.
        batches: rows; several processes divide them.
    """
    device = next(teacher.parameters()).device
    sums = {index: torch.zeros(2, dtype=torch.float64, device=device) for index in mixers}
    said: dict[int, Tensor] = {}

    def visit(counts: bool, index: int, kwargs: dict[str, Any], given: tuple[Tensor, ...]) -> None:
        output, _ = mixers[index](**in_float32(kwargs))
        bank = said[index].double()
        lacking = given[0].double() - (output.double() - bank)
        sums[index] += counts * torch.stack([(lacking * bank).sum(), bank.square().sum()])

    def listen(index: int) -> Any:
        return mixers[index].induction.register_forward_hook(lambda _, args, out: said.update({index: out}))

    handles = [listen(index) for index in mixers]
    with torch.no_grad():
        for counts, row in own_rows(batches, device):
            beside_attention(list(mixers), teacher, row, partial(visit, counts))
        for handle in handles:
            handle.remove()
        for index, mixer in mixers.items():
            product, energy = ranks.total(sums[index])
            weight = mixer.induction.output.weight
            factor = (product / energy.clamp_min(1e-12)).clamp(*SCALES)
            assign(weight, whole(weight) * factor.to(weight.dtype))


def matching_maps(inputs: LayerInputs, rows: int) -> Tensor:
    """Projections [rows,D] of hidden states after which those of different tokens are nearly orthogonal.

    Hidden states are whitened and lose their mean direction; a projection reads one of the D - 1 directions
    that are left. The first D - 1 projections are orthogonal to each other, and so are the next ones.
    """
    values, vectors = torch.linalg.eigh(inputs.covariance)
    whitening = vectors * values.clamp_min(SMALLEST_VARIANCE * values.max()).rsqrt()  # [D,D], on row vectors
    mean = inputs.mean @ whitening
    width = len(mean)
    generator = torch.Generator().manual_seed(SEED)
    bases: list[Tensor] = []
    while sum(map(len, bases)) < rows:
        mix = torch.randn(width, width, dtype=torch.float64, generator=generator).to(mean.device)
        mix[:, 0] = mean
        bases.append((whitening @ torch.linalg.qr(mix)[0][:, 1:]).T)
    return torch.cat(bases)[:rows]
