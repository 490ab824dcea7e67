"""What a layer's attention is worth: one function per criterion, and the table of them.

Shape letters: B rows, T tokens, D hidden width.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from models import ranks
from models.align import beside_attention
from models.architectures import attention_modules, replace_attention
from models.evaluation import copy_gain, evaluate, own_batches
from models.student import teacher_places

log = logging.getLogger(__name__)
Batches = list[dict[str, Tensor]]
CAST = ("hidden_states", "position_embeddings", "attention_mask")  # what attention reads, in its own dtype
ScoringRows = Mapping[str, Batches]  # kind -> batches: `plain`, `copies` (a passage twice), `retrieval`


class Candidates(NamedTuple):
    """The layers to choose from, by the teacher's numbers, where the student has mixers and the teacher
    attention; `keep` will be chosen."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    layers: list[int]
    keep: int

    def modules(self) -> dict[int, nn.Module]:
        """What stands in the student's candidates where the teacher has its attention."""
        places, modules = teacher_places(self.student), attention_modules(self.student)
        return {index: modules[places[index]] for index in self.layers}


class Criterion(NamedTuple):
    """One way to score layers.

    Args:
        scores: candidates and rows to a number per layer; the larger, the more its attention is worth.
        reads: kinds of rows.
        each_layer: whether all rows are read anew for each layer, and once more; otherwise once.
        label: what the numbers are, with the unit.
    """

    scores: Callable[[Candidates, ScoringRows], dict[int, float]]
    reads: tuple[str, ...]
    each_layer: bool
    label: str


def kl_saved(candidates: Candidates, rows: ScoringRows) -> dict[int, float]:
    """Drop of KL(teacher || student), on plain rows and repeated passages alike, when the one layer has its
    attention back."""

    def kl() -> float:
        found = [evaluate(candidates.student, candidates.teacher, rows[kind]) for kind in ("plain", "copies")]
        return sum(sums.means()["kl"] for sums in found) / len(found)

    return _restored_one_by_one(candidates, kl)


def copying_saved(candidates: Candidates, rows: ScoringRows) -> dict[int, float]:
    """Rise of the copying gain when the one layer has its attention back."""
    return _restored_one_by_one(
        candidates, lambda: -copy_gain(evaluate(candidates.student, None, rows["copies"]))["gain"]
    )


@torch.no_grad()
def alignment_error(candidates: Candidates, rows: ScoringRows) -> dict[int, float]:
    """What layer-wise alignment has left: the squared error of the mixer's output, as a share of the energy
    of the attention's output. Both read the teacher's hidden states."""
    mixers = candidates.modules()
    sums = torch.zeros(len(mixers), 2, dtype=torch.float64)
    places = {index: place for place, index in enumerate(mixers)}
    device = next(candidates.teacher.parameters()).device
    with _taking_any_dtype(mixers.values()), _evaluating(candidates.student):
        for number, batch in own_batches(rows["plain"]):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            real, counts = batch["document_ids"] >= 0, number is not None

            def add(
                index: int, kwargs: dict, given: tuple, real: Tensor = real, counts: bool = counts
            ) -> None:
                target = given[0][real].double()
                error = mixers[index](**kwargs)[0][real].double() - target
                found = torch.stack([error.square().sum(), target.square().sum()])
                sums[places[index]] += counts * found.cpu()

            beside_attention(list(mixers), candidates.teacher, batch, add)
    errors, energy = torch.stack(ranks.gather(sums)).sum(0).unbind(1)
    return dict(zip(mixers, (errors / energy.clamp_min(1e-12)).tolist(), strict=True))


def recall_lost(candidates: Candidates, rows: ScoringRows) -> dict[int, float]:
    """Rise of the teacher's loss on the answers of retrieval rows when the one layer has the student's mixer.

    All other layers keep attention, so what is lost is what the mixer itself cannot recall. A mixer that
    mixes in the first mixer's value takes its own for it: there is no other.
    """

    def loss() -> float:
        return evaluate(candidates.teacher, None, rows["retrieval"]).means()["loss"]

    mixers, found = candidates.modules(), {}
    baseline = loss()
    for index in candidates.layers:
        with exchanged(candidates.teacher, {index: mixers[index]}):
            found[index] = loss() - baseline
        log.info("Layer %d without attention: %.4f nats/token of the answers lost", index, found[index])
    return found


def evenly_spread(candidates: Candidates, rows: ScoringRows) -> dict[int, float]:
    """1 for the last layer of each of `keep` groups of neighbours, as equal in size as can be; 0 for
    others."""
    layers, keep = candidates.layers, candidates.keep
    last = {layers[number * len(layers) // keep - 1] for number in range(1, keep + 1)}
    return {index: float(index in last) for index in layers}


CRITERIA = {
    "kl": Criterion(kl_saved, ("plain", "copies"), True, "KL saved by keeping attention (nats/token)"),
    "copy": Criterion(copying_saved, ("copies",), True, "copying gain saved (nats/token)"),
    "alignment": Criterion(alignment_error, ("plain",), False, "alignment error (share of energy)"),
    "recall": Criterion(recall_lost, ("retrieval",), True, "loss added to answers (nats/token)"),
    "uniform": Criterion(evenly_spread, (), False, "evenly spread (1 is kept)"),
}


def _restored_one_by_one(candidates: Candidates, loss: Callable[[], float]) -> dict[int, float]:
    """How much a loss of the student falls when the one layer borrows the teacher's attention."""
    attention, found = attention_modules(candidates.teacher), {}
    baseline = loss()
    for index in candidates.layers:
        with exchanged(candidates.student, {index: attention[index]}):
            found[index] = baseline - loss()
        log.info("Layer %d with its attention back: %.4f nats/token better", index, found[index])
    return found


@contextmanager
def exchanged(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> Iterator[None]:
    """Lets a model borrow another's modules in the place of its attention, in any dtype.

    Args:
        model: has its own modules back afterwards; the borrowed ones are as before.
        modules: number of the teacher's layer -> module.
    """
    modes = {index: module.training for index, module in modules.items()}
    places = teacher_places(model)
    before = replace_attention(model, {places[index]: module for index, module in modules.items()})
    try:
        with _taking_any_dtype(modules.values()):
            yield
    finally:
        replace_attention(model, before)
        for index, module in modules.items():
            module.train(modes[index])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _taking_any_dtype(modules: Any) -> Iterator[None]:
    """Makes modules read and answer in the dtype of the hidden states that they are given: the teacher may
    have 16 bits where the student has 32."""

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        own = next(module.parameters()).dtype
        asked.append(kwargs["hidden_states"].dtype)
        cast = tree_map(lambda value: _cast(value, own), {n: v for n, v in kwargs.items() if n in CAST})
        return args, kwargs | cast

    def leave(module: nn.Module, args: tuple, output: tuple) -> tuple:
        return (_cast(output[0], asked.pop()), *output[1:])

    asked: list[torch.dtype] = []
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
