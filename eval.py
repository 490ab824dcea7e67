"""Measures a model beside its teacher: `python eval.py model=<run or Hugging Face folder> suite=quick`.

`suite=quick` reads held-out text; `suite=lm_eval tasks=[arc_easy]` runs tasks of the lm-evaluation-harness.
Prints a table and writes eval.json, eval.md and plots.
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import launch
from conf.suites import check_suite


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
@launch.plain_errors
def main(config: DictConfig) -> None:
    """Checks, measures, tells."""
    launch.check_complete(config)
    launch.quieten()
    suite = launch.build(config.suite, "suite")
    from rich.console import Console

    from pipeline.evaluation import find_subjects
    from reports.eval_report import figures_table, write_eval

    model, teacher = find_subjects(config)
    folder = Path(config.paths.run_folder)
    findings = suite.run(model, teacher, folder)
    name = HydraConfig.get().runtime.choices.suite
    write_eval(folder, findings, model=model.name, teacher=teacher and teacher.name, suite=name)
    console = Console()
    console.print(figures_table(findings, title=f"{name}: {model.name}"))
    console.print(f"written to {folder}", highlight=False)


if __name__ == "__main__":
    launch.register_resolvers()
    check_suite("eval.py", sys.argv[1:])
    main()
