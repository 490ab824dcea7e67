"""Which suites of `conf/suite` a script can run: those whose file opens with the command that does so."""

import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).parent / "suite"


def suites_of(script: str) -> list[str]:
    """The names of the suites of a script, for example of `eval.py`."""
    files = FOLDER.glob("*.yaml")
    return sorted(path.stem for path in files if f"# python {script} " in _opening(path))


def _opening(path: Path) -> str:
    """The comment that a file begins with."""
    return "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))


def check_suite(script: str, arguments: Sequence[str]) -> None:
    """Refuses a suite that the script does not have, before Hydra composes: it would offer every script's.

    Args:
        script: its file.
        arguments: of the command line.

    Raises:
        SystemExit: with code 2, after naming the suites that there are.
    """
    known = suites_of(script)
    for value in (given.partition("=")[2] for given in arguments if given.startswith("suite=")):
        unknown = [name for name in value.split(",") if name not in known]
        if unknown:
            sys.stderr.write(f"Error: suite={unknown[0]} is unknown; choose one of {', '.join(known)}.\n")
            sys.exit(2)
