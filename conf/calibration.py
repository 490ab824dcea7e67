"""Whether a calibration stands where it belongs: before anything trains, on a student with decays to
set."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig


def check_calibrations(config: DictConfig, stages: Sequence[Any], student: Any, teacher: Any) -> None:
    """Refuses a calibration that would overwrite what was learned, or find nothing to set.

    Args:
        config: of the run.
        stages: built, in order.
        student, teacher: built.

    Raises:
        ValueError: naming the key and the fix.
    """
    from models.calibration import NOTHING_TO_SET, CalibrateMixers, can_be_set

    places = [place for place, stage in enumerate(stages) if isinstance(stage, CalibrateMixers)]
    for place in places:
        name = stages[place].name
        if config.init_from is not None:
            raise ValueError(
                f"stages: {name} would overwrite what the student of init_from has learned; leave it out."
            )
        trained = [stage.name for stage in stages[:place] if hasattr(stage, "learning_rate")]
        if trained:
            raise ValueError(f"stages: {name} would overwrite what {trained[0]} has learned; put it first.")
        if not can_be_set(_plan(student, teacher)):
            raise ValueError(f"stage.{name}: {NOTHING_TO_SET}")


def _plan(student: Any, teacher: Any) -> list[str]:
    """What stands in each layer; the teacher's config file tells how many there are."""
    from models.conversion import check_plan
    from models.teacher import load_hf_config

    return check_plan(student, load_hf_config(teacher))
