"""Mixers: what may stand in the place of attention. A new one is one file here, one entry below and one
YAML."""

from models.mixers.base import AttentionShape, Mixer
from models.mixers.rwkv6 import RWKV6Mixer, RWKV6Options
from models.mixers.rwkv7 import RWKV7Mixer, RWKV7Options
from models.mixers.sparse_attention import SparseAttentionMixer, SparseAttentionOptions

MIXERS: dict[str, type[Mixer]] = {"rwkv7": RWKV7Mixer, "rwkv6": RWKV6Mixer, "sparse": SparseAttentionMixer}

__all__ = [
    "MIXERS",
    "AttentionShape",
    "Mixer",
    "RWKV6Mixer",
    "RWKV6Options",
    "RWKV7Mixer",
    "RWKV7Options",
    "SparseAttentionMixer",
    "SparseAttentionOptions",
]
