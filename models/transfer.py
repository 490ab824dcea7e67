"""Moves an attention's weights into the mixer that takes its place, and accounts for every tensor.

Shape letters: H heads, G key/value heads, N head size.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.architectures import Architecture, architecture_of, attention_modules, decoder_layers
from models.config import StudentConfig
from models.mixers.base import AttentionShape, Mixer
from models.student import inserted_layers, teacher_places

PROJECTIONS = {"receptance": "query", "key": "key", "value": "value", "output": "output"}
NORMS = {"receptance_norm": "query_norm", "key_norm": "key_norm"}
OF_KEY_HEADS = ("key", "value", "key_norm")  # parts of a mixer that have key/value heads, not query heads


class TransferRow(NamedTuple):
    """What became of one tensor: source in the teacher ("" for a new one), target in the student ("" if
    dropped). A fused tensor has a row for each range of its rows, as in `qkv_proj.weight[64:96]`; a tensor of
    which an inserted layer has a copy, one more."""

    source: str
    target: str
    action: str
    shape: str


class Origin(NamedTuple):
    """Where a tensor of a mixer comes from.

    Args:
        tensor: its name within the attention.
        rows: of it, first and last (exclusive); None means all.
        repeats: times that each of the G heads is written, one after the other.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    repeats: int = 1

    @property
    def name(self) -> str:
        """As in the table."""
        return self.tensor if self.rows is None else "{}[{}:{}]".format(self.tensor, *self.rows)

    @property
    def action(self) -> str:
        """As in the table."""
        return self.action_as("moved")

    def action_as(self, verb: str) -> str:
        """The action, under another name for the transfer itself."""
        return verb + ", split" * (self.rows is not None) + ", repeated" * (self.repeats > 1)

    def read(self, attention: Mapping[str, Tensor], kv_heads: int) -> Tensor:
        """The tensor that the mixer gets, from those of the attention by name; `kv_heads` is its G."""
        tensor = attention[self.tensor]
        tensor = tensor if self.rows is None else tensor[slice(*self.rows)]
        if self.repeats == 1:
            return tensor
        return tensor.unflatten(0, (kv_heads, -1)).repeat_interleave(self.repeats, dim=0).flatten(0, 1)


def fused_rows(shape: AttentionShape) -> dict[str, tuple[int, int]]:
    """Part of an attention -> its rows in a projection of query, key and value."""
    inner, kv_inner = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return {
        "query": (0, inner),
        "key": (inner, inner + kv_inner),
        "value": (inner + kv_inner, inner + 2 * kv_inner),
    }


def origins(mixer: Mixer, architecture: Architecture) -> dict[str, Origin]:
    """Name of a tensor within the mixer -> where it comes from; what is not there is new."""
    found = {}
    for part, role in (PROJECTIONS | NORMS).items():
        module, rows = getattr(mixer, part, None), None
        if module is None:
            continue
        source = getattr(architecture, role)
        if architecture.fused and role in ("query", "key", "value"):
            source, rows = architecture.fused, fused_rows(mixer.shape)[role]
        one_for_all_heads = part in NORMS and mixer.shape.norm_scope == "head"
        shared = part in OF_KEY_HEADS and not one_for_all_heads
        repeats = getattr(mixer, "kv_heads", mixer.shape.kv_heads) // mixer.shape.kv_heads if shared else 1
        for name, _ in module.named_parameters():
            found[f"{part}.{name}"] = Origin(f"{source}.{name}", rows, repeats)
    return found


@torch.no_grad()
def fill(mixer: Mixer, attention: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Copies the attention's projections and norms, given by their names in it, into the mixer."""
    for name, origin in origins(mixer, architecture).items():
        mixer.get_parameter(name).copy_(origin.read(attention, mixer.shape.kv_heads))


@torch.no_grad()
def draw(mixer: Mixer, std: float) -> None:
    """Draws the projections at random, as if there were no attention to inherit from; `std` is that of the
    model's other weights."""
    for part in PROJECTIONS:
        module = getattr(mixer, part, None)
        if module is not None:
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    mixer.drawn()


def transfer_table(
    teacher: PreTrainedModel, student: PreTrainedModel, config: StudentConfig, untied: bool = False
) -> list[TransferRow]:
    """One row for every tensor of the teacher, and for every tensor that only the student has; inserted
    layers have rows of their own (models/expansion.py)."""
    moved, renamed = _destinations(teacher, student)
    layers = decoder_layers(student)
    inserted = tuple(f"{module_name(student, layers[place])}." for place in inserted_layers(student))
    new = {n: tensor for n, tensor in student.named_parameters() if not n.startswith(inserted)}
    rows = []
    for source, tensor in teacher.named_parameters(remove_duplicate=False):
        ending = ", untied" if untied and tensor is teacher.get_output_embeddings().weight else ""
        if source in moved:
            for target, origin in moved[source]:
                action = origin.action if config.start == "transfer" else "random"
                name = source.removesuffix(origin.tensor) + origin.name
                rows.append(TransferRow(name, target, action, _shape(new.pop(target))))
        elif (target := renamed.get(source, source)) in new:
            action = "random" if config.start == "random" else "kept"
            rows.append(TransferRow(source, target, action + ending, _shape(new.pop(target))))
        else:
            rows.append(TransferRow(source, "", "dropped", _shape(tensor)))
    return rows + [TransferRow("", name, "new", _shape(tensor)) for name, tensor in new.items()]


def _destinations(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> tuple[dict[str, list[tuple[str, Origin]]], dict[str, str]]:
    """Where the tensors of the teacher's layers go: those that a mixer inherits, and the new names of the
    others."""
    architecture = architecture_of(teacher.config.model_type)
    moved: dict[str, list[tuple[str, Origin]]] = {}  # source -> targets
    renamed: dict[str, str] = {}
    for number, place in enumerate(teacher_places(student)):
        old, new = attention_prefix(teacher, number), attention_prefix(student, place)
        mixer = attention_modules(student)[place]
        for target, origin in origins(mixer, architecture).items() if isinstance(mixer, Mixer) else ():
            moved.setdefault(f"{old}.{origin.tensor}", []).append((f"{new}.{target}", origin))
        layer = decoder_layers(teacher)[number]
        old, new = module_name(teacher, layer), module_name(student, decoder_layers(student)[place])
        renamed |= {f"{old}.{name}": f"{new}.{name}" for name, _ in layer.named_parameters()}
    return moved, renamed


def attention_prefix(model: PreTrainedModel, place: int) -> str:
    """The name, within the model, of what stands in a layer where the teacher has its attention."""
    return module_name(model, attention_modules(model)[place])


def module_name(model: nn.Module, module: nn.Module) -> str:
    """The name of a module within a model."""
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
