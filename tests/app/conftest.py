"""A synthetic record and an engine-free page for the tests of app/."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.examples import Example
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


@pytest.fixture
def example(trace: Trace, tmp_path: Path) -> Example:
    """That record as a built-in example."""
    trace.save(tmp_path / "one.json.gz")
    return Example(
        id="one", title="One", kind="report", question=trace.prompt.question, capacity=96,
        max_new_tokens=16, document="The river rose again.", run_file=tmp_path / "one.json.gz",
    )  # fmt: skip
