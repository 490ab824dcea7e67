"""The modeling file of an export: made of our own sources, by itself, the same every time."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY

from models.hf import bundle as linker
from models.hf import sources
from models.hf.bundle import bundle
from models.hf.sources import Target
from models.mixers import MIXERS

SETS = dict.fromkeys([(), *((name,) for name in MIXERS), tuple(MIXERS)])


@pytest.mark.parametrize("mixers", SETS, ids=lambda names: "+".join(names) or "none")
def test_the_file_stands_alone(mixers, tmp_path):
    text = bundle(mixers)
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    imported |= {
        a.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for a in node.names
    }
    packages = {name.partition(".")[0] for name in imported}
    assert packages - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert bundle(reversed(mixers)) == text
    present = {name for name, mixer in MIXERS.items() if f"class {mixer.__name__}(" in text}
    assert present == set(mixers)
    path = tmp_path / "modeling.py"
    path.write_text(text)
    ruff = [
        Path(sys.executable).with_name("ruff"),
        "check",
        "--no-cache",
        "--config",
        REPOSITORY / "pyproject.toml",
    ]
    done = subprocess.run([*ruff, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_only_plain_torch_comes_along():
    text = bundle(MIXERS)
    assert "ctypes" not in text and "jit_build" not in text and "custom_op" not in text
    assert "# kernels/wkv7/chunked.py: " in text and "# models/backbone.py: " in text


# --- the linker, on a small tree ----------------------------------------------------------------------------

TREE = {
    "kernels/__init__.py": "",
    "kernels/op/__init__.py": '''"""One operator."""
from kernels.dispatch import pick
from kernels.op import chunked, cpu

# What there is.
BACKENDS = (("cpu", cpu.run), ("chunked", chunked.run))


def op(run):
    return pick(BACKENDS)(run)
''',
    "kernels/op/chunked.py": '''"""In chunks."""
import math

SIZE = 2


def run(x):
    """run, SIZE: not touched here."""
    return math.sqrt(x) * SIZE


def unused():
    return missing
''',
    "kernels/op/cpu.py": "import ctypes\n\n\ndef run(x):\n    return ctypes.c_int(x)\n",
    "kernels/dispatch.py": "def pick(backends):\n    raise SystemExit\n",
    "models/__init__.py": "",
    "models/small.py": "def pick(backends):\n    return backends[-1][1]\n",
    "models/package.py": "from models.parts import SIZE, run as start\n",
    "models/parts.py": '''"""Parts."""
from dataclasses import dataclass

SIZE = 5


@dataclass
class Part:
    """SIZE"""

    size: int = SIZE


# Runs.
def run(parts):
    return [SIZE for _ in parts]
''',
    "models/head.py": '''"""The head."""
from kernels.op import op
from models.package import SIZE, start
from models.parts import Part


class Head:
    parts = (Part(), Part())

    def forward(self):
        return op(4), start(self.parts), SIZE
''',
}


@pytest.fixture
def link(tmp_path, monkeypatch):
    """Bundles TREE, with the given files changed."""

    def run(**changed: str) -> str:
        files = TREE | {name.replace("__", "/") + ".py": text for name, text in changed.items()}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(sources, "ROOT", tmp_path)
        monkeypatch.setattr(linker, "ROOTS", (Target("models.head", "Head"),))
        monkeypatch.setattr(linker, "REPLACED", {"kernels.dispatch": "models.small"})
        return bundle(())

    return run


def test_names_are_followed_and_clashes_get_their_module_in_front(link):
    text = link()
    space = {"__name__": "bundled"}
    exec(compile(text, "bundled", "exec"), space)
    assert space["Head"]().forward() == (4.0, [5, 5], 5)
    assert 'BACKENDS = (\n    ("chunked", op_chunked_run),\n)' in text and "# What there is.\n" in text
    assert (
        "OP_CHUNKED_SIZE = 2" in text and "PARTS_SIZE = 5" in text and "# Runs.\ndef parts_run(parts)" in text
    )
    assert '"""run, SIZE: not touched here."""' in text
    assert "unused" not in text and "ctypes" not in text and "SystemExit" not in text
    assert text.index("# kernels/op/chunked.py: In chunks.") < text.index("# kernels/op/__init__.py")


@pytest.mark.parametrize(
    "file, text, message",
    [
        (
            "models__parts",
            TREE["models/parts.py"] + "\nprint('made')\n",
            "models/parts.py:18: .*only defines things",
        ),
        (
            "models__parts",
            "import models.small\n" + TREE["models/parts.py"],
            "write `from package import name`",
        ),
        ("models__parts", "from .small import pick\n", "imports names absolutely"),
        ("models__parts", "def run(parts):\n    return 1\n", "models/parts.py has no SIZE"),
        (
            "models__parts",
            TREE["models/parts.py"] + "\n\nclass Part:\n    pass\n",
            r"'Part'\] is defined twice",
        ),
        (
            "models__head",
            TREE["models/head.py"].replace("op(4)", "cpu.run(4)").replace("import op", "import cpu"),
            "kernels.op.cpu cannot stand in an exported file",
        ),
        (
            "models__head",
            "from cmath import sqrt as math\n" + TREE["models/head.py"].replace("op(4)", "op(math(4))"),
            "'math' means something else",
        ),
        (
            "models__head",
            TREE["models/head.py"].replace("def forward(self):", "def forward(self, start=1):"),
            "Head uses the name 'start' for its own",
        ),
    ],
    ids=["effect", "plain_import", "relative", "missing", "twice", "left_out", "other_meaning", "shadowed"],
)
def test_what_cannot_stand_in_one_file_is_refused(file, text, message, link):
    with pytest.raises(ValueError, match=message):
        link(**{file: text})


def test_names_that_stay_in_conflict_are_refused(link):
    head = TREE["models/head.py"].replace("SIZE", "SIZE, parts_run").replace("), SIZE", "), SIZE, parts_run")
    with pytest.raises(ValueError, match="parts_run.*two modules of an exported file define this"):
        link(
            models__head=head,
            models__package=TREE["models/package.py"] + "parts_run = 3\n",
        )
