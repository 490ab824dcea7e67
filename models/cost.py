"""How many floating-point operations a stage needs, and how long a machine takes over them.

A linear map costs 2 operations per parameter and token forward, 2 for the gradient of its input and 2 for
that of its weights. Below, A stands for the parameters that mix tokens, M for the other layers, N for all.

    align           2 (A + M) + 6 A    the teacher's stack forward, without head; mixers forward and backward
    distill         10 N               teacher 2 N; student 2 N forward, 2 N recomputed, 4 N backward
    cross_entropy   8 N                the student's share of it
    forward         2 N per model      a stage that only looks

Without trainer.recompute_blocks distill needs 8 N and cross_entropy 6 N. The head runs once in either case,
because its loss is differentiated chunk by chunk. Where a group of weights is frozen, its 2 for the weights'
gradient falls away. On top come the operators, per token and layer:

    softmax attention   2 T D'          half of the T keys on average, 2 products; D' = heads x N
    RWKV-7, RWKV-6      9 D' N, 5 D' N  decay, removal, writing and reading of one state

For 7 B at T = 512 attention adds 0.7 % to the teacher's forward pass and the states 0.4 %; at T = 16,384
attention adds 23 %, so a long stage with a teacher or with kept layers pays for it.

These are rules of thumb, as the literature counts. The code does a little less: a mixer's first maps give the
teacher's hidden state no gradient, and torch stops computing a layer again before its last map. Sparse
and windowed attention count as attention to all keys; sparse attention does compute masks of all.
Not counted: evaluation, text samples, checkpoints, reading data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernels.case import HEAD_SIZES
from models.layer_plan import ATTENTION, mixer_name, teacher_part
from models.objectives import Align
from models.outline import Outline

KINDS = ("align", "distill", "cross_entropy", "forward")
STATE_OPERATIONS = {"rwkv7": 9, "rwkv6": 5}  # per token, times D' N; any other layer counts as attention


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine to plan for.

    Args:
        name: as in tables.
        devices: of one node.
        nodes: machines of that kind.
        memory_gib: memory of one device as its driver reports it, GiB.
        reserved_gib: of that, what runtime, communication and fragmentation take.
        peak_flops: trainer.precision -> dense peak of one device, floating-point operations per second.
        price_per_device_hour: in `currency`.
        utilisation: kind of stage (align, distill, cross_entropy, forward) -> share of the peak reached.
        currency: of the price.

    Raises:
        ValueError: for a value out of range or a kind that is missing.
    """

    name: str
    devices: int
    memory_gib: float
    peak_flops: dict[str, float]
    utilisation: dict[str, float]
    price_per_device_hour: float
    nodes: int = 1
    reserved_gib: float = 2.0
    currency: str = "USD"

    def __post_init__(self) -> None:
        if set(self.utilisation) != set(KINDS):
            raise ValueError(
                f"hardware.utilisation needs exactly {', '.join(KINDS)}; got {sorted(self.utilisation)}."
            )
        shares = {kind: share for kind, share in self.utilisation.items() if not 0 < share <= 1}
        if shares:
            raise ValueError(
                f"hardware.utilisation={shares} must lie in (0, 1]: a share of hardware.peak_flops."
            )
        if self.devices < 1 or self.nodes < 1:
            raise ValueError(
                f"hardware.devices={self.devices}, hardware.nodes={self.nodes} must be at least 1."
            )
        if self.memory_gib <= self.reserved_gib:
            raise ValueError(
                f"hardware.memory_gib={self.memory_gib} must be more than "
                f"hardware.reserved_gib={self.reserved_gib}."
            )
        if self.price_per_device_hour < 0:
            raise ValueError(
                f"hardware.price_per_device_hour={self.price_per_device_hour} must not be negative."
            )

    @property
    def capacity(self) -> float:
        """Bytes of one device that a run may fill."""
        return (self.memory_gib - self.reserved_gib) * 2**30

    def peak(self, precision: str) -> float:
        """Peak of one device at a `trainer.precision`.

        Raises:
            ValueError: where the preset does not know it.
        """
        if precision not in self.peak_flops:
            raise ValueError(
                f"hardware.peak_flops has no {precision} (trainer.precision); it has "
                f"{', '.join(self.peak_flops)}."
            )
        return self.peak_flops[precision]


@dataclass(frozen=True)
class Work:
    """What one stage does to its models.

    Args:
        kind: one of KINDS.
        student: its outline.
        teacher: its outline, or None where the run has none.
        asks_teacher: whether the stage runs the teacher, which is in memory in any case.
        mixers_trained, inserted_trained, rest_trained: whether these groups have a learning rate
            (models/stage.py).
        row_length: T, tokens.
        recompute: whether layers forget their activations.
    """

    kind: str
    student: Outline
    teacher: Outline | None = None
    asks_teacher: bool = True
    mixers_trained: bool = True
    inserted_trained: bool = True
    rest_trained: bool = True
    row_length: int = 512
    recompute: bool = False

    @property
    def trained(self) -> int:
        """Parameters with a learning rate."""
        return self.trained_of(self.student.parameters)

    def trained_of(self, parameters: int) -> int:
        """Of so many of the student's parameters, mixers and inserted layers among them, those with a
        learning rate."""
        student = self.student
        rest = parameters - student.mixers - student.inserted
        added = student.inserted * self.inserted_trained
        return student.mixers * self.mixers_trained + added + rest * self.rest_trained


def kind_of(objective: Any) -> str:
    """The kind of stage that minimises `objective`; None is a stage that does not train."""
    if objective is None:
        return "forward"
    if isinstance(objective, Align):
        return "align"
    return "distill" if objective.needs_teacher else "cross_entropy"


def operator_flops(model: Outline, row_length: int, entries: Sequence[str] | None = None) -> float:
    """Forward operations per token of all layers' operators, projections left out.

    Args:
        model: teacher or student.
        row_length: T.
        entries: of its plan, the layers to count; None means all.
    """
    names = list(map(mixer_name, model.plan if entries is None else entries))
    states = (
        sum(STATE_OPERATIONS.get(name, 0) for name in names)
        * model.inner
        * min(model.head_size, max(HEAD_SIZES))
    )
    return states + 2 * row_length * model.inner * sum(name not in STATE_OPERATIONS for name in names)


def flops_per_token(work: Work) -> float:
    """Operations that one token of a stage costs (formulas: top of this file)."""
    student, teacher = work.student, work.teacher
    if work.kind == "align":
        aligned = [name for name in teacher_part(student.plan) if name != ATTENTION]
        mixers = 2 * student.mixers + operator_flops(student, work.row_length, aligned)
        return _backbone(teacher, work.row_length) + 3 * mixers
    observed = _forward(teacher, work.row_length) if teacher and work.asks_teacher else 0.0
    if work.kind == "forward":
        return observed + _forward(student, work.row_length)
    passes = 4 if work.recompute else 3
    frozen = student.multiplied - work.trained_of(student.multiplied)
    head = (6 if work.rest_trained else 4) * student.head
    return observed + passes * _backbone(student, work.row_length) + head - 2 * frozen


def seconds(flops: float, kind: str, hardware: Hardware, devices: int, precision: str) -> float:
    """How long `devices` devices of the machine take."""
    return flops / (devices * hardware.peak(precision) * hardware.utilisation[kind])


def _backbone(model: Outline, row_length: int) -> float:
    return 2 * model.multiplied + operator_flops(model, row_length)


def _forward(model: Outline, row_length: int) -> float:
    return _backbone(model, row_length) + 2 * model.head
