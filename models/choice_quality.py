"""How much of attention the blocks hold that a sparse mixer chooses, beside the best choice and mean keys.

Shape letters: B rows, T tokens, D hidden width, H heads, N head size, M blocks of C tokens, G key/value
heads, J lists of a token (each of H/J neighbouring heads).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.sparse_attention import sparse_attention
from models.backbone import SequenceContext, hidden_states
from models.block_pool import BlockPool, Blocks
from models.mixers.sparse_attention import SparseAttentionMixer
from models.student import student_mixers

SLACK = 1e-5  # of the largest value: rounding of float32, which the bound does not know of
WAYS = ("always", "mean_key_list", "mean_key_head", "chosen", "best")


@dataclass
class ChoiceQuality:
    """Sums over the tokens of some rows that have more to choose from than they may choose.

    Attributes:
        tokens: that were counted.
        mass: for each of WAYS the sum over tokens of the share of attention, mean over heads, that falls on
            the blocks that are seen: those that are seen `always` alone; besides, as many as the mixer
            chooses, ranked by the product of query and mean key for each list of heads (`mean_key_list`) or
            for each head (`mean_key_head`); the mixer's own (`chosen`); those with the largest share
            (`best`).
        rows: of tokens and heads that were held against the bound ‖o - o_dense‖ ≤ 2 (1 - R) max‖v‖, where R
            is the share of the head's attention on what it sees; these are all tokens.
        beyond: those that break it.
        nearest: the largest ‖o - o_dense‖ / (2 (1 - R) max‖v‖).
    """

    tokens: int
    mass: dict[str, float]
    rows: int
    beyond: int
    nearest: float

    def add(self, other: "ChoiceQuality") -> None:
        """Adds those of other rows, in place."""
        self.tokens += other.tokens
        self.mass = {way: self.mass[way] + other.mass[way] for way in WAYS}
        self.rows += other.rows
        self.beyond += other.beyond
        self.nearest = max(self.nearest, other.nearest)


def sparse_mixers(model: PreTrainedModel) -> dict[int, SparseAttentionMixer]:
    """Place -> mixer, for the layers with sparse attention."""
    mixers = student_mixers(model).items()
    return {place: mixer for place, mixer in mixers if isinstance(mixer, SparseAttentionMixer)}


@torch.no_grad()
def choice_quality(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> dict[int, ChoiceQuality | None]:
    """Runs rows of one document each through a model and looks at each of its sparse mixers.

    Args:
        model: a student, in evaluation mode.
        batches: input_ids [B,T] and document_ids.

    Returns:
        By place; None where no row has a token with anything to choose.
    """
    found: dict[int, ChoiceQuality | None] = dict.fromkeys(sparse_mixers(model))

    def look(place: int, mixer: SparseAttentionMixer, kwargs: dict) -> None:
        own = mixer_quality(mixer, kwargs["hidden_states"], kwargs.get("position_embeddings"))
        if found[place] is None:
            found[place] = own
        elif own is not None:
            found[place].add(own)

    handles = [
        mixer.register_forward_pre_hook(
            lambda mixer, _, kwargs, place=place: look(place, mixer, kwargs), with_kwargs=True
        )
        for place, mixer in sparse_mixers(model).items()
    ]
    device = next(model.parameters()).device
    try:
        for batch in batches:
            hidden_states(model, batch["input_ids"].to(device), batch["document_ids"].to(device))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def mixer_quality(
    mixer: SparseAttentionMixer, hidden: Tensor, positions: tuple[Tensor, Tensor] | None
) -> ChoiceQuality | None:
    """That of one mixer on rows [B,T,D] of one document each; None where there is nothing to choose."""
    context, pool, options = SequenceContext(), BlockPool(), mixer.options
    tokens = mixer.read(hidden, positions, pool, context)
    places = mixer.places(pool, tokens, context, whole=True)
    blocks = pool.advance(tokens.k, tokens.v, tokens.index_keys, places)
    choice = mixer.choice(tokens.asks, blocks, places, scored=False)
    output, _ = mixer.attend(tokens.q, blocks, choice, places)
    dense, mass = _dense(tokens.q, blocks, places.positions)

    number, own = (
        blocks.starts[0] // options.block_length,
        places.positions[0, :, None] // options.block_length,
    )
    past = number < own
    always = (number <= own) & ((number < options.sinks) | (number >= own - options.near))
    lists = tokens.asks.shape[2]
    per_list = mass.unflatten(2, (lists, -1)).mean(3)
    mean_keys = torch.einsum("bthn,bmhn->bthm", tokens.q.float(), _mean_keys(blocks, tokens.q.shape[2]))
    seen = {
        "always": always[:, None].expand_as(mass),
        "mean_key_list": _best(mean_keys.unflatten(2, (lists, -1)).mean(3), past, always, options.top_k),
        "mean_key_head": _best(mean_keys, past, always, options.top_k),
        "chosen": _listed(choice.listed, mass.shape[-1]),
        "best": _best(per_list, past, always, options.top_k),
    }
    shares = {way: (mass * _by_heads(blocks, mass)).sum(-1) for way, blocks in seen.items()}  # [B,T,H]
    counted = (past & ~always).sum(-1) > options.top_k
    if not counted.any():
        return None
    beyond, nearest = _against_bound(output, dense, shares["chosen"], tokens.v)
    return ChoiceQuality(
        tokens=len(hidden) * int(counted.sum()),
        mass={way: float(share[:, counted].mean(-1).double().sum()) for way, share in shares.items()},
        rows=shares["chosen"].numel(),
        beyond=beyond,
        nearest=nearest,
    )


def _dense(query: Tensor, blocks: Blocks, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention [B,T,H,N], and the share of each block [B,T,H,M]."""
    rows, tokens, heads = query.shape[:3]
    everything = torch.arange(blocks.starts.shape[1], dtype=torch.int32, device=query.device)
    listed = everything.expand(rows, tokens, heads, -1).contiguous()
    return sparse_attention(
        query, blocks.keys, blocks.values, listed, blocks.starts.contiguous(), positions.int()
    )


def _mean_keys(blocks: Blocks, heads: int) -> Tensor:
    """[B,M,H,N] float32."""
    means = blocks.keys.float().mean(2)
    return means.repeat_interleave(heads // means.shape[2], dim=2)


def _best(scores: Tensor, past: Tensor, always: Tensor, count: int) -> Tensor:
    """[B,T,x,M] bool: what is always seen, and of the other complete blocks those of highest score.

    Args:
        scores: [B,T,x,M].
        past, always: [T,M] bool.
        count: how many others.
    """
    ranked = scores.masked_fill(~(past & ~always)[:, None], -torch.inf)
    best = ranked.topk(min(count, ranked.shape[-1]), dim=-1)
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    return chosen.scatter(-1, best.indices, best.values > -torch.inf) | always[:, None]


def _listed(listed: Tensor, count: int) -> Tensor:
    """[B,T,J,K] blocks -> [B,T,J,M] bool."""
    chosen = torch.zeros(*listed.shape[:-1], count + 1, dtype=torch.bool, device=listed.device)
    return chosen.scatter(-1, torch.where(listed < 0, count, listed).long(), True)[..., :count]


def _by_heads(seen: Tensor, mass: Tensor) -> Tensor:
    """What lists see, for each of their heads."""
    return seen.repeat_interleave(mass.shape[2] // seen.shape[2], dim=2)


def _against_bound(output: Tensor, dense: Tensor, share: Tensor, values: Tensor) -> tuple[int, float]:
    """How many of the rows [B,T,H] break the bound, and the largest quotient of both sides."""
    largest = values.float().norm(dim=-1).cummax(1).values
    largest = largest.repeat_interleave(output.shape[2] // largest.shape[2], dim=2)
    error, bound = (output - dense).float().norm(dim=-1), 2 * (1 - share).clamp_min(0) * largest
    beyond = error > bound + SLACK * largest
    told = bound > 100 * SLACK * largest  # below, the quotient is one of rounding errors
    quotient = torch.where(told, error / bound.clamp_min(torch.finfo(bound.dtype).tiny), 0)
    return int(beyond.sum()), float(quotient.max())
