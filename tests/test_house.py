"""The walls of the house: who imports whom, what library code may not do, and what `make` and CI promise."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Whom the files of a folder may import, of ours. Parts meet in pipeline, conf/launch.py and the root scripts.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "data": {"data"},
    "callbacks": {"callbacks"},
    "reports": {"reports"},
    "conf": {"conf", "kernels", "models", "data", "callbacks", "reports"},
    "pipeline": {"pipeline", "conf", "kernels", "models", "data", "callbacks", "reports"},
}
# conf/launch.py says on stderr what a user got wrong; library code logs.
LIBRARY = [name for name in MAY_IMPORT if name != "conf"]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
OURS = {*MAY_IMPORT, *SCRIPTS, "tests", "conftest"}
NOT_OURS = {"outputs", "multirun", "wandb", "lightning_logs", "__pycache__"}
CODE = {".py", ".cpp", ".h", ".cu", ".cuh", ".yaml"}
TEXT = CODE | {".md", ".toml", ".txt"}
# Written so that it does not find itself. An example in conf/ may say /data/books.
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:root|home|Users|work|mnt|scratch)/\w")


def folders() -> list[Path]:
    """The folders of the repository, tools' and runs' own left out."""
    found = (path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_OURS)
    return sorted(
        path for path in found if not path.name.startswith(".") and not (path / "pyvenv.cfg").exists()
    )


def files(suffixes: set[str]) -> list[Path]:
    """Every file of ours with one of the suffixes, in the root or below one of its folders."""
    found = [*ROOT.iterdir(), *(path for folder in folders() for path in folder.rglob("*"))]
    return sorted(path for path in found if path.suffix in suffixes and path.is_file())


def name_of(path: Path) -> str:
    """The path as seen from the root."""
    return path.relative_to(ROOT).as_posix()


def imported(source: str, file: str) -> set[str]:
    """The top-level names a source imports: at any depth, relatively, or by a literal given to import_module.

    Args:
        source: Python text.
        file: its path from the root with slashes, against which relative imports are resolved.
    """
    parents = file.split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = parents[: len(parents) + 1 - node.level] if node.level else []
            dotted = [*package, *(node.module.split(".") if node.module else [])]
            found |= {dotted[0]} if dotted else {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value).split(".")[0])
    return found


def forbidden(source: str, file: str) -> set[str]:
    """The names of ours that a file imports although its place in the house does not let it."""
    folder = file.split("/")[0] if "/" in file else None
    allowed = MAY_IMPORT[folder] if folder else set(MAY_IMPORT)
    return (imported(source, file) & OURS) - allowed


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("kernels/wkv7/cpu.py", "from models.config import StudentConfig", {"models"}),
        ("models/mixers/rwkv7.py", "def late():\n    import data.packing", {"data"}),
        ("data/text.py", "from .. import callbacks", {"callbacks"}),
        ("callbacks/progress.py", "import importlib\nimportlib.import_module('reports.table')", {"reports"}),
        ("reports/table.py", "import conf.launch", {"conf"}),
        ("reports/report.py", "from tests import tiny", {"tests"}),
        ("conf/launch.py", "import benchmark, models, pipeline", {"benchmark", "pipeline"}),
        ("pipeline/stages.py", "from train import main\nfrom conf.launch import build", {"train"}),
        ("benchmark.py", "from tests.tiny import qwen2", {"tests"}),
        ("models/mixers/base.py", "import torch\nfrom ..config import X\nfrom kernels import explain", set()),
        ("benchmark.py", "import kernels, models, data, callbacks, reports, conf.launch, pipeline", set()),
    ],
)
def test_forbidden_imports_are_seen(file, source, found):
    assert forbidden(source, file) == found


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "."])
def test_import_direction(folder):
    paths = sorted(ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"))
    assert paths, f"{folder} has no Python files; take it out of MAY_IMPORT"
    wrong = {name_of(path): forbidden(path.read_text(), name_of(path)) for path in paths}
    assert not {name: names for name, names in wrong.items() if names}


def test_every_folder_with_code_has_its_place():
    with_code = {folder.name for folder in folders() if any(folder.rglob("*.py"))}
    assert with_code - {"tests"} <= set(MAY_IMPORT), "say in MAY_IMPORT whom the new folder may import"


def test_library_code_does_not_print():
    def prints(path: Path) -> list[int]:
        """The lines of a file that call print."""
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]

    paths = [path for folder in LIBRARY for path in (ROOT / folder).rglob("*.py")]
    wrong = {name_of(path): prints(path) for path in paths}
    assert not {name: lines for name, lines in wrong.items() if lines}


def test_no_file_is_longer_than_400_lines():
    lengths = {
        name_of(path): len(path.read_text().splitlines()) for path in [*files(CODE), ROOT / "Makefile"]
    }
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_file_names_a_place_on_one_machine():
    paths = [*files(TEXT), ROOT / "Makefile", ROOT / ".ci" / "run"]
    wrong = {name_of(path): MACHINE_PATH.findall(path.read_text()) for path in paths}
    assert not {name: found for name, found in wrong.items() if found}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("folder = '/" + "root/models'", True),
        ("cd /" + "home/someone", True),
        ("https://example.org/home/page", False),
        ("run: conf/root/x", False),
    ],
)
def test_machine_paths_are_seen(line, found):
    assert bool(MACHINE_PATH.search(line)) == found


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-gpu.txt"])
def test_requirements_are_pinned(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    packages = [line for line in lines if line]
    assert packages
    pinned = re.compile(r"[a-z0-9-]+(\[[a-z,]+\])?==[0-9][\w.]*(; sys_platform == \"\w+\")?")
    assert not [line for line in packages if not pinned.fullmatch(line)]


def test_torch_is_the_first_requirement():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")).startswith("torch==")


def test_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-zA-Z][\w-]*):(?!=)", makefile, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[1].split())
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert targets == phony
    assert set(re.findall(r"^  make ([\w-]+)  +\S", shown.stdout, re.MULTILINE)) == targets


def test_ci_calls_the_test_command_of_the_readme():
    commands = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert "make lint" in commands and "make test" in commands
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^\s*(\$ )?make test\b|`make test`", readme, re.MULTILINE), (
        "no `make test` in README.md"
    )
