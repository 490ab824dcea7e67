"""Students that are trained from nothing: a new decoder with mixers, and no teacher."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.config import StudentConfig
from models.conversion import build_student, check_plan
from models.layer_plan import LayerPlan
from models.student_folder import Student


def new_student(
    tokenizer: PreTrainedTokenizerBase,
    *,
    parent: Callable[[PreTrainedTokenizerBase], PreTrainedModel],
    layer_plan: LayerPlan,
    mixers: Mapping[str, Any],
) -> Student:
    """A randomly initialised student, its mixers included.

    Args:
        tokenizer: sets the vocabulary.
        parent: makes the decoder whose attention is replaced (models/teacher.py, `new_model`).
        layer_plan: what stands in each layer.
        mixers: name -> options.

    Raises:
        ValueError: for a plan that does not fit the parent's layers, or options of the wrong kind.
    """
    config = StudentConfig(layer_plan=layer_plan, mixers=mixers, start="random")
    model = parent(tokenizer)
    plan = check_plan(config, model.config)
    student, _ = build_student(model, config, plan)
    return Student(student, plan, config)
