"""Runs one part (kernels.bench.part) in a process of its own, under a time limit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Child:
    """One part in a process of its own (kernels.bench.part).

    Args:
        folder: for its files.
        name: of the part, for messages.
        wanted: the part's arguments, `part` among them.
    """

    def __init__(self, folder: Path, name: str, wanted: dict) -> None:
        stem = re.sub(r"\W+", "-", name)
        self.name, self._rows, self._log = name, folder / f"{stem}.jsonl", folder / f"{stem}.log"
        (folder / f"{stem}.json").write_text(json.dumps(wanted))
        command = [sys.executable, "-m", "kernels.bench.part", str(folder / f"{stem}.json"), str(self._rows)]
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def finish(self, seconds: float) -> tuple[list[dict], str | None, bool]:
        """Wait for it, at most so long.

        Returns:
            Its rows, why there are no more (None where it came to its end), and whether it broke: it crashed,
            or was stopped before it had a single row.
        """
        reason = None
        try:
            status = self._process.wait(timeout=seconds)
            if status != 0:
                last = " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-3:])
                reason = f"{self.name}: ended with status {status}: {last[-600:]}"
        except subprocess.TimeoutExpired:
            reason = f"{self.name}: stopped after {seconds:.0f} s"
            status = None
        finally:
            stop(self._process)
        text = self._rows.read_text() if self._rows.exists() else ""
        rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return rows, reason, reason is not None and (status is not None or not rows)


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
