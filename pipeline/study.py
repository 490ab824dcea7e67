"""The Optuna study of a search: kept in a database, so that the same command goes on with it."""

import hashlib
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from conf.run_folder import UNCHECKED_ON_RESUME

SETTINGS = "settings"
DIRECTION = "hydra.sweeper.direction"
SQLITE = "sqlite:///"
DIGEST_LENGTH = 12  # hexadecimal digits


def is_search(config: DictConfig) -> bool:
    """Whether the sweeper chooses values by the results of earlier trials."""
    return "optuna" in config.hydra.sweeper._target_


def prepare_study(config: DictConfig) -> None:
    """Makes the study, or holds this command against the one that began it; without a database does nothing.

    Raises:
        ValueError: where trials of this command could not be compared with those of the study.
    """
    if not is_search(config) or None in (config.hydra.sweeper.storage, config.hydra.sweeper.study_name):
        return
    import optuna

    sweeper = config.hydra.sweeper
    if sweeper.storage.startswith(SQLITE):
        Path(sweeper.storage.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = {"study_name": sweeper.study_name, "storage": sweeper.storage}
    settings = study_settings(config)
    try:
        study = optuna.load_study(**place)
    except KeyError:
        study = optuna.create_study(**place, direction=settings[DIRECTION], load_if_exists=True)
        study.set_user_attr(SETTINGS, settings)
    before = study.user_attrs.get(SETTINGS, settings)
    different = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
    if different:
        raise ValueError(
            f"hydra.sweeper.study_name={sweeper.study_name}: this study was begun with other settings; these "
            f"keys differ: {', '.join(different)}. Give the same overrides to go on with it, or name another "
            "study with hydra.sweeper.study_name=<name>."
        )


def study_settings(config: DictConfig) -> dict[str, str]:
    """What has to be the same in all trials of a study: a digest of each section of the config, swept keys at
    their defaults, and the direction.

    Raises:
        ValueError: where several numbers are asked for.
    """
    direction = config.hydra.sweeper.direction
    if OmegaConf.is_list(direction):
        raise ValueError("hydra.sweeper.direction: a trial gives one number; choose minimize or maximize.")
    names = [str(key) for key in config if key not in UNCHECKED_ON_RESUME]
    settings = {name: _digest(config, name) for name in names}
    return settings | {DIRECTION: direction if isinstance(direction, str) else direction.name}


def _digest(config: DictConfig, name: str) -> str:
    value = config[name]
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]
