"""What a stage keeps in the memory of one device, and which switches make it fit.

Bytes per parameter: student 4, gradients 4, AdamW 8, all float32; the teacher as teacher.dtype says. With
strategy=fsdp each device holds its share of all of these, and whole copies only of what it is using.

Activations and logits were counted on this code (tests/test_cost.py counts them again): a layer with a mixer
keeps about 96 D bytes per token for its backward pass, one with attention 32 D, its feed-forward layer 8 (16
in float32) per unit of its width; a logit costs 22 bytes under the KL, 10 under cross-entropy. With
recomputation a layer keeps its input only, and one layer at a time has the rest. Rows of several documents
need a mask of T² bytes, which attention turns into T² numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from models.cost import Work
from models.layer_plan import ATTENTION, mixer_name
from models.outline import Outline

MIXER_BYTES, ATTENTION_BYTES = 96, 32  # per token and unit of D, or of heads x N where that is wider
FEED_FORWARD_BYTES = {"bf16-mixed": 8, "32-true": 16}  # per token and unit of the inner width
LOGIT_BYTES = {"distill": 22, "cross_entropy": 10}
RESIDUAL_BYTES = 4  # the stream between layers is float32 in both precisions
BACKWARD = 1.5  # of a layer in its backward pass: what it has kept, and gradients in flight
MASK_BYTES = 4  # per row and T²: the mask, what it is made of, and the numbers that attention makes of it
GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a stage is run, as far as memory depends on it.

    Args:
        devices: processes that train together.
        strategy: single, ddp or fsdp.
        precision: trainer.precision.
        rows: per device, in one batch.
        accumulate: batches per optimiser step.
        chunk_tokens: tokens whose logits exist at one time; 0 where the stage needs no logits.
        teacher_bytes: per parameter of the teacher.
        optimizer_bytes: of state per trained parameter.
        masked: whether rows hold several documents that must not see each other.
    """

    devices: int
    strategy: str
    precision: str
    rows: int
    accumulate: int
    chunk_tokens: int
    teacher_bytes: int
    optimizer_bytes: float
    masked: bool

    @property
    def shares(self) -> int:
        """Into how many parts models are divided."""
        return self.devices if self.strategy == "fsdp" else 1


def memory(work: Work, setting: Setting) -> dict[str, float]:
    """Bytes on one device by what they are for."""
    student, teacher = work.student, work.teacher
    return {
        "teacher": setting.teacher_bytes * teacher.parameters / setting.shares if teacher else 0.0,
        "student": 4 * student.parameters / setting.shares,
        "gradients": _gradients(work) / setting.shares,
        "optimizer": setting.optimizer_bytes * work.trained / setting.shares,
        "activations": _activations(work, setting),
        "logits": _logits(work, setting),
        "gathered": _gathered(work, setting) if setting.strategy != "single" else 0.0,
    }


def host_memory(work: Work, setting: Setting, processes: int) -> float:
    """Bytes of a node's own memory at the start; with strategy=fsdp its processes take turns."""
    teacher = setting.teacher_bytes * work.teacher.parameters if work.teacher else 0
    return (1 if setting.strategy == "fsdp" else processes) * (4 * work.student.parameters + teacher)


def _gradients(work: Work) -> float:
    """Alignment holds its finished gradients until the backward pass hands them over as copies."""
    if work.kind == "forward":
        return 0.0
    return (8 if work.kind == "align" else 4) * work.trained


def _layer_bytes(model: Outline, name: str, precision: str) -> float:
    """Per token, of one layer that keeps everything for its backward pass."""
    wide = max(model.width, model.inner)
    mixing = (ATTENTION_BYTES if name == ATTENTION else MIXER_BYTES) * wide
    return mixing + FEED_FORWARD_BYTES.get(precision, 16) * model.feed_forward_width


def _activations(work: Work, setting: Setting) -> float:
    student, tokens = work.student, setting.rows * work.row_length
    layers = [_layer_bytes(student, mixer_name(entry), setting.precision) for entry in student.plan]
    held = 0.0  # when the first layer's backward pass begins; alignment differentiates layer by layer
    if work.kind in LOGIT_BYTES:
        held = RESIDUAL_BYTES * student.width * len(layers) if work.recompute else sum(layers)
    mask = setting.rows * work.row_length**2 * MASK_BYTES if setting.masked else 0.0
    return tokens * (held + BACKWARD * max(layers)) + mask


def _logits(work: Work, setting: Setting) -> float:
    """A chunk's logits, and the head's gradient: of this chunk, and without sharding of those before it."""
    if work.kind not in LOGIT_BYTES:
        return 0.0
    chunk = min(setting.chunk_tokens, setting.rows * work.row_length)
    copies = 0 if not work.rest_trained else 1 if setting.shares > 1 else 2
    return chunk * work.student.vocabulary * LOGIT_BYTES[work.kind] + copies * 4 * work.student.head


def _gathered(work: Work, setting: Setting) -> float:
    """Whole copies beside the shares: embeddings and heads stay, two units of a layer come and go, and the
    gradient of one. Without sharding, the buffers in which gradients are averaged."""
    if setting.strategy != "fsdp":
        return 4 * work.trained
    models = [(work.student, 4), *([(work.teacher, setting.teacher_bytes)] if work.teacher else [])]
    stay = sum(size * (model.embedding + model.head) for model, size in models)
    gradient = 4 * work.student.largest_unit * (work.kind != "forward")
    return stay + 2 * max(size * model.largest_unit for model, size in models) + gradient


Switch = Callable[[Work, Setting], tuple[Work, Setting] | None]


def _recompute(work: Work, setting: Setting) -> tuple[Work, Setting] | None:
    trains = work.kind in LOGIT_BYTES and not work.recompute
    return (replace(work, recompute=True), setting) if trains else None


def _fewer_rows(work: Work, setting: Setting) -> tuple[Work, Setting] | None:
    factor = next((f for f in range(2, setting.rows + 1) if setting.rows % f == 0), None)
    if factor is None:
        return None
    smaller = replace(setting, rows=setting.rows // factor, accumulate=setting.accumulate * factor)
    return work, smaller


def _smaller_chunk(work: Work, setting: Setting) -> tuple[Work, Setting] | None:
    usable = work.kind in LOGIT_BYTES and setting.chunk_tokens > 128
    return (work, replace(setting, chunk_tokens=setting.chunk_tokens // 2)) if usable else None


def _one_document(work: Work, setting: Setting) -> tuple[Work, Setting] | None:
    return (work, replace(setting, masked=False)) if setting.masked and work.row_length > 8192 else None


def _shard(work: Work, setting: Setting) -> tuple[Work, Setting] | None:
    possible = setting.devices > 1 and setting.strategy != "fsdp"
    return (work, replace(setting, strategy="fsdp")) if possible else None


def _narrow_teacher(work: Work, setting: Setting) -> tuple[Work, Setting] | None:
    return (work, replace(setting, teacher_bytes=2)) if work.teacher and setting.teacher_bytes > 2 else None


def _more_devices(work: Work, setting: Setting) -> tuple[Work, Setting] | None:
    more = replace(setting, devices=2 * setting.devices)
    return (work, more) if setting.strategy == "fsdp" and setting.devices < 1024 else None


# In the order in which they are tried; each is used as often as it helps before the next.
SWITCHES: tuple[Switch, ...] = (
    _recompute,
    _fewer_rows,
    _smaller_chunk,
    _one_document,
    _shard,
    _narrow_teacher,
    _more_devices,
)


def overrides(
    name: str, before: tuple[Work, Setting], after: tuple[Work, Setting], rows_at: str = "data"
) -> list[str]:
    """The command-line overrides of stage `name` that lead from one setting to another.

    Args:
        name: of the stage.
        before, after: the settings.
        rows_at: where the stage's config holds rows_per_device.
    """
    (old_work, old), (new_work, new) = before, after
    said = {
        "trainer.recompute_blocks=true": new_work.recompute != old_work.recompute,
        f"stage.{name}.{rows_at}.rows_per_device={new.rows}": new.rows != old.rows,
        f"stage.{name}.accumulate={new.accumulate}": new.accumulate != old.accumulate,
        f"stage.{name}.objective.chunk_tokens={new.chunk_tokens}": new.chunk_tokens != old.chunk_tokens,
        f"stage.{name}.data.cross_documents=true": new.masked != old.masked,
        "strategy=fsdp": new.strategy != old.strategy,
        "teacher.dtype=bfloat16": new.teacher_bytes != old.teacher_bytes,
        f"{new.devices} devices (hardware.nodes, trainer.num_nodes)": new.devices != old.devices,
    }
    return [words for words, changed in said.items() if changed]


def make_it_fit(work: Work, setting: Setting, capacity: float) -> tuple[Work, Setting] | None:
    """The setting nearest to the given one that fits, or None where no switch helps.

    One switch alone is tried first, in the order of SWITCHES; then all of them on top of each other, and
    those that turn out not to be needed are taken back.
    """

    def turned(switches: Sequence[Switch]) -> tuple[Work, Setting] | None:
        pair = (work, setting)
        for switch in switches:
            further: tuple[Work, Setting] | None = pair
            while further is not None and sum(memory(*further).values()) > capacity:
                pair, further = further, switch(*further)
            pair = further or pair
        return pair if sum(memory(*pair).values()) <= capacity else None

    for switch in SWITCHES:
        if (found := turned([switch])) is not None:
            return found
    needed = list(SWITCHES)
    for switch in SWITCHES:
        without = [other for other in needed if other is not switch]
        needed = without if turned(without) is not None else needed
    return turned(needed)
