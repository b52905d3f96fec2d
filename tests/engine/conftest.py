"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dynamickv as dkv
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and other tests may be running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llm() -> dkv.LoadedModel:
    """A tiny Llama, observed, with sdpa."""
    return tiny_llm()


@pytest.fixture(scope="session")
def prefill(llm: dkv.LoadedModel) -> dkv.Prefill:
    """A prompt of about 160 tokens, with everything recorded that any method needs."""
    return dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many threads as torch counts them, of which there need not be as many."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
