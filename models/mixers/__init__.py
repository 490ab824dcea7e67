"""Mixers: what may stand in the place of attention. A new one is one file here, one entry below and one
YAML."""

from models.mixers.base import AttentionShape, Mixer
from models.mixers.rwkv7 import RWKV7Mixer, RWKV7Options

MIXERS: dict[str, type[Mixer]] = {"rwkv7": RWKV7Mixer}

__all__ = ["MIXERS", "AttentionShape", "Mixer", "RWKV7Mixer", "RWKV7Options"]
