"""Says what a run would cost: `python plan.py experiment=radlads_qwen2_5_7b hardware=8xmi300x`.

Takes every key that train.py takes, and the machine. Teacher and student are built without weights and
counted; each stage gets its floating-point operations, hours, price and memory per device, and where it does
not fit, the overrides that make it fit. Writes plan.json and plan.md.
"""

import json
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import launch


@hydra.main(version_base="1.3", config_path="conf", config_name="plan")
@launch.plain_errors
def main(config: DictConfig) -> None:
    """Checks, counts, prints."""
    launch.check(config)
    hardware = launch.build(config.hardware, "hardware")
    launch.quieten()
    from rich.console import Console

    from pipeline.planning import make_plan
    from reports.plan_table import markdown_plan, plan_words, rich_tables

    plan = make_plan(config, hardware)
    console = Console()
    for table in rich_tables(plan):
        console.print(table)
    for words in plan_words(plan):
        console.print(words, highlight=False)
    folder = Path(config.paths.run_folder)
    command = " ".join(["python plan.py", *HydraConfig.get().overrides.task])
    (folder / "plan.json").write_text(json.dumps(plan, indent=1))
    (folder / "plan.md").write_text(markdown_plan(plan, command))
    console.print(f"written to {folder}", highlight=False)


if __name__ == "__main__":
    launch.register_resolvers()
    main()
