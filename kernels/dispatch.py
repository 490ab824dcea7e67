"""Chooses the backend of an operator once per (operator, device type, dtype, head size), and can say why."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from kernels.jit_build import BuildError

log = logging.getLogger(__name__)

OPERATORS = ("wkv7", "wkv6")  # each a package kernels/<name>; "auto" tries its BACKENDS in their order


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: what the user writes as `backend=`.
        supports: (device type, dtype, head size) -> None when it can run, else why not, in plain words.
        run: the implementation.
        merit: why "auto" takes it when it can.
        prepare: builds or loads what `run` needs; raises BuildError. None when nothing is needed.
    """

    name: str
    supports: Callable[[str, torch.dtype, int], str | None]
    run: Callable
    merit: str
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Choice:
    """The backend chosen, the reason, and the reasons against those tried before it."""

    backend: Backend
    reason: str
    rejected: tuple[tuple[str, str], ...]


def backends(op: str) -> tuple[Backend, ...]:
    """The backends of an operator in the order of "auto"; ValueError for an unknown operator."""
    if op not in OPERATORS:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(OPERATORS)}")
    return importlib.import_module(f"kernels.{op}").BACKENDS


def _named(op: str, name: str, device_type: str, dtype: torch.dtype, head_size: int) -> Choice:
    """The named backend or an error, never another one."""
    table = {backend.name: backend for backend in backends(op)}
    if name not in table:
        raise ValueError(f"unknown backend {name!r} for {op}; choose one of: auto, {', '.join(table)}")
    backend = table[name]
    reason = backend.supports(device_type, dtype, head_size)
    if reason is not None:
        raise ValueError(
            f"backend={name} cannot run {op} here: {reason}; choose backend=auto or another backend"
        )
    if backend.prepare is not None:
        backend.prepare()
    return Choice(backend, "named by the caller", ())


@cache
def _choose(op: str, name: str, device_type: str, dtype: torch.dtype, head_size: int) -> Choice:
    """Cached body of `choose`; errors are not cached, so a repaired compiler is found again."""
    if name != "auto":
        return _named(op, name, device_type, dtype, head_size)
    rejected: list[tuple[str, str]] = []
    for backend in backends(op):
        reason = backend.supports(device_type, dtype, head_size)
        if reason is None and backend.prepare is not None:
            try:
                backend.prepare()
            except BuildError as error:
                reason = str(error)
                log.warning(
                    "%s: backend %s could not be built, a slower one is used\n%s", op, backend.name, error
                )
        if reason is None:
            return Choice(backend, backend.merit, tuple(rejected))
        rejected.append((backend.name, reason))
    raise ValueError(
        f"no backend of {op} can run here: " + "; ".join(f"{name}: {why}" for name, why in rejected)
    )


def choose(op: str, name: str, device_type: str, dtype: torch.dtype, head_size: int) -> Choice:
    """Pick the backend of an operator.

    Args:
        op: operator name, such as "wkv7".
        name: "auto" or a backend's name. A named backend is used or refused, never replaced.
        device_type: "cpu", "cuda", ...
        dtype: the dtype of the operator's first input.
        head_size: N.

    Raises:
        ValueError: unknown operator or backend name, or the named backend cannot run these inputs.
        BuildError: the named backend failed to build.
    """
    return _choose(op, name, device_type, dtype, head_size)


@torch.compiler.assume_constant_result
def chosen_name(op: str, name: str, device_type: str, dtype: torch.dtype, head_size: int) -> str:
    """The name of what `choose` picks, a constant to a compiled graph, which does not trace the choice."""
    return choose(op, name, device_type, dtype, head_size).backend.name


def forget() -> None:
    """Drop the cached decisions, for instance after a compiler was installed."""
    _choose.cache_clear()


def explain(
    op: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, head_size: int = 64
) -> dict:
    """Say which backend "auto" takes and why.

    Returns:
        {"backend": name, "reason": why, "rejected": {name: why not}}; only backends tried before the chosen
        one are in "rejected".
    """
    choice = choose(op, "auto", torch.device(device).type, dtype, head_size)
    return {"backend": choice.backend.name, "reason": choice.reason, "rejected": dict(choice.rejected)}
