"""A synthetic record and an engine-free page for the tests of app/."""

from __future__ import annotations

import pytest

from app.serving.model_host import ModelHost
from dynamickv.record.trace import Trace
from tests.app.synthetic import synthetic_trace


@pytest.fixture(scope="session")
def trace() -> Trace:
    return synthetic_trace()


@pytest.fixture
def host() -> ModelHost:
    """A host whose model never loads: pages and inputs must do without."""

    def loader(name: str) -> None:
        raise OSError("there is no network and no embedded model; run make setup")

    return ModelHost(loader=loader)  # type: ignore[arg-type]
