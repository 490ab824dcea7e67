"""The processes of a run: one per device, started here or by torchrun or SLURM.

Lightning would start the other processes with the first one's command line, so that in a sweep each of them
would begin a sweep of its own. Here they get the config that the first process has saved in the run folder.
"""

import datetime
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig

log = logging.getLogger(__name__)
VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = datetime.timedelta(hours=2)  # of one wait: large models are loaded by one process after the other
FIRST = "TRANSMUTE_FIRST_PROCESS"  # tells a process that another one has started which one that was
GRACE_SECONDS = 60.0  # between the end of one process and the end of the others


class ProcessFailed(RuntimeError):
    """Another process of the run has ended before its time."""


def started_from_outside() -> bool:
    """Whether torchrun, srun or another process of this run has started this one as one of several."""
    # A batch script has SLURM_NTASKS as well; only srun makes it a step, with a process per task.
    by_srun = "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return "LOCAL_RANK" in os.environ or by_srun


def outer_rank() -> int:
    """The number that whoever started this process has given it; 0 where it runs alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def process_count(config: DictConfig) -> int:
    """Processes of a run: devices on each node, times nodes."""
    return config.trainer.devices * config.trainer.num_nodes


def check_processes(config: DictConfig) -> None:
    """Holds strategy, devices and launcher against each other.

    Raises:
        ValueError: naming the key and the fix.
    """
    trainer, strategy = config.trainer, config.strategy.name
    for key in ("devices", "num_nodes"):
        if not isinstance(trainer[key], int) or trainer[key] < 1:
            raise ValueError(f"trainer.{key}={trainer[key]} must be a number from 1 on.")
    count = process_count(config)
    if strategy == "single" and count != 1:
        raise ValueError(
            f"trainer.devices={trainer.devices}, trainer.num_nodes={trainer.num_nodes}: strategy=single "
            "trains on one device; choose strategy=ddp or strategy=fsdp, or leave both at 1."
        )
    if config.dry_run:
        return
    if trainer.num_nodes > 1 and not started_from_outside():
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes}: start one process per device with torchrun or srun; "
            "train.py starts those of one node by itself."
        )
    world = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))
    joined = "LOCAL_RANK" in os.environ or (started_from_outside() and strategy != "single")
    if joined and int(world) != count:
        raise ValueError(
            f"trainer.devices x trainer.num_nodes = {count}, but {world} processes were started; "
            "make them equal."
        )


@contextmanager
def processes(config: DictConfig, folder: Path) -> Iterator[None]:
    """Has all processes of the run stand in one process group for the length of the block.

    The first process starts the others, unless a launcher has. When the block is left, the group and the
    variables that describe it are gone, so that the next run of a sweep can have its own.

    Args:
        config: of the run.
        folder: of the run; holds the config as config.yaml.
    """
    if config.strategy.name == "single" or config.dry_run:
        yield
        return
    import torch.distributed as dist

    before = {name: os.environ.get(name) for name in VARIABLES}
    finished = threading.Event()
    children = [] if started_from_outside() else _start_others(process_count(config), folder)
    threading.Thread(target=_watch, args=(children, finished), daemon=True).start()
    ended_well, lost = False, None
    try:
        _join(config)
        yield
        ended_well = True
    except Exception as error:
        lost = error if _contact_is_lost(error) else None
        raise
    finally:
        finished.set()
        if dist.is_initialized():
            dist.destroy_process_group()
        failure = _reap(children)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if lost or (failure and ended_well):
            failure = failure or "another process of the run has ended; its own log says why"
            raise ProcessFailed(f"{failure}. What was saved is whole: go on with ckpt_path=auto.") from lost


def _contact_is_lost(error: Exception) -> bool:
    """Whether an error only says that another process does not answer any more."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _join(config: DictConfig) -> None:
    """Enters the process group: gloo between CPUs, besides NCCL between GPUs."""
    import torch

    if "LOCAL_RANK" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(slurm.global_rank()), str(slurm.world_size())
        os.environ["LOCAL_RANK"] = str(slurm.local_rank())
    os.environ["NODE_RANK"] = str(int(os.environ["RANK"]) // config.trainer.devices)
    backend, device = "gloo", None
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        device_id=device,
        timeout=TIMEOUT,
    )


def _start_others(count: int, folder: Path) -> list[subprocess.Popen]:
    """Starts processes 1, 2, ... of this node, each with a log of its own, and makes this one number 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ |= {**common, "RANK": "0", "LOCAL_RANK": "0"}
    children = []
    for rank in range(1, count):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), FIRST: str(os.getpid())}
        command = rank_command(Path(sys.argv[0]).resolve(), folder.resolve())
        with (folder / f"rank_{rank}.log").open("a") as output:
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        children.append(child)
    return children


def rank_command(script: Path, folder: Path) -> list[str]:
    """The command line of another process of the run in `folder`: the run's own config, no sweep, no
    files."""
    return [
        *(sys.executable, str(script), "--config-path", str(folder), "--config-name", "config"),
        *("hydra.mode=RUN", f"hydra.run.dir={folder}", "hydra.output_subdir=null"),
        "hydra.job_logging.root.handlers=[console]",
    ]


def _watch(children: list[subprocess.Popen], finished: threading.Event) -> None:
    """Ends this process where another one has failed and this one waits for it for ever."""
    while not finished.wait(1.0):
        if _failure(children) and not finished.wait(GRACE_SECONDS):
            log.error("The run is ended: %s.", _failure(children))
            for child in children:
                child.kill()
            os._exit(1)


def _failure(children: list[subprocess.Popen]) -> str | None:
    """Which other process has failed, in words; None where none has."""
    failed = [(child.returncode, rank) for rank, child in enumerate(children, 1) if child.poll()]
    if failed:  # one that was killed, or that names an error of the user, comes before those that it let down
        code, rank = min(failed, key=lambda found: (found[0] > 0, -found[0]))
        how = f"was killed by signal {-code}" if code < 0 else f"has failed with exit code {code}"
        return f"process {rank} of the run {how}; rank_{rank}.log says what it did"
    if os.getppid() != int(os.environ.get(FIRST, os.getppid())):
        return "the process that started this one is gone"
    return None


def _reap(children: list[subprocess.Popen]) -> str | None:
    """Waits for the other processes and ends those that do not end by themselves; a failure, in words."""
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(deadline - time.monotonic(), 0.0))
    failure = _failure(children)
    for rank, child in enumerate(children, 1):
        if child.poll() is None:
            failure = failure or f"process {rank} of the run did not end; rank_{rank}.log says what it did"
            child.kill()
            child.wait()
    return failure
