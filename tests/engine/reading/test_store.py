"""The prefill store holds no more than it may, and gives memory back."""

from __future__ import annotations

import gc
import weakref

import pytest

import dynamickv as dkv
from tests.engine.tiny import DOCUMENT


def read(llm: dkv.LoadedModel, number: int) -> dkv.Prefill:
    return dkv.prefill(llm, f"{number} {DOCUMENT}", "what?")


def test_the_longest_unused_goes_first(llm: dkv.LoadedModel) -> None:
    prefills = [read(llm, number) for number in range(3)]
    store = dkv.PrefillStore(max_bytes=sum(prefill.nbytes for prefill in prefills[:2]))
    assert store.put("a", prefills[0])
    assert store.put("b", prefills[1])
    assert store.get("a") is prefills[0]
    assert store.put("c", prefills[2])
    assert store.get("b") is None
    assert store.get("a") is prefills[0]
    assert store.nbytes <= store.max_bytes


def test_what_is_larger_than_the_store_is_not_kept(llm: dkv.LoadedModel) -> None:
    prefill = read(llm, 0)
    store = dkv.PrefillStore(max_bytes=prefill.nbytes - 1)
    assert not store.put("a", prefill)
    assert len(store) == 0


def test_dropping_returns_the_memory(llm: dkv.LoadedModel) -> None:
    store = dkv.PrefillStore(max_bytes=2**30)
    prefill = read(llm, 0)
    tensors = [weakref.ref(layer.keys) for layer in prefill.layers]
    store.put("a", prefill)
    del prefill
    gc.collect()
    assert all(tensor() is not None for tensor in tensors)
    store.drop("a")
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        dkv.PrefillStore(max_bytes=-1)
