"""Students: the teacher's own Hugging Face model with mixers where attention was."""

from torch import nn
from transformers import PreTrainedModel

from models.architectures import attention_modules
from models.mixers.base import Mixer


def student_mixers(student: PreTrainedModel) -> dict[int, Mixer]:
    """Layer index -> mixer, for the layers whose attention has been replaced; empty for any other model."""
    if not any(isinstance(module, Mixer) for module in student.modules()):
        return {}
    return {
        index: module for index, module in attention_modules(student).items() if isinstance(module, Mixer)
    }


def count_parameters(module: nn.Module) -> int:
    """Number of distinct parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())
