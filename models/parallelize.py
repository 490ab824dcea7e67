"""Spreads a model over processes (FSDP2), and takes the whole tensors back out.

Applied from outside, in this order: shard, recompute blocks, connect. The units of sharding are each layer's
mixer or attention, the rest of each decoder layer, what remains of the backbone, and the head: whatever runs
on its own (a mixer in alignment, the head over chunks of tokens, an attention that selection borrows) is a
unit of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from models.architectures import attention_modules, decoder_layers


def shard(model: PreTrainedModel, device: str, mesh: DeviceMesh) -> None:
    """Shards every parameter of a teacher or student over all processes, in place.

    Each process begins with the whole model on its CPU and is left with its part on its device. Nothing is
    sent: processes may do this one after the other. `connect` must follow, in all of them together.

    Args:
        model: a causal language model of a known family.
        device: `cpu`, or `cuda:<index>` of this process.
        mesh: of all processes, from `process_mesh`.
    """
    for index, layer in enumerate(decoder_layers(model)):
        mixing = attention_modules(model)[index]
        fully_shard(mixing, mesh=mesh)
        if getattr(mixing, "index", None) is not None:
            mixing.register_forward_hook(_tie_index, with_kwargs=True, prepend=True)
        fully_shard(layer, mesh=mesh)
    # Said for these two, because what runs as a root would stay whole after a forward pass: an optimiser step
    # after a look at held-out rows would then miss its gradients.
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True)
    fully_shard(model.get_output_embeddings(), mesh=mesh, reshard_after_forward=True)
    model.to(device)  # what is no parameter: buffers


class _Tied(torch.autograd.Function):
    """A tensor as it is; in the backward pass others, which get no gradient from here, come after it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        """The tensor."""
        ctx.others = len(others)
        return tensor.clone()  # of a view, hooks on the output could be lost

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Its gradient."""
        return gradient, *[None] * ctx.others


def _tie_index(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple:
    """A forward hook: makes a unit's output depend on the losses of its index, which leave it another way.

    A unit gathers its parameters for the backward pass when the gradient of its output arrives: so the output
    must have one, also where the index alone trains, and the losses must wait for it.
    """
    losses = getattr(kwargs.get("sequence_context"), "index_losses", None)
    return (_Tied.apply(output[0], *losses), *output[1:]) if losses else output


def process_mesh(device: str) -> DeviceMesh:
    """The mesh of all processes of the run, whose group must stand already."""
    return init_device_mesh(torch.device(device).type, (dist.get_world_size(),))


@torch.no_grad()
def connect(model: PreTrainedModel) -> None:
    """Makes the units of a sharded model know each other, in all processes together.

    The first module that runs becomes the root of those below it. A mixer that ran alone before its backbone
    would end up outside of it.
    """
    device = next(model.parameters()).device
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def sharded_strategy() -> ModelParallelStrategy:
    """Lightning's strategy for models that `shard` has spread; each process saves its own part."""
    return ModelParallelStrategy(
        data_parallel_size=dist.get_world_size(), tensor_parallel_size=1, save_distributed_checkpoint=True
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been applied."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def kept_whole(*modules: nn.Module) -> Iterator[None]:
    """Gathers sharded units, in or below the modules, once for all calls inside the block; their parameters
    must be listed before it."""
    units = [unit for module in modules for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.set_reshard_after_backward(False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True)
            unit.set_reshard_after_backward(True)
            unit.reshard()


def full_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Every tensor of the model's state, whole and on the CPU; all processes must call it.

    Args:
        model: sharded or not.
        keep: whether this process wants them; the others take part in gathering and get nothing.
    """
    whole = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = tensor.detach().cpu()
    return whole


def recompute_blocks(model: PreTrainedModel) -> None:
    """Makes each decoder layer forget its activations and compute them anew in the backward pass."""
    for layer in decoder_layers(model):
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
