"""Holds a backend against the definition on the device that it is about to run on, before its first use."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.arguments import as_taken
from kernels.case import Case
from kernels.examples import errors, example, too_large, truth
from kernels.jit_build import BuildError
from kernels.segments import token_codes


@torch.inference_mode(False)
@torch.enable_grad()
def verify(op: str, name: str, run: Callable, case: Case, tolerance: str, native: bool) -> None:
    """Run a small call forward and backward, documents and padding included, and compare it with float64.

    It takes milliseconds, once per process and kind of call. A kernel that was built for another device, or
    that the driver runs wrongly, is found here and not in a loss curve.

    Args:
        op: operator name.
        name: of the backend, for the message.
        run: the backend's function.
        case: the device, dtype and head size to check it with.
        tolerance: a key of kernels.examples.TOLERANCES.
        native: whether it takes 16-bit inputs.

    Raises:
        BuildError: with the errors that are too large.
    """
    rounded = case.dtype if native else torch.float32
    call = example(op, 2, 35, 2, case.head_size, documents=True, bonus=op == "wkv6", rounded=rounded)
    exact = truth(call)
    here = call.to(case.device_type)
    leaves = {
        name: x.to(torch.float32 if name in ("log_w", "state", "u") else rounded).requires_grad_()
        for name, x in here.inputs.items()
    }
    tokens = {n: x for n, x in leaves.items() if n not in ("state", "u")}
    bonus = [leaves["u"]] if op == "wkv6" else []
    taken = as_taken(tokens, native, torch.float32)

    def found() -> dict[str, Tensor]:
        y, state = run(*taken, *bonus, leaves["state"], token_codes(here.document_ids))
        upstream = here.upstream[0].to(y.dtype), here.upstream[1].to(state.dtype)
        gradients = torch.autograd.grad((y, state), list(leaves.values()), upstream)
        return {"y": y, "state_out": state} | dict(zip((f"d{n}" for n in leaves), gradients, strict=True))

    held_against(exact, found, op, name, tolerance)


def held_against(
    exact: dict[str, Tensor], results: Callable[[], dict[str, Tensor]], op: str, name: str, tolerance: str
) -> None:
    """Judge what a backend makes of a call.

    Args:
        exact: what is right, by name.
        results: makes what is judged, on any device.
        op, name: the operator and the backend, for messages.
        tolerance: a key of kernels.examples.TOLERANCES.

    Raises:
        BuildError: with the errors that are too large, or why there are no results.
    """
    try:
        found = {n: x.detach().cpu() for n, x in results().items()}
    except BuildError:
        raise
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        raise BuildError(
            f"{op}, backend {name}: its self-check did not run on this device ({error}); choose another "
            "backend and report it"
        ) from error
    wrong = too_large(errors(found, exact), tolerance)
    if wrong:
        shown = ", ".join(f"{n} {e:.1e}" for n, e in wrong.items())
        raise BuildError(
            f"{op}, backend {name}: wrong on this device in its self-check (relative errors against float64: "
            f"{shown}); choose another backend and report it"
        )
