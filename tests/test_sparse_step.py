"""One token of a pool of blocks in one call of the C++ backend, against the pool and the choice in torch."""

import attention_checks
import pytest
import torch
from attention_checks import GROUPED, rotary
from mixer_checks import assert_close
from torch import Tensor
from transformers import DynamicCache

from kernels import native, sparse_attention
from models.backbone import SequenceContext
from models.block_pool import BlockPool
from models.mixers import SparseAttentionMixer

LENGTH, FIRST, TOKENS = 4, 21, 220
OPTIONS = {
    "gated": {},
    "parts": {"index_part": 2, "sinks": 2, "key_shift": 0.5},
    "published": {"selector": "published", "sinks": 0, "window": 1},
    "nothing chosen": {"top_k": 0, "sinks": 3},
    "all seen": {"top_k": 40},
    "rope": {"rope": True, "qk_norm": True, "log_position_scale": True, "training_length": 9},
}


def make(**options) -> SparseAttentionMixer:
    chosen = {
        "block_length": LENGTH,
        "top_k": 2,
        "window": 9,
        "pool_blocks": 14,
        "index_width": 16,
        **options,
    }
    return attention_checks.make(SparseAttentionMixer, GROUPED, 0.3, **chosen)


def decoded(mixer: SparseAttentionMixer, hidden: Tensor) -> tuple[Tensor, BlockPool]:
    """A first call, then token by token; what nobody has written yet is NaN."""
    cache, outputs = DynamicCache(), []
    for index, call in enumerate(hidden.split([FIRST, *[1] * (TOKENS - FIRST)], dim=1)):
        positions = rotary(torch.arange(TOKENS)[None, cache.get_seq_length() :][:, : call.shape[1]])
        outputs.append(mixer(call, position_embeddings=positions, past_key_values=cache)[0])
        if index == 0:
            empty = cache.layers[-1].documents < 0
            for held in (cache.layers[-1].keys, cache.layers[-1].values):
                held[empty] = torch.nan
    return torch.cat(outputs, dim=1), cache.layers[-1]


def steps_taken(monkeypatch) -> list[int]:
    """Fills while steps are taken."""
    taken, call = [], native.call

    def counted(operator, entry, sizes, tensors):
        taken.extend([1] if entry == "step" else [])
        return call(operator, entry, sizes, tensors)

    monkeypatch.setattr(native, "call", counted)
    return taken


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_call_does_what_many_do(name, seed, monkeypatch):
    """Outputs and everything that the pool holds, far beyond its capacity, two rows."""
    mixer, taken = make(**OPTIONS[name]), steps_taken(monkeypatch)
    hidden = torch.randn(2, TOKENS, GROUPED.hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        outputs, pool = decoded(mixer, hidden)
        assert len(taken) == TOKENS - FIRST
        monkeypatch.setattr(sparse_attention.step, "fits", lambda token, pool: False)
        expected, other = decoded(mixer, hidden)
    assert len(taken) == TOKENS - FIRST and torch.isfinite(expected).all()
    assert_close(outputs, expected)
    assert pool.seen == other.seen == TOKENS
    assert torch.equal(pool.counts, other.counts)
    for held in ("keys", "values", "index", "starts", "documents", "attention"):
        mine, theirs = (getattr(x, held)[:, :-1].double() for x in (pool, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True, msg=held)


@pytest.mark.parametrize(
    "options, change",
    [
        ({"backend": "chunked"}, lambda mixer: mixer),
        ({}, lambda mixer: mixer.double()),
        ({"index_width": 24}, lambda mixer: mixer),
    ],
    ids=["another backend", "float64", "width"],
)
def test_what_one_call_cannot_do_takes_many(options, change, monkeypatch):
    """And comes out as in one forward pass."""
    taken = steps_taken(monkeypatch)
    mixer = change(make(**options, top_k=40, pool_blocks=80))
    hidden = torch.randn(1, TOKENS, GROUPED.hidden_size, dtype=mixer.key.weight.dtype)
    with torch.no_grad():
        assert_close(decoded(mixer, hidden)[0], mixer(hidden)[0])
    assert not taken


def test_a_cache_holds_the_index_keys_of_training_in_half_the_bytes():
    mixer, cache = make(pool_blocks=80), DynamicCache()
    hidden = torch.randn(2, TOKENS, GROUPED.hidden_size)
    with torch.no_grad():
        mixer(hidden, past_key_values=cache)
        keys = mixer.read(hidden, None, BlockPool(), SequenceContext()).index_keys
    held = cache.layers[-1].index
    assert held.dtype == torch.bfloat16 and keys.dtype == torch.float32
    assert torch.equal(held.flatten(1, 2)[:, :TOKENS].float(), keys)


def test_a_step_is_not_taken_where_somebody_differentiates():
    """In place there, the gradients of the tokens before would be lost."""
    mixer = make()
    hidden = torch.randn(1, TOKENS, GROUPED.hidden_size, requires_grad=True)
    cache = DynamicCache()
    mixer(hidden[:, :FIRST], past_key_values=cache)
    mixer(hidden[:, FIRST : FIRST + 1], past_key_values=cache)[0].sum().backward()
    assert hidden.grad[:, 0].abs().sum() > 0
