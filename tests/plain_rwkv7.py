"""RWKV-7 time mixing as its papers write it, head by head and token by token: what the mixer is judged by."""

import math

import torch
from torch import Tensor

from models.mixers import RWKV7Mixer
from models.mixers.induction_bank import HEAD_SIZE


class PlainRWKV7:
    """RWKV-7 (arXiv 2503.14456, section 4) and its RADLADS form (arXiv 2505.03005) with a mixer's weights, in
    float64, for one row without padding; the state is value-major, as in the papers.

    Args:
        mixer: lends its weights and options.
        positions: cosine and sine [T,N] of the rotary positions.
    """

    def __init__(self, mixer: RWKV7Mixer, positions: tuple[Tensor, Tensor]):
        self.shape, self.options = mixer.shape, mixer.options
        self.parts = -(-self.shape.head_size // 128)  # states of a head; enough for the sizes that tests take
        self.size = self.shape.head_size // self.parts
        self.cosine, self.sine = (table.double() for table in positions)
        self.weights = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}

    def __call__(self, hidden: Tensor, first_value: Tensor | None) -> Tensor:
        """[T,D] -> [T,D]; `first_value` [T,G·N] is mixed in where it is given."""
        x = hidden.double()
        shifted = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        mixes = self.weights.get("shift_mix", torch.zeros(6, x.shape[1], dtype=torch.float64))
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (shifted - x) * mix for mix in mixes)
        value = self.project("value", x_v)
        if first_value is not None:
            value = value + (first_value.double() - value) * self.low_rank("residual", x_v).sigmoid()
        decay = torch.exp(-math.exp(-0.5) * self.low_rank("decay", x_w, torch.tanh).sigmoid())
        rate = self.options.rate_range * self.low_rank("rate", x_a).sigmoid()
        receptance, key = self.project("receptance", x_r), self.project("key", x_k)
        queries_per_key = self.shape.heads // self.shape.kv_heads if self.options.grouped_kv else 1
        heads = []
        for head in range(self.shape.heads):
            own, group = self.part(head), self.part(head // queries_per_key)
            r = self.turned(receptance[:, own], "receptance_norm") * self.shape.head_size**-0.5
            k = self.turned(key[:, group], "key_norm")
            parts = (r, decay[:, own], k, value[:, group], rate[:, own])
            for part, own in enumerate(zip(*(x.split(self.size, dim=1) for x in parts), strict=True)):
                heads.append(self.one_head(head * self.parts + part, *own))
        return self.project("output", torch.cat(heads, 1) * self.gate(x_g)) + self.bank(x)

    def bank(self, x: Tensor) -> Tensor:
        """What an induction bank adds, [T,D]: each token is stored under the key of the one before it."""
        if "induction.match.weight" not in self.weights:
            return torch.zeros_like(x)
        match, value = (self.project(f"induction.{part}", x) for part in ("match", "value"))
        if self.options.induction_features == "cosine":
            match = match.cos()
        decay = torch.exp(-math.exp(-0.5) * self.low_rank("induction.decay", x, torch.tanh).sigmoid())
        rate = self.low_rank("induction.rate", x).sigmoid()
        heads = []
        for start in range(0, match.shape[1], HEAD_SIZE):
            own = slice(start, start + HEAD_SIZE)
            unit = match[:, own] / match[:, own].norm(dim=1, keepdim=True)
            state, outputs = torch.zeros(HEAD_SIZE, HEAD_SIZE, dtype=torch.float64), []
            for token in range(len(x)):
                removed = unit[token - 1] if token else torch.zeros_like(unit[0])
                w, a = decay[token, own], rate[token, own]
                state = state @ (torch.diag(w) - torch.outer(removed, removed * a))
                state = state + torch.outer(value[token, own], removed * (1 - w + a))
                outputs.append(state @ unit[token])
            heads.append(torch.stack(outputs))
        return self.project("induction.output", torch.cat(heads, 1))

    def one_head(self, head: int, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        """Receptance, decay, key, value and rate [T,N] of one head, or part of one, to its output [T,N]."""
        size, own = self.size, slice(head * self.size, (head + 1) * self.size)
        state = torch.zeros(size, size, dtype=torch.float64)
        outputs = []
        for token in range(len(r)):
            removed, written = self.keys(head, k[token], w[token], a[token])
            transition = torch.diag(w[token]) - torch.outer(removed, removed * a[token])
            state = state @ transition + torch.outer(v[token], written)
            y = state @ r[token]
            if self.options.group_norm:
                y = (y - y.mean()) / (y.var(unbiased=False) + size * 1e-5).sqrt()
                y = y * self.weights["norm.weight"][own] + self.weights["norm.bias"][own]
            if self.options.bonus:
                y = y + (r[token] * written * self.weights["bonus"][head]).sum() * v[token]
            outputs.append(y)
        return torch.stack(outputs)

    def keys(self, head: int, k: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The unit key that is removed and the key that is written, [N] each."""
        if self.options.written_key == "unit":
            removed = k / k.norm()
            return removed, removed * (1 - w + a)
        removed = k * self.weights["removed_key_scale"][head]
        return removed / removed.norm(), k * (1 + (a - 1) * self.weights["written_key_mix"][head])

    def turned(self, heads: Tensor, norm: str) -> Tensor:
        """[T,N] through the per-head norm, if there is one, and the rotary positions, if they are on."""
        if f"{norm}.weight" in self.weights:
            scale = (heads.pow(2).mean(1, keepdim=True) + self.shape.norm_eps).sqrt()
            heads = heads / scale * self.weights[f"{norm}.weight"]
        if not self.options.rope:
            return heads
        half = self.shape.head_size // 2
        return heads * self.cosine + torch.cat([-heads[:, half:], heads[:, :half]], 1) * self.sine

    def gate(self, hidden: Tensor) -> Tensor | float:
        """[T,D] -> [T,H·N]."""
        if self.options.gate == "none":
            return 1.0
        if self.options.gate == "full":
            return 2 * (hidden @ self.weights["gate.weight"].T).sigmoid()
        return 1 + (hidden @ self.weights["gate.down.weight"].T).sigmoid() @ self.weights["gate.up.weight"].T

    def project(self, name: str, hidden: Tensor) -> Tensor:
        """A projection, with its bias if it has one."""
        return hidden @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def low_rank(self, name: str, hidden: Tensor, activation=lambda middle: middle) -> Tensor:
        """A low-rank, data-dependent parameter."""
        middle = activation(hidden @ self.weights[f"{name}.down.weight"].T)
        return self.weights[f"{name}.bias"] + middle @ self.weights[f"{name}.up.weight"].T

    def part(self, head: int) -> slice:
        """A head's place among the channels."""
        return slice(head * self.shape.head_size, (head + 1) * self.shape.head_size)
