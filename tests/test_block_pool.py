"""Which blocks a pool evicts, and which never."""

import pytest
import torch
from attention_checks import hidden_of
from mixer_checks import assert_close
from test_mixer_sparse import make
from transformers import DynamicCache

from models.block_pool import EMPTY, BlockPool
from models.sequence_state import Places


@pytest.mark.parametrize("calls", [[400], [1] * 400, [37, 1, 200, 2, 160]], ids=["once", "tokens", "pieces"])
def test_what_is_always_seen_is_never_evicted(calls):
    """Three sinks and a window: far beyond the capacity, while others go, each token sees what it sees in
    training."""
    mixer = make(sinks=3, window=12, top_k=0, pool_blocks=12)
    hidden, cache, outputs = hidden_of(tokens=400), DynamicCache(), []
    with torch.no_grad():
        for call in hidden.split(calls, dim=1):
            outputs.append(mixer(call, past_key_values=cache)[0])
        assert_close(torch.cat(outputs, 1), mixer(hidden)[0])


def test_the_newest_blocks_stay_while_a_long_call_is_read():
    """Whatever they have been paid: after each part of the call, not only after its end."""
    pool, tokens = BlockPool(kept=3, first=2), 61
    keys, positions = torch.zeros(1, tokens, 1, 4), torch.arange(tokens)[None]
    pool.make(keys, keys, keys, places=9, length=2, parts=1)
    parts = pool.rounds(Places(torch.zeros_like(positions), positions, torch.tensor([tokens])))
    assert parts[0] == (0, 16) and len(parts) > 5
    with torch.no_grad():
        for start, stop in parts:
            here = positions[:, start:stop]
            at = Places(torch.zeros_like(here), here, torch.tensor([tokens]))
            pool.advance(*(keys[:, start:stop] for _ in range(3)), at)
            newest = 2 * ((stop - 1) // 2)
            assert {0, 2, newest - 4, newest - 2, newest} <= set(pool.starts[0].tolist()), (start, stop)


def test_the_least_attended_block_goes():
    """Of the blocks that may go; blocks of an ended document go before."""
    pool, places = BlockPool(kept=2, first=1), torch.arange(10)[None]
    keys = torch.zeros(1, 10, 1, 4)
    pool.make(keys, keys, keys, places=6, length=2, parts=1)
    at = Places(torch.zeros_like(places), places, torch.tensor([10]))
    with torch.no_grad():
        pool.advance(keys, keys, keys, at)
        for block, share in enumerate((0.1, 0.6, 0.2, 0.3, 0.05)):
            listed = torch.full((1, 1, 1, 1), block, dtype=torch.int32)
            pool.attend(listed, torch.full((1, 1, 1, 1), share), torch.ones(1, 1, dtype=torch.bool))
        assert pool.starts[0].tolist() == [0, 2, 4, 6, 8, EMPTY]
        one = keys[:, :1]
        pool.advance(
            one, one, one, Places(torch.zeros(1, 1).long(), torch.tensor([[10]]), torch.tensor([11]))
        )
        assert pool.starts[0, :5].tolist() == [0, 2, 10, 6, 8], "not the first, nor the two newest"
        pool.begin(torch.tensor([False]))
        fresh = Places(torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([1]))
        pool.advance(one, one, one, fresh)
        assert pool.documents[0].tolist().count(1) == 1 and pool.starts[0].tolist().count(10) == 1
