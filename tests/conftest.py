"""The surroundings of every test: one thread, no network, no account, no display, GPU tests only on GPUs."""

import os

import pytest

# Set before anything imports torch or huggingface_hub, which read them once; child processes inherit them.
os.environ["OMP_NUM_THREADS"] = "1"  # two contended threads make a tiny fit ten times slower
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests marked `network` are run with HF_HUB_OFFLINE=0


FIRST = ("test_processes.py", "test_train.py", "test_first_time.py")  # they take minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest files, so that no process waits for another's at the end; and skips the tests
    marked `gpu` or `multi_gpu` where the GPUs are missing, and says so."""
    items.sort(key=lambda item: item.path.name not in FIRST)  # within both parts as collected
    needed = [(item, 2 if item.get_closest_marker("multi_gpu") else 1) for item in items if needs_gpu(item)]
    if not needed:
        return
    import torch

    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item, count in needed:
        if present < count:
            reason = f"needs {count} GPU(s) that torch can use; {present} found"
            item.add_marker(pytest.mark.skip(reason=reason))


def needs_gpu(item: pytest.Item) -> bool:
    """Whether the test carries one of the two GPU markers."""
    return any(item.get_closest_marker(name) for name in ("gpu", "multi_gpu"))
