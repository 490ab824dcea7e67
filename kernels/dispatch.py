"""Chooses the backend of an operator once per kind of call, and can say why that one and why no other."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from kernels import measured
from kernels.case import MANY_UNITS, Case, unsupported
from kernels.jit_build import BuildError

log = logging.getLogger(__name__)

RECURRENCES = ("wkv7", "wkv6")  # with a state; what kernels/bench measures
# Each a package kernels/<name> with its HEAD_SIZES; "auto" tries its BACKENDS in their order.
OPERATORS = (*RECURRENCES, "sparse_attention")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: what the user writes as `backend=`.
        supports: None when it can run a case (of a known dtype and head size), else why not, in plain words.
        run: the implementation.
        merit: why "auto" takes it when it can.
        prepare: builds or loads what `run` needs for a case, and checks it where the device is new to it;
            raises BuildError. None when nothing is needed.
        native: takes r, k, v, a, b in 16 bits (log_w is float32 always); others get everything in float32.
        held_back: why "auto" does not take it as long as nobody has measured it on this device; None if it
            does.
        step: one decoding step, the state changed in place; None where the backend has none.
    """

    name: str
    supports: Callable[[Case], str | None]
    run: Callable
    merit: str
    prepare: Callable[[Case], object] | None = None
    native: bool = False
    held_back: str | None = None
    step: Callable | None = None


@dataclass(frozen=True)
class Choice:
    """The backend chosen, the reason, and for every other backend the reason against it."""

    backend: Backend
    reason: str
    rejected: tuple[tuple[str, str], ...]


def backends(op: str) -> tuple[Backend, ...]:
    """The backends of an operator in the order of "auto"; ValueError for an unknown operator."""
    return _package(op).BACKENDS


def _package(op: str) -> ModuleType:
    if op not in OPERATORS:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(OPERATORS)}")
    return importlib.import_module(f"kernels.{op}")


def _named(op: str, name: str, case: Case, step: bool) -> Choice:
    """The named backend or an error, never another one."""
    table = {backend.name: backend for backend in backends(op)}
    if name not in table:
        raise ValueError(f"unknown backend {name!r} for {op}; choose one of: auto, {', '.join(table)}")
    backend = table[name]
    reason = _unable(op, backend, case, step)
    if reason is not None:
        raise ValueError(
            f"backend={name} cannot run {op} here: {reason}; choose backend=auto or another backend"
        )
    if backend.prepare is not None:
        backend.prepare(case)
    return Choice(backend, "named by the caller", ())


def _unable(op: str, backend: Backend, case: Case, step: bool) -> str | None:
    """Why a backend cannot run a case, without building anything."""
    if step and backend.step is None:
        return "it has no decoding step"
    return unsupported(case, _package(op).HEAD_SIZES) or backend.supports(case)


def _unprepared(op: str, backend: Backend, case: Case) -> str | None:
    """Builds what a backend needs; why that failed, or None."""
    if backend.prepare is None:
        return None
    try:
        backend.prepare(case)
    except BuildError as error:
        log.warning("%s: backend %s could not be built, a slower one is used\n%s", op, backend.name, error)
        return str(error)
    return None


def _automatic(op: str, case: Case, step: bool) -> Choice:
    """The first backend that can run: in the order measured on this device, else in that of the table."""
    table = backends(op)
    rejected = {backend.name: _unable(op, backend, case, step) for backend in table}
    able = [backend for backend in table if rejected[backend.name] is None]
    times = {} if step else measured.times(op, case)
    if times:
        able.sort(key=lambda backend: times.get(backend.name, float("inf")))
    chosen = None
    for backend in able:
        if chosen is not None:
            rejected[backend.name] = _slower(backend, chosen, times)
        elif backend.held_back is not None and backend.name not in times:
            rejected[backend.name] = backend.held_back
        else:
            rejected[backend.name] = _unprepared(op, backend, case)
            chosen = backend if rejected[backend.name] is None else None
    if chosen is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected.items())
        raise ValueError(f"no backend of {op} can run here: {reasons}")
    del rejected[chosen.name]
    reason = chosen.merit
    if chosen.name in times:
        reason = f"the fastest measured on this device, {times[chosen.name]:.3g} ms"
    return Choice(chosen, reason, tuple(rejected.items()))


def _slower(backend: Backend, chosen: Backend, times: dict[str, float]) -> str:
    """Why a backend that could run comes behind the chosen one."""
    if backend.name in times:
        return f"measured slower on this device, {times[backend.name]:.3g} ms"
    return backend.held_back or f"could run, but comes after {chosen.name}"


@cache
def _choose(op: str, name: str, case: Case, step: bool) -> Choice:
    """Cached body of `choose`; errors are not cached, so a repaired compiler is found again."""
    return _automatic(op, case, step) if name == "auto" else _named(op, name, case, step)


def choose(op: str, name: str, case: Case, step: bool = False) -> Choice:
    """Pick the backend of an operator.

    Args:
        op: operator name, such as "wkv7".
        name: "auto" or a backend's name. A named backend is used or refused, never replaced.
        case: the kind of call.
        step: whether one decoding step is wanted.

    Raises:
        ValueError: unknown operator or backend name, or the named backend cannot run these inputs.
        BuildError: the named backend failed to build.
    """
    return _choose(op, name, case, step)


@torch.compiler.assume_constant_result
def chosen_name(
    op: str, name: str, device_type: str, dtype: torch.dtype, head_size: int, many: bool, step: bool = False
) -> str:
    """The name of what `choose` picks, a constant to a compiled graph, which does not trace the choice."""
    return choose(op, name, Case(device_type, dtype, head_size, many), step).backend.name


def forget() -> None:
    """Drop the cached decisions, for instance after a compiler was installed."""
    _choose.cache_clear()


def explain(
    op: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    units: int = MANY_UNITS,
) -> dict:
    """Say which backend "auto" takes and why.

    Args:
        op: operator name.
        device, dtype, head_size: of the call.
        units: rows times heads.

    Returns:
        {"backend": name, "reason": why, "rejected": {name: why not}} with every other backend in "rejected".
    """
    choice = choose(op, "auto", Case(torch.device(device).type, dtype, head_size, units >= MANY_UNITS))
    return {"backend": choice.backend.name, "reason": choice.reason, "rejected": dict(choice.rejected)}
