"""The lm-evaluation-harness: looks up tasks, and runs them on a model. Importing it takes seconds."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pipeline.evaluation import Subject

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)
NAMES_SHOWN = 12
TOKENS_WRITTEN = 256  # lm-eval's default of max_gen_toks


def load_tasks(names: Sequence[str], include_path: str | None, include_defaults: bool) -> dict[str, Any]:
    """The tasks of these names, with their data.

    Args:
        names: of tasks, groups or tags; `*` stands for anything.
        include_path: folder of task files, or None; looked at first.
        include_defaults: whether lm-eval's own tasks can be named.

    Returns:
        {"tasks", "groups", "group_map"}, as lm-eval's task manager gives them.

    Raises:
        ValueError: for a name that is no task, or data that cannot be read.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)  # it tells every step
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    # lm-eval's own list is long: it is read only where the folder is not enough.
    if include_path is not None and include_defaults and not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path, include_defaults=True)
    own = "" if include_path is None else f"include_path={include_path}"
    place = f"{own}{' and ' if own else ''}lm-eval's own tasks" if include_defaults else own
    found = [task for name in names for task in _matching(name, manager, place)]
    try:
        return manager.load(list(dict.fromkeys(found)))
    except Exception as error:  # whatever a task file and the readers of its data come up with
        why = " ".join(str(error).split())
        raise ValueError(
            f"tasks={list(names)} cannot be loaded ({type(error).__name__}: {why}). Check the task "
            "files and the paths of their data (from where you start); tasks of the Hub need the network."
        ) from error


def _matching(name: str, manager: "TaskManager", place: str) -> list[str]:
    """The tasks that a name means.

    Raises:
        ValueError: where there is none.
    """
    found = manager.match_tasks([name])
    if found:
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    if near:
        known = f"did you mean {', '.join(near)}?"
    else:
        known = f"there are {', '.join(manager.all_tasks[:NAMES_SHOWN]) or 'no readable task files'}."
    raise ValueError(f"tasks: {name!r} is unknown in {place}; {known}")


def check_room(tasks: Mapping[str, Any], max_length: int | None) -> None:
    """Holds `max_length` against the texts that tasks want written.

    Raises:
        ValueError: where nothing would be left for the question.
    """
    for name, task in tasks.items():
        if max_length is not None and task.OUTPUT_TYPE == "generate_until":
            written = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", TOKENS_WRITTEN)
            if written >= max_length:
                raise ValueError(
                    f"max_length={max_length} leaves no room: {name} wants up to {written} tokens written "
                    "after its question. Raise max_length, or lower max_gen_toks in the task file."
                )


def set_examples(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Sets how many solved examples precede each question; a task that says 0 keeps it, as in lm-eval."""
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if num_fewshot is None or own == 0:
            task.set_config(key="num_fewshot", value=own or 0)
            if num_fewshot:
                log.warning(
                    "num_fewshot=%d has no effect on %s, which is defined without.", num_fewshot, name
                )
        else:
            task.set_config(key="num_fewshot", value=num_fewshot)


def run_tasks(
    subject: Subject,
    tasks: dict[str, Any],
    *,
    limit: float | None,
    batch_size: int,
    max_length: int | None,
    bootstrap_samples: int,
    fewshot_seed: int,
    seed: int,
) -> dict[str, Any]:
    """The results of one model: lm-eval's {"results", "higher_is_better", "n-samples", "n-shot", ...}.

    Every model gets the same examples and the same draws.

    Args:
        subject: loaded for this, and dropped afterwards.
        tasks: of `load_tasks`.
        limit, batch_size, max_length, bootstrap_samples, fewshot_seed: as for the suite.
        seed: of texts that are drawn.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(fewshot_seed)
    torch.manual_seed(seed)
    harness = harness_model(subject, batch_size, max_length)
    return evaluate(harness, tasks, limit=limit, bootstrap_iters=bootstrap_samples, log_samples=False)


def harness_model(subject: Subject, batch_size: int, max_length: int | None) -> Any:
    """A model as lm-eval wants it; arguments as for `run_tasks`."""
    from lm_eval.models.huggingface import HFLM

    with _only_errors("lm_eval.models.huggingface"):  # it warns of having been given a model, as we mean to
        return HFLM(
            pretrained=subject.load(),
            tokenizer=subject.tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        )


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
