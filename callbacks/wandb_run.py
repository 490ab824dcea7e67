"""The Weights & Biases run of a run folder: its identity, how it begins, what it never sees, how it ends."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.provenance import describe_checkout, hide_secrets, hide_secrets_in

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)
DATA_VARIABLE = "WANDB_DATA_DIR"
FLUSH_SECONDS = 0.5  # a killed process loses no more of its history than this


class RunIdentity:
    """Id and history steps of a run folder's wandb run, kept in `<run folder>/wandb_run.json`.

    A resumed run finds both there. It so continues the same wandb run, and its steps go on where those of the
    attempt before ended, online and offline.

    Args:
        run_folder: folder of the run.
    """

    def __init__(self, run_folder: str | Path) -> None:
        self.path = Path(run_folder) / "wandb_run.json"
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        # Not from `random`: with a seed, every run would get the same id.
        self.id: str = known.get("id") or secrets.token_hex(5)
        self.next_step: int = known.get("next_step", 0)

    def take_step(self) -> int:
        """A step of the history that no attempt has used before; on disk when this returns."""
        step, self.next_step = self.next_step, self.next_step + 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps({"id": self.id, "next_step": self.next_step}), encoding="utf-8")
        os.replace(temporary, self.path)
        return step


def run_mode(offline: bool) -> str:
    """`online`, `offline` or `disabled`: what the config asks for, unless `WANDB_MODE` asks for less."""
    asked = os.environ.get("WANDB_MODE", "online")
    if asked == "disabled":
        return asked
    return "offline" if offline or asked in ("offline", "dryrun") else "online"


def check_login(mode: str) -> None:
    """Refuses an online run that nobody has logged in for, instead of asking for a key.

    Args:
        mode: of the run, see `run_mode`.

    Raises:
        ValueError: no usable key was found.
    """
    if mode != "online":
        return
    import wandb

    reason = "no API key was found"
    try:
        if wandb.login(prompt=False, verify=False):  # the server may be out of reach
            return
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        reason = str(error)
    raise ValueError(
        f"logger.wandb: {reason}. Set logger.wandb.offline=true to log without an account, or run "
        "`wandb login`, or put a key into the variable WANDB_API_KEY."
    )


@contextmanager
def wandb_run(
    identity: RunIdentity,
    *,
    mode: str,
    init_timeout_s: float,
    finish_timeout_s: float,
    **options: Any,
) -> Iterator["wandb.Run"]:
    """Begins or continues the wandb run of a run folder, and ends it with the block.

    Where the server cannot be reached the run is kept offline, with a warning. When the block is left by an
    exception the run is marked as failed. Ending takes `finish_timeout_s` at most; what was not uploaded by
    then stays on disk for `wandb sync`.

    Args:
        identity: of the run.
        mode: see `run_mode`.
        init_timeout_s, finish_timeout_s: seconds to wait for the server at the beginning and at the end.
        options: of `wandb.init`, such as project, name, tags, group and config; secrets in them are hidden.
    """
    folder = identity.path.parent
    outside = os.environ.get(DATA_VARIABLE)
    # Where wandb holds files of tables and artifacts until they are uploaded: beside the run, not at home.
    os.environ.setdefault(DATA_VARIABLE, str((folder / "wandb").resolve()))
    try:
        options = hide_secrets_in(options) | {"dir": str(folder), "id": identity.id, "resume": "allow"}
        options["settings"] = _settings(init_timeout_s, finish_timeout_s)
        run = _begin(mode, options)
        exit_code = 1
        try:
            yield run
            exit_code = 0
        finally:
            _end(run, exit_code)
    finally:
        if outside is None:
            del os.environ[DATA_VARIABLE]


def _settings(init_timeout_s: float, finish_timeout_s: float) -> "wandb.Settings":
    """Settings of the run; the commit is ours, because wandb would also send a remote's user and password."""
    import wandb

    checkout = describe_checkout(Path(__file__).resolve().parent) or {}
    return wandb.Settings(
        init_timeout=init_timeout_s,
        finish_timeout=finish_timeout_s,
        disable_code=True,
        disable_git=True,
        git_commit=checkout.get("commit"),
        git_remote_url=checkout.get("remote"),
        x_transaction_log_flush_interval=FLUSH_SECONDS,
    )


def _begin(mode: str, options: dict[str, Any]) -> "wandb.Run":
    import wandb

    if wandb.run is not None:
        raise ValueError("logger.wandb: this process already has a wandb run; call wandb.finish() first.")
    with _masked_command_line():
        try:
            return wandb.init(mode=mode, **options)
        except (wandb.errors.CommError, TimeoutError) as error:
            log.warning(
                "logger.wandb: the server did not answer (%s); the run is kept offline. Send it later with "
                "`wandb sync`.",
                str(error).partition("\n")[0],
            )
            wandb.teardown(exit_code=1)  # or its service would hold on to the id
            return wandb.init(mode="offline", **options)


def _end(run: "wandb.Run", exit_code: int) -> None:
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except (wandb.errors.Error, TimeoutError) as error:
        log.warning("logger.wandb: the run could not be ended properly: %s", error)


@contextmanager
def _masked_command_line() -> Iterator[None]:
    """Hides secrets in `sys.argv`, which wandb records when a run begins."""
    given, sys.argv = sys.argv, hide_secrets(sys.argv)
    try:
        yield
    finally:
        sys.argv = given
