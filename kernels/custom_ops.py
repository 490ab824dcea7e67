"""Registers a backend's functions as custom operators of torch, with fake and autograd versions.

A backend writes plain functions that fill outputs made here; `torch.compile`, checkpointing and FSDP then
see one plain operator per pass. Every tensor a function is given is contiguous.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Fill = Callable[..., None]  # reads tensors and fills others


class Made(NamedTuple):
    """One output that is made before a backend runs.

    Attributes:
        like: the input whose dtype, device and, without `shape`, shape it has.
        dtype: instead of that input's.
        shape: the inputs by name -> the shape.
    """

    like: str
    dtype: torch.dtype | None = None
    shape: Callable[[dict[str, Tensor | None]], Sequence[int]] | None = None

    def make(self, inputs: dict[str, Tensor | None]) -> Tensor | None:
        """The output, not filled; None where its input is None."""
        source = inputs[self.like]
        if source is None:
            return None
        shape = source.shape if self.shape is None else self.shape(inputs)
        return allocate(shape, self.dtype or source.dtype, source.device)


@dataclass(frozen=True)
class Signature:
    """What the backends of one operator share.

    Attributes:
        inputs: names of the tensors of the forward pass, in their order.
        optional: those of them that may be None.
        gradients: input -> the gradient that the backward pass makes, for the inputs that have one.
        outputs: of the forward pass.
        constant: those of the outputs that have no gradient.
        reread: those of the outputs that the backward pass is handed.
        saved: one more output, made only when a backward pass is to come, and handed to it; None where there
            is none.
        step_inputs: names of the tensors of one decoding step; `state` is changed in place.
        step_output: of the step.
    """

    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    gradients: dict[str, Made]
    outputs: dict[str, Made]
    saved: Made | None
    step_inputs: tuple[str, ...] = ()
    step_output: Made | None = None
    constant: tuple[str, ...] = ()
    reread: tuple[str, ...] = ()

    @property
    def upstream(self) -> tuple[str, ...]:
        """The outputs whose gradients the backward pass is given."""
        return tuple(name for name in self.outputs if name not in self.constant)

    def named(self, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """The inputs by name."""
        return dict(zip(self.inputs, tensors, strict=True))

    def given(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The inputs among the arguments of a backward pass."""
        first = len(self.upstream)
        return arguments[first : first + len(self.inputs)]

    def make_outputs(self, inputs: Sequence[Tensor | None], keep: bool) -> list[Tensor]:
        """The outputs, and what is saved; an empty tensor stands for nothing."""
        tensors = self.named(inputs)
        outputs = [entry.make(tensors) for entry in self.outputs.values()]
        if keep and self.saved:
            return [*outputs, self.saved.make(tensors)]
        return [*outputs, inputs[0].new_empty(0)]

    def make_gradients(self, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients; None for an input that is None."""
        return [entry.make(self.named(inputs)) for entry in self.gradients.values()]


class Operators(NamedTuple):
    """The custom operators of one backend.

    Attributes:
        forward: (inputs, keep) -> outputs and the saved tensor (with `keep` false or nothing to save: empty).
        backward: (gradients of the outputs, inputs, outputs that it rereads, the saved tensor) -> gradients.
        step: (step inputs) -> the step's output; None where the backend has no step.
        plain_step: the same function without torch's wrapping, or None.
    """

    forward: Any
    backward: Any
    step: Any | None = None
    plain_step: Callable[..., Tensor] | None = None

    def take_step(self, *tensors: Tensor | None) -> Tensor:
        """One decoding step. Torch's wrapping takes longer than a small step itself, and is left out where
        nobody looks: only a graph being compiled and tensors that pretend see the custom operator."""
        watched = torch.compiler.is_compiling() or any(type(x) not in (Tensor, type(None)) for x in tensors)
        return self.step(*tensors) if watched else self.plain_step(*tensors)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output, not filled: what a backend leaves out stays whatever the memory held."""
    return torch.empty(shape, dtype=dtype, device=device)


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass may follow a call with these inputs, so that what it needs must be kept."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def register(
    operator: str,
    backend: str,
    device_types: Sequence[str],
    signature: Signature,
    forward: Fill,
    backward: Fill,
    step: Fill | None = None,
) -> Operators:
    """Make `transmute::<operator>_<backend>`, `..._backward` and `..._step`.

    Args:
        operator, backend: their names.
        device_types: on which the functions run, such as ["cpu"].
        signature: the operator's.
        forward: (inputs, outputs, saved or None) -> None; None also where nothing is to be saved.
        backward: (gradients of the outputs, inputs, outputs that it rereads, saved if the signature has one,
            gradients) -> None. A gradient of an input that was None is None.
        step: (step inputs, output) -> None; changes `state`.
    """
    name = f"transmute::{operator}_{backend}"
    devices = tuple(device_types)
    forward_op = _register_forward(name, devices, signature, forward)
    backward_op = _register_backward(f"{name}_backward", devices, signature, backward)
    _register_autograd(name, signature, forward_op, backward_op)
    if step is None:
        return Operators(forward_op, backward_op)
    return Operators(forward_op, backward_op, *_register_step(f"{name}_step", devices, signature, step))


def _register_forward(name: str, devices: tuple[str, ...], signature: Signature, forward: Fill) -> Any:
    """The custom operator of the forward pass: (inputs, keep) -> outputs and what is saved."""

    def run(*arguments):
        *tensors, keep = arguments
        inputs = _packed(tensors)
        *outputs, kept = signature.make_outputs(inputs, keep)
        forward(*inputs, *outputs, kept if keep and signature.saved else None)
        return *outputs, kept

    def fake(*arguments):
        *tensors, keep = arguments
        return tuple(signature.make_outputs(tensors, keep))

    inputs = _declared(signature, signature.inputs)
    operator = torch.library.custom_op(
        name, run, mutates_args=(), device_types=devices,
        schema=f"({inputs}, bool keep) -> {_tensors(len(signature.outputs) + 1)}",
    )  # fmt: skip
    operator.register_fake(fake)
    return operator


def _register_backward(name: str, devices: tuple[str, ...], signature: Signature, backward: Fill) -> Any:
    """The custom operator of the backward pass: (gradients of the outputs, inputs, outputs that it rereads,
    saved) -> gradients. Custom operators return tensors only: an empty one stands for None."""

    def told(gradients: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
        return tuple(like.new_empty(0) if x is None else x for x in gradients)

    def run(*arguments):
        *given, kept = _packed(arguments)
        inputs = signature.given(given)
        gradients = signature.make_gradients(inputs)
        backward(*given, *([kept] if signature.saved else []), *gradients)
        return told(gradients, inputs[0])

    def fake(*arguments):
        inputs = signature.given(arguments)
        return told(signature.make_gradients(inputs), inputs[0])

    upstream = ", ".join(f"Tensor d{output}" for output in signature.upstream)
    reread = "".join(f"Tensor {output}, " for output in signature.reread)
    inputs = _declared(signature, signature.inputs)
    operator = torch.library.custom_op(
        name, run, mutates_args=(), device_types=devices,
        schema=f"({upstream}, {inputs}, {reread}Tensor saved) -> {_tensors(len(signature.gradients))}",
    )  # fmt: skip
    operator.register_fake(fake)
    return operator


def _register_autograd(name: str, signature: Signature, forward_op: Any, backward_op: Any) -> None:
    """Makes the second operator the derivative of the first."""

    def setup_context(ctx, inputs, output) -> None:
        if not inputs[-1]:
            raise RuntimeError(f"{name}: gradients were asked for, but keep was False")
        outputs = dict(zip(signature.outputs, output[:-1], strict=True))
        ctx.save_for_backward(*inputs[:-1], *(outputs[name] for name in signature.reread), output[-1])
        ctx.mark_non_differentiable(*(outputs[name] for name in signature.constant), output[-1])
        ctx.set_materialize_grads(False)  # or a zero gradient of what is saved is made every time

    def differentiate(ctx, *upstream):
        kept = ctx.saved_tensors
        present = signature.named(kept[: len(signature.inputs)])
        given = dict(zip(signature.outputs, upstream, strict=False))
        filled = [
            signature.outputs[name].make(present).zero_() if given[name] is None else given[name]
            for name in signature.upstream
        ]
        found = dict(zip(signature.gradients, backward_op(*filled, *kept), strict=True))
        return *(None if present[n] is None else found.get(n) for n in signature.inputs), None

    forward_op.register_autograd(differentiate, setup_context=setup_context)


def _packed(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What a backend is given is contiguous."""
    return [None if x is None else x.contiguous() for x in tensors]


def _register_step(
    name: str, devices: tuple[str, ...], signature: Signature, step: Fill
) -> tuple[Any, Callable[..., Tensor]]:
    """The custom operator of one decoding step, and the plain function that it wraps."""

    def run_step(*arguments):
        inputs = dict(zip(signature.step_inputs, arguments, strict=True))
        packed_inputs = {
            name: x if x is None or name == "state" else x.contiguous() for name, x in inputs.items()
        }
        like = inputs[signature.step_output.like]
        output = allocate(like.shape, signature.step_output.dtype or like.dtype, like.device)
        step(*packed_inputs.values(), output)
        return output

    def fake_step(*arguments):
        like = dict(zip(signature.step_inputs, arguments, strict=True))[signature.step_output.like]
        return like.new_empty(like.shape, dtype=signature.step_output.dtype or like.dtype)

    step_op = torch.library.custom_op(
        name, run_step, mutates_args=("state",), device_types=devices,
        schema=f"({_declared(signature, signature.step_inputs, changed=('state',))}) -> Tensor",
    )  # fmt: skip
    step_op.register_fake(fake_step)
    return step_op, run_step


def _declared(signature: Signature, names: Sequence[str], changed: Sequence[str] = ()) -> str:
    """The arguments of a custom operator as its schema writes them."""
    kinds = {name: "Tensor?" if name in signature.optional else "Tensor" for name in names}
    kinds |= dict.fromkeys(changed, "Tensor(a!)")
    return ", ".join(f"{kinds[name]} {name}" for name in names)


def _tensors(number: int) -> str:
    """So many results as a schema writes them."""
    return "(" + ", ".join(["Tensor"] * number) + ")"
