"""What the tests of eval.py share: its command line, its config, and a student of the bundled tokenizer."""

import subprocess
import sys
from typing import Any

import runs
from hydra import compose, initialize_config_dir
from tiny import convert, disturb, student_config, tiny_teacher
from transformers import PreTrainedModel

from conf import launch

BUNDLED = "assets/tiny_qwen2"
SIZE = 2048  # tokens of the bundled tokenizer
TEXT = "import os\nimport sys\n\n\ndef main(path):\n    return os.path.join(path, sys.argv[1])\n"


def hybrid() -> PreTrainedModel:
    """A student with attention in the middle one of three layers, away from its start."""
    model, _ = convert(tiny_teacher(vocab_size=SIZE), student_config((1,)))
    disturb(model, 0.1)
    return model.eval()


def evaluation(*overrides: str) -> subprocess.CompletedProcess:
    """Runs eval.py."""
    return subprocess.run(
        [sys.executable, "eval.py", *overrides],
        cwd=runs.REPOSITORY,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def composed(*overrides: str) -> Any:
    """The config of eval.py."""
    launch.register_resolvers()
    with initialize_config_dir(str(runs.REPOSITORY / "conf"), version_base="1.3"):
        return compose("eval", list(overrides))
