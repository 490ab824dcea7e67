"""Keeps other packages from talking over the run's own log."""

import logging
import warnings


def quieten() -> None:
    """Keeps advertisements, bars of loading and saving, and other people's deprecations out of the log."""
    from transformers.utils import logging as transformers_logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
