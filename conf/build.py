"""Instantiates parts of a config; every error names the key."""

from typing import Any

import hydra
from hydra.errors import InstantiationException

from conf.values import check_types


def build(config: Any, key: str, **arguments: Any) -> Any:
    """Instantiates the config at `key`, its lists and dictionaries as plain Python ones.

    Raises:
        ValueError: naming the key, where a value is of the wrong type or is refused.
    """
    check_types(config, key)
    try:
        return hydra.utils.instantiate(config, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = root_cause(error)
        raise ValueError(cause if cause.startswith(key) else f"{key}: {cause}") from error


def root_cause(error: BaseException) -> str:
    """The message of the exception that Hydra wrapped, or of Hydra's own."""
    while isinstance(error, InstantiationException) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return str(error)
