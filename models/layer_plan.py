"""The layer plan: what each decoder layer of the student has in the place of attention."""

from collections.abc import Sequence
from dataclasses import dataclass

ATTENTION = "attention"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A plan as the config states it.

    Args:
        mixer: what replaces attention, for example `rwkv7`; or a list that is repeated over the depth:
            [rwkv7, rwkv7, rwkv7, sparse] puts `sparse` in every fourth layer.
        keep: decoder layers (from 0; negative counts from the end) that keep attention.
        layers: the whole plan, one name per layer; `mixer` is then not asked, and `keep` must be empty.

    Raises:
        ValueError: for contradictory or empty statements.
    """

    mixer: str | Sequence[str] = "rwkv7"
    keep: Sequence[int] = ()
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and self.keep:
            raise ValueError("student.layer_plan: give either `layers` (the whole list) or `keep`, not both.")
        if not self.mixer:
            raise ValueError("student.layer_plan.mixer is empty; name a mixer, or a list of them to repeat.")

    def resolve(self, layer_count: int, known: Sequence[str]) -> list[str]:
        """One name per layer.

        Args:
            layer_count: decoder layers of the teacher.
            known: names of the mixers there are.

        Raises:
            ValueError: for a wrong number of layers, an unknown name or an index out of range.
        """
        if self.layers is not None:
            plan = list(self.layers)
            if len(plan) != layer_count:
                raise ValueError(
                    f"student.layer_plan.layers has {len(plan)} entries; the teacher has {layer_count} "
                    "layers."
                )
        else:
            outside = [index for index in self.keep if not -layer_count <= index < layer_count]
            if outside:
                raise ValueError(
                    f"student.layer_plan.keep={list(self.keep)}: {outside} is outside the teacher's "
                    f"{layer_count} layers."
                )
            kept = {index % layer_count for index in self.keep}
            cycle = [self.mixer] if isinstance(self.mixer, str) else self.mixer
            plan = [ATTENTION if index in kept else cycle[index % len(cycle)] for index in range(layer_count)]
        names = [*known, ATTENTION]
        unknown = sorted(set(plan) - set(names))
        if unknown:
            raise ValueError(f"student.layer_plan: {unknown} is unknown; choose from {', '.join(names)}.")
        return plan
