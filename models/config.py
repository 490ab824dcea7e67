"""The student as a config describes it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from models.layer_plan import ATTENTION, LayerPlan, is_inserted, mixer_name
from models.mixers import MIXERS

STARTS = ("transfer", "random_mixers", "random")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What becomes of the teacher.

    Args:
        layer_plan: which layers are replaced, and by what.
        mixers: mixer name -> its options, for example {"rwkv7": RWKV7Options()}; `attention` without options,
            or with its defaults, is the teacher's own module.
        start: `transfer` (mixers inherit the attention's weights), `random_mixers` (they do not, the rest of
            the parent does) or `random` (nothing is inherited: the from-scratch control).

    Raises:
        ValueError: for an unknown start or mixer, or options of the wrong kind.
    """

    layer_plan: LayerPlan
    mixers: Mapping[str, Any] = field(default_factory=dict)
    start: str = "transfer"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"student.start={self.start!r} is unknown; choose one of {', '.join(STARTS)}.")
        for name, options in self.mixers.items():
            if name not in MIXERS:
                raise ValueError(f"student.mixers: {name!r} is unknown; choose from {', '.join(MIXERS)}.")
            if not isinstance(options, MIXERS[name].options_class):
                raise ValueError(
                    f"student.mixers.{name} needs `_target_: {MIXERS[name].options_class.__name__}`."
                )

    def options(self, mixer: str) -> Any:
        """The options of a mixer, its defaults where the config says nothing."""
        return self.mixers.get(mixer) or MIXERS[mixer].options_class()

    def entry_options(self, entry: str) -> Any:
        """The options of what an entry of a plan names. Banks of induction heads are for the layers of the
        teacher that have such heads, by its numbers, so an inserted layer has none."""
        options = self.options(mixer_name(entry))
        if is_inserted(entry) and getattr(options, "induction_layers", None):
            return replace(options, induction_layers=[])
        return options

    def is_mixer(self, name: str) -> bool:
        """Whether a layer that a plan gives this name holds a mixer, not the teacher's own attention."""
        return name != ATTENTION or getattr(self.mixers.get(name), "changes_attention", False)

    def replaced(self, plan: Sequence[str]) -> list[int]:
        """The places in a plan that hold a mixer, those of inserted layers among them."""
        return [place for place, entry in enumerate(plan) if self.is_mixer(mixer_name(entry))]


def plain_options(options: Any) -> dict[str, Any]:
    """Options as plain data."""
    return asdict(options)


def options_from(mixer: str, data: Mapping[str, Any]) -> Any:
    """Options from what `plain_options` gave."""
    return MIXERS[mixer].options_class(**data)
