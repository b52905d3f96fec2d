"""Fixtures of the evaluation's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dynamickv as dkv
from tests.engine.tiny import tiny_llm


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and other tests may be running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llm() -> dkv.LoadedModel:
    """A tiny Llama."""
    return tiny_llm()


@pytest.fixture(scope="session")
def model_folder(llm: dkv.LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model as files."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    return str(folder)
