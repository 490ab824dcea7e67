"""Students: the teacher's own Hugging Face model with mixers where attention was, and perhaps with layers
between those of the teacher.

A layer of a student has a place, from 0, which is its index in the model; a layer that the teacher has too
also has the teacher's number (models/layer_plan.py).
"""

from torch import nn
from transformers import PreTrainedModel

from models.architectures import attention_modules, decoder_layers
from models.mixers.base import Mixer

GROUPS = ("inserted", "mixers", "index", "rest")  # of parameters that have a learning rate of their own


def student_mixers(student: PreTrainedModel) -> dict[int, Mixer]:
    """Place -> mixer, for the layers that have one, inserted ones among them; empty for any other model."""
    if not any(isinstance(module, Mixer) for module in student.modules()):
        return {}
    return {
        index: module for index, module in attention_modules(student).items() if isinstance(module, Mixer)
    }


def inserted_layers(student: PreTrainedModel) -> tuple[int, ...]:
    """Places of the decoder layers that the teacher does not have."""
    layers = decoder_layers(student)
    return tuple(index for index, layer in enumerate(layers) if getattr(layer, "inserted", False))


def teacher_places(student: PreTrainedModel) -> list[int]:
    """For each of the teacher's layers, in order, its place in the student; in a teacher, its number."""
    inserted = inserted_layers(student)
    return [place for place in range(len(decoder_layers(student))) if place not in inserted]


def aligned_mixers(student: PreTrainedModel) -> dict[int, Mixer]:
    """Number -> mixer, for the teacher's layers whose attention has been replaced: those that can be compared
    with it."""
    mixers = student_mixers(student)
    places = teacher_places(student) if mixers else []
    return {number: mixers[place] for number, place in enumerate(places) if place in mixers}


def parameter_groups(student: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The learning-rate groups, which together hold every parameter once; a group may be empty.

    `index`: what chooses blocks in mixers that have such a part; `inserted`: all else of layers that the
    teacher does not have; `mixers`: all else of what replaced attention; `rest`: the teacher's own weights.
    """
    mixers, layers = list(student_mixers(student).values()), decoder_layers(student)
    owners = {
        "index": [mixer.index for mixer in mixers if isinstance(getattr(mixer, "index", None), nn.Module)],
        "inserted": [layers[index] for index in inserted_layers(student)],
        "mixers": mixers,
        "rest": [student],
    }
    groups: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    known: set[int] = set()
    for group, modules in owners.items():
        for parameter in (p for module in modules for p in module.parameters()):
            if id(parameter) not in known:
                known.add(id(parameter))
                groups[group].append(parameter)
    return groups


def count_parameters(module: nn.Module) -> int:
    """Number of distinct parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())
