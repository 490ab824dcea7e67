"""Mixers: what may stand in the place of attention. A new one is one file here, one entry below and one
YAML."""

from models.mixers.base import AttentionShape, Mixer
from models.mixers.kept_attention import KeptAttentionMixer, KeptAttentionOptions
from models.mixers.rwkv6 import RWKV6Mixer, RWKV6Options
from models.mixers.rwkv7 import RWKV7Mixer, RWKV7Options
from models.mixers.sliding_window import SlidingWindowMixer, SlidingWindowOptions
from models.mixers.sparse_attention import SparseAttentionMixer, SparseAttentionOptions

MIXERS: dict[str, type[Mixer]] = {
    "rwkv7": RWKV7Mixer,
    "rwkv6": RWKV6Mixer,
    "sparse": SparseAttentionMixer,
    "sliding_window": SlidingWindowMixer,
    "attention": KeptAttentionMixer,
}

__all__ = [
    "MIXERS",
    "AttentionShape",
    "KeptAttentionMixer",
    "KeptAttentionOptions",
    "Mixer",
    "RWKV6Mixer",
    "RWKV6Options",
    "RWKV7Mixer",
    "RWKV7Options",
    "SlidingWindowMixer",
    "SlidingWindowOptions",
    "SparseAttentionMixer",
    "SparseAttentionOptions",
]
