"""Wrong arguments of the operators are refused by name."""

import pytest
import torch
from operator_calls import OPERATORS, STEPS, call
from torch import Tensor

from kernels.examples import INPUTS, Example


def spoil(made: Example, **changes) -> dict[str, Tensor]:
    """Arguments with one thing wrong."""
    arguments = {name: x.float() for name, x in made.inputs.items()}
    return {**arguments, **{name: change(arguments) for name, change in changes.items()}}


def everywhere(op: str, change) -> dict:
    """The same change to all tokens' inputs."""
    return dict.fromkeys(INPUTS[op], change)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": lambda x: x["k"][:, :3]}, "{op}: k has shape"),
        ({"r": lambda x: x["r"][0]}, r"{op}: r must be \[B,T,H,N\]"),
        (lambda x: x["r"][..., :16], "head size"),
        (lambda x: x["r"][:, :0], "none empty"),
        ({"v": lambda x: x["v"].double()}, "v is torch.float64"),
        ({"v": lambda x: x["v"].int()}, "v is torch.int32"),
        ({"log_w": lambda x: x["v"].to("meta")}, "log_w is on meta"),
        ({"state": lambda x: x["state"].bfloat16()}, "state must be torch.float32"),
        ({"state": lambda x: x["state"][:1]}, r"state must be \[B,H,N_k,N_v\]"),
        ({"document_ids": lambda x: torch.zeros(2, 5, dtype=torch.int32)}, r"document_ids must be \[B,T\]"),
        ({"document_ids": lambda x: torch.zeros(2, 4)}, "document_ids must be int32"),
        ({"backend": lambda x: "fast"}, "choose one of: auto, .*chunked, reference"),
    ],
)
def test_bad_arguments_are_named(op, changes, message):
    """Every refusal names the operator, the argument, and what was expected."""
    changes = changes if isinstance(changes, dict) else everywhere(op, changes)
    with pytest.raises(ValueError, match=message.format(op=op)):
        OPERATORS[op](**spoil(call((op, False), tokens=4), **changes))


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": lambda x: x["state"].transpose(2, 3)}, "must be contiguous"),
        ({"codes": lambda x: torch.zeros(2)}, r"codes must be int8 \[B\]"),
        ({"r": lambda x: x["r"][:, None]}, r"r must be \[B,H,N\]"),
        ({"backend": lambda x: "fast"}, "choose one of: auto"),
    ],
)
def test_bad_arguments_of_a_step_are_named(op, changes, message):
    made = call((op, False), tokens=1)
    made.inputs = {name: x if name == "state" else x[:, 0] for name, x in made.inputs.items()}
    with pytest.raises(ValueError, match=message):
        STEPS[op](**spoil(made, **changes))
