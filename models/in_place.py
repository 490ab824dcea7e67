"""Reading and writing whole parameters, sharded or not."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(parameter: nn.Parameter) -> Tensor:
    """A copy of a parameter's values; of a sharded one all of them, so every process must call it."""
    values = parameter.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values.clone()


def assign(parameter: nn.Parameter, values: Tensor) -> None:
    """Copies whole values into a parameter; call it without gradients."""
    values = values.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)
