"""Gradients computed now, handed to autograd later.

A loss over a long sequence or a deep stack can be differentiated piece by piece in the forward pass, so that
the
activations of one piece are freed before the next begins. `hand_over` then presents the finished gradients to
autograd as one node, and everything downstream (accumulation, clipping, data-parallel hooks) works as usual.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.gradients = tensors[count:]
        return value.detach().clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        scaled = [
            None if gradient is None else gradient * upstream.to(gradient.dtype) for gradient in ctx.gradients
        ]
        ctx.gradients = None
        return None, None, *scaled, *(None for _ in scaled)


def hand_over(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """A scalar equal to `value` whose backward pass gives `gradients`, times the upstream gradient, to
    `inputs`.

    Args:
        value: scalar, without a graph.
        inputs: the tensors that the gradients belong to.
        gradients: of `value` with respect to each input; None for an input that has none.
    """
    return _HandOver.apply(value, len(inputs), *inputs, *gradients)


class GradientSum:
    """Adds up gradients of several scalars with respect to the same parameters."""

    def __init__(self, inputs: Sequence[Tensor]):
        self.inputs = list(inputs)
        self.gradients: list[Tensor | None] = [None] * len(self.inputs)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds one set of gradients, in place."""
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            held = self.gradients[index]
            self.gradients[index] = gradient if held is None else held.add_(gradient)


def differentiate(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a scalar with respect to `inputs`; its graph is freed.

    A sharded parameter (FSDP2) is not part of the graph itself: its unit gathers the whole tensor and
    reduces the gradient in hooks of the backward pass. So there the pass is run, and what it has added is
    taken out again.
    """
    if not any(isinstance(tensor, DTensor) for tensor in inputs):
        return torch.autograd.grad(loss, inputs, allow_unused=True)
    before = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    loss.backward()
    gradients = [tensor.grad for tensor in inputs]
    for tensor, gradient in zip(inputs, before, strict=True):
        tensor.grad = gradient
    return gradients
