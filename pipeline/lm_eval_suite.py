"""The evaluation suite `lm_eval`: tasks of the lm-evaluation-harness, its own or from files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation import Subject
from reports.eval_plots import task_bars
from reports.eval_report import Figure, Findings, Picture

PICTURE = Picture(
    file="plots/tasks.png",
    heading="Scores",
    note="Thin lines are standard errors; the dashed line is the score of guessing, where it is known.",
)
EXPLANATION = (
    "Tasks of the lm-evaluation-harness; ± is the standard error over the documents of a task. Relative is "
    "model / teacher, both above the score of guessing where `chance` names one, else the plain ratio."
)
# key -> smallest value
LEAST = {"num_fewshot": 0, "bootstrap_samples": 0, "batch_size": 1, "max_length": 2}
OPTIONAL = ("num_fewshot", "max_length")


@dataclass(frozen=True, kw_only=True)
class LmEvalSuite:
    """Runs tasks on the model and on its teacher, with the same examples and the same limits.

    Args:
        tasks: names of tasks, groups or tags; `*` stands for anything.
        include_path: folder of task files, or None.
        include_defaults: whether lm-eval's own tasks can be named as well.
        limit: documents of each task; below 1 a share of them; None takes all.
        num_fewshot: solved examples before each question; None leaves it to the task.
        fewshot_seed: of the choice of these examples.
        batch_size: requests at once; scores do not depend on it.
        max_length: tokens a model may see; None takes the model's own limit.
        bootstrap_samples: for standard errors without a formula; 0 leaves all standard errors out.
        seed: of texts that are drawn.
        chance: task or group -> score of guessing, or None.
        known_chance: the same of well-known tasks; `chance` goes before it.

    Raises:
        ValueError: for an empty list, a missing folder or a number out of range.
    """

    tasks: Sequence[str] | str
    include_path: str | None
    include_defaults: bool
    limit: float | None
    num_fewshot: int | None
    fewshot_seed: int
    batch_size: int
    max_length: int | None
    bootstrap_samples: int
    seed: int
    chance: Mapping[str, float] | None
    known_chance: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one, such as tasks=[arc_easy].")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(
                f"include_path={self.include_path} is no folder; name one with task files (YAML)."
            )
        if self.include_path is None and not self.include_defaults:
            raise ValueError(
                "include_defaults=false leaves no task; name a folder of task files with include_path=."
            )
        for key, least in LEAST.items():
            value = getattr(self, key)
            if not (type(value) is int and value >= least) and not (value is None and key in OPTIONAL):
                raise ValueError(f"{key}={value} must be a whole number from {least} on.")
        if self.limit is not None and not (type(self.limit) in (int, float) and self.limit > 0):
            raise ValueError(
                f"limit={self.limit} must be a number of documents, a share of them below 1, or null."
            )
        wrong = {task: score for task, score in (self.chance or {}).items() if not 0 <= score < 1}
        if wrong:
            raise ValueError(f"chance={wrong} must lie in [0, 1): it is the score of guessing.")

    def run(self, model: Subject, teacher: Subject | None, folder: Path) -> Findings:
        """Looks up the tasks and their data, then measures one model after the other."""
        from pipeline.lm_eval_tasks import check_room, load_tasks, run_tasks, set_examples

        names = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        tasks = load_tasks(names, self.include_path, self.include_defaults)
        check_room(tasks["tasks"], self.max_length)
        set_examples(tasks["tasks"], self.num_fewshot)
        options = {key: getattr(self, key) for key in ("limit", "batch_size", "max_length", "seed")}
        options |= {key: getattr(self, key) for key in ("bootstrap_samples", "fewshot_seed")}
        results = run_tasks(model, tasks, **options)
        theirs = None if teacher is None else run_tasks(teacher, tasks, **options)
        chance = {**self.known_chance, **(self.chance or {})}
        scores = _scores(results, theirs, chance)
        if not scores:
            raise ValueError(
                f"tasks={list(names)} have no metric; name some in metric_list of the task files."
            )
        task_bars(folder / PICTURE.file, scores=[_bar(*score) for score in scores])
        return Findings(
            figures=[figure for figure, _ in scores],
            explanation=EXPLANATION,
            pictures=[PICTURE],
            details={"tasks": _details(results, chance)},
        )


def _scores(
    results: Mapping[str, Any], theirs: Mapping[str, Any] | None, chance: Mapping[str, float]
) -> list[tuple[Figure, bool]]:
    """A figure for each metric of each task and group, and whether more of it is better."""
    found = []
    for task, row in results["results"].items():
        other = {} if theirs is None else theirs["results"][task]
        for key, value in row.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or _number(value) is None:
                continue
            rising = results["higher_is_better"].get(task, {}).get(metric) is not False
            name = f"{task}/{metric}" + ("" if how == "none" else f",{how}")
            error = f"{metric}_stderr,{how}"
            figure = Figure(
                name=name,
                label=name.replace("/", ": ", 1),
                value=value,
                pattern=".3f",
                teacher=_number(other.get(key)),
                chance=_chance_of(task, results["group_subtasks"], chance) or 0.0 if rising else 0.0,
                error=_number(row.get(error)),
                teacher_error=_number(other.get(error)),
            )
            found.append((figure, rising))
    return found


def _chance_of(task: str, groups: Mapping[str, Sequence[str]], chance: Mapping[str, float]) -> float | None:
    """The score of guessing of a task, or of a group that it is in; None where neither is known."""
    if task in chance:
        return chance[task]
    parents = [group for group, children in groups.items() if task in children]
    known = (_chance_of(group, groups, chance) for group in parents)
    return next((score for score in known if score is not None), None)


def _details(results: Mapping[str, Any], chance: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Task -> documents read, solved examples before each, version, score of guessing."""
    return {
        task: {
            "documents": results["n-samples"].get(task, {}).get("effective"),
            "num_fewshot": results["n-shot"].get(task),
            "version": results["versions"].get(task),
            "chance": _chance_of(task, results["group_subtasks"], chance),
            "errors": {
                key.replace("_stderr", "").removesuffix(",none"): _number(value)
                for key, value in row.items()
                if "_stderr," in key
            },
        }
        for task, row in results["results"].items()
    }


def _bar(figure: Figure, rising: bool) -> dict[str, Any]:
    """What `task_bars` draws."""
    record = {key: getattr(figure, key) for key in ("label", "value", "teacher", "chance")}
    return {**record, "error": figure.error, "teacher_error": figure.teacher_error, "rising": rising}


def _number(value: Any) -> float | None:
    """A number as it is; None in the place of lm-eval's words for there being none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
