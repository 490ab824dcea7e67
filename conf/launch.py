"""Start-up shared by the scripts: where a run lives, what its config must satisfy, how errors are said."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.build import build as build
from conf.build import root_cause
from conf.quiet import quieten as quieten
from conf.ranks import ProcessFailed, check_processes
from conf.run_folder import run_folder
from conf.run_folder import running as running
from conf.stages import build_callbacks, check_callbacks, checked_stage
from conf.trials import is_trial, record_failure
from conf.values import check_count, check_evaluation, check_trainer

log = logging.getLogger(__name__)


def register_resolvers() -> None:
    """Makes `${run_folder:...}` known; call it before Hydra composes."""
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


def plain_errors(main: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """Says what a user got wrong in a line or two and exits with 2; other errors keep their traceback.

    In a sweep it is the trial that fails: its folder keeps the reason, and the other trials go on.
    """

    @wraps(main)
    def wrapped(config: DictConfig) -> float | None:
        try:
            return main(config)
        except (ValueError, InstantiationException, OmegaConfBaseException, ProcessFailed) as error:
            log.debug("Traceback of the error below", exc_info=True)
            print(f"Error: {plain_message(error)}", file=sys.stderr)
            if not is_trial():
                sys.exit(1 if isinstance(error, ProcessFailed) else 2)
            record_failure(plain_message(error))
        except Exception as error:
            if disk_is_full(error, Path(config.get("paths", {}).get("outputs", "."))):
                error = OSError(
                    errno.ENOSPC,
                    f"no space is left for {config.paths.outputs} (paths.outputs) or {config.paths.cache} "
                    "(paths.cache); free some and go on with ckpt_path=auto, what was saved is whole",
                )
                print(f"Error: {error.strerror}.", file=sys.stderr)
                if not is_trial():
                    sys.exit(2)
            elif not is_trial():
                raise
            log.exception("The trial has failed.")
            record_failure(f"{type(error).__name__}: {error}")
        return None

    return wrapped


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Whether that is why writing below a folder has failed; libraries say it in different words, or not at
    all."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return True
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free < 2**20


def plain_message(error: Exception) -> str:
    """What went wrong, without the machinery around it."""
    return root_cause(error) if isinstance(error, InstantiationException) else str(error)


def device(config: DictConfig) -> str:
    """Where models are measured outside a trainer: on this process's GPU if the trainer uses one, or the
    CPU."""
    import torch

    uses_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if uses_gpu else "cpu"


def check_complete(config: DictConfig) -> None:
    """Refuses a config in which a required key has no value.

    Raises:
        ValueError: naming the keys.
    """
    missing = _missing(OmegaConf.to_container(config, resolve=False), "")
    if missing:
        raise ValueError(f"these config keys need a value: {', '.join(missing)}.")


def check(config: DictConfig) -> None:
    """Everything that can be known to be wrong before a weight or a text is loaded.

    Raises:
        ValueError: naming the key and the fix.
        InstantiationException: from Hydra, for a key that a part does not have or a value it refuses.
    """
    from conf.calibration import check_calibrations
    from conf.teacher_caches import check_teacher_cache

    check_complete(config)
    if not config.stages:
        raise ValueError(f"stages is empty; choose from {', '.join(config.stage)}.")
    if not OmegaConf.is_list(config.stages):
        raise ValueError(f"stages={config.stages} must be a list; write stages=[{config.stages}].")
    unknown = [name for name in config.stages if name not in config.stage]
    if unknown:
        raise ValueError(
            f"stages: {unknown} is unknown; choose from {', '.join(config.stage)}, or add one to `stage`."
        )
    if len(set(config.stages)) != len(config.stages):
        raise ValueError(f"stages={list(config.stages)} names one twice; copy the stage under another name.")
    places = [] if config.init_from is None else [Path(config.init_from) / "student", Path(config.init_from)]
    if places and not any((place / "student.json").exists() for place in places):
        raise ValueError(
            f"init_from={config.init_from} holds no finished student; name the folder of a finished run."
        )
    if config.ckpt_path not in (None, "auto") and not (Path(config.ckpt_path) / "config.yaml").exists():
        raise ValueError(
            f"ckpt_path={config.ckpt_path} is no run folder; use auto, or name a folder below paths.outputs."
        )
    if not config.name or not isinstance(config.name, str):
        raise ValueError(f"name={config.name} must be a text: runs of one name share a folder.")
    check_count(config.seed, "seed", 0)
    check_trainer(config.trainer)
    check_evaluation(config.evaluation)
    check_processes(config)
    if HydraConfig.initialized():
        check_overrides(config, HydraConfig.get().overrides.task)
    _refuse_secrets(config)
    teacher = build(config.teacher, "teacher")
    from_scratch = "model_type" in config.student or "parent" in config.student  # made with the tokenizer
    student = build(config.student, "student", **({"_partial_": True} if from_scratch else {}))
    stages = [checked_stage(config, name, teacher) for name in config.stages]
    callbacks = build_callbacks(config)
    for stage in stages:
        check_callbacks(config, stage, callbacks)
    if teacher.path is not None and config.init_from is None:
        selections = [stage for stage in stages if hasattr(stage, "check_candidates")]
        replaced = _check_student(student, teacher, selects=bool(selections))
        for stage in selections:
            stage.check_candidates(replaced)
    _check_layers(config, stages, student, teacher)
    check_calibrations(config, stages, student, teacher)
    for stage in stages:
        check_teacher_cache(config, stage)


def check_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses overrides that this run would never read.

    Args:
        config: the composed config.
        overrides: as given on the command line.

    Raises:
        ValueError: for a stage that `stages` does not name, or a student beside `init_from`.
    """
    described = {config.stage[name].get("of") for name in config.stages if name in config.stage}
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        parts = key.split(".")
        if parts[0] == "stage" and len(parts) > 2 and parts[1] not in {*config.stages, *described}:
            raise ValueError(f"{override} has no effect: {parts[1]} is not in stages={list(config.stages)}.")
        if parts[0] == "layer_plan" and "select" not in config.stages:
            raise ValueError(
                f"{override} has no effect: select is not in stages={list(config.stages)}; add it, such as "
                "stages=[align,select,distill]."
            )
        if parts[0] == "student" and config.init_from is not None:
            raise ValueError(f"{override} has no effect: init_from={config.init_from} brings the student.")


def _missing(value: Any, key: str) -> list[str]:
    """Keys whose value is still `???`; omegaconf's own search fails at references to such keys."""
    if isinstance(value, dict):
        return [
            name for inner in value for name in _missing(value[inner], f"{key}.{inner}".removeprefix("."))
        ]
    return [key] if value == "???" else []


def _refuse_secrets(config: DictConfig) -> None:
    """A secret in the config would be written to the run folder, and shown on dashboards.

    What Hydra has already written of it is deleted.
    """
    from callbacks.provenance import HIDDEN, hide_secrets_in

    keys = _hidden(hide_secrets_in(OmegaConf.to_container(config, resolve=False)), "", HIDDEN)
    if not keys:
        return
    if HydraConfig.initialized():
        shutil.rmtree(Path(HydraConfig.get().runtime.output_dir) / ".hydra", ignore_errors=True)
    raise ValueError(
        f"{', '.join(keys)}: a secret has no place in a config, which the run folder keeps. Set it in the "
        "environment (HF_TOKEN, WANDB_API_KEY), and leave the key out."
    )


def _hidden(value: Any, key: str, mark: str) -> list[str]:
    """Keys of the values that hold a mark."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return [name for inner in value for name in _hidden(value[inner], f"{key}.{inner}".strip("."), mark)]
    return [key] if isinstance(value, str) and mark in value else []


def _check_student(student: Any, teacher: Any, selects: bool) -> int:
    """Holds the layer plan against the teacher's shape, which its config file tells; layers replaced.

    Where a stage selects layers, what they get must have options too.
    """
    from models.conversion import check_plan
    from models.layer_plan import ATTENTION, mixer_name, teacher_part
    from models.mixers import MIXERS
    from models.teacher import load_hf_config

    kept = student.layer_plan.kept
    plan = check_plan(student, load_hf_config(teacher))
    used = {*map(mixer_name, plan), *([kept] if selects else [])}
    missing = sorted(used - set(student.mixers) - {ATTENTION})
    if missing:
        raise ValueError(
            f"student.layer_plan names {', '.join(missing)}, whose options student.mixers lacks; choose a "
            f"student that has them, or add them: '+student.mixers.{missing[0]}._target_=models.mixers."
            f"{MIXERS[missing[0]].options_class.__name__}'."
        )
    return sum(name not in (ATTENTION, kept) for name in teacher_part(plan))


def _check_layers(config: DictConfig, stages: Sequence[Any], student: Any, teacher: Any) -> None:
    """Holds what stages say about single layers against the layers that there are."""
    objectives = {stage.name: getattr(stage, "objective", None) for stage in stages}
    if not any(getattr(objective, "layer_weights", None) for objective in objectives.values()):
        return
    from models.conversion import check_plan
    from models.layer_plan import teacher_part
    from models.teacher import load_hf_config

    hf_config = load_hf_config(teacher)
    if config.init_from is None:
        plan = teacher_part(check_plan(student, hf_config))
    else:  # which of them are replaced, the student's own folder says
        plan = [""] * hf_config.get_text_config().num_hidden_layers
    for name, objective in objectives.items():
        if hasattr(objective, "check_layers"):
            objective.check_layers(plan, f"stage.{name}.objective")


def show_plan(config: DictConfig, student: Any) -> None:
    """Logs what a run would do, for `dry_run=true`."""
    from models.student import count_parameters

    log.info(
        "Student: %s parameters, layers %s", f"{count_parameters(student.model):,}", ", ".join(student.plan)
    )
    for name in config.stages:
        tokens = config.stage[name].get("tokens")
        log.info("Stage %s: %s", name, "no training" if tokens is None else f"{tokens:,.0f} tokens")
    log.info("Dry run: the config is sound; nothing was trained.")
