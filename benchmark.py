"""Measures this machine: `python benchmark.py suite=kernels` (backends of WKV-7) or `suite=decoding`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import launch
from conf.suites import check_suite


@hydra.main(version_base="1.3", config_path="conf", config_name="benchmark")
@launch.plain_errors
def main(config: DictConfig) -> None:
    """Runs the suite; it prints a table and leaves its figures in the run folder."""
    launch.check_complete(config)
    suite = launch.build(config.suite, "suite")
    suite.run(Path(HydraConfig.get().runtime.output_dir), config.seed)


if __name__ == "__main__":
    check_suite("benchmark.py", sys.argv[1:])
    main()
