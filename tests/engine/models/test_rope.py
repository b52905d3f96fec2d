"""Dynamic rotary scaling follows the present sequence alone, and leaves no trace on a raw model."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamickv.models.rope import longer_sequences_forgotten
from tests.engine.tiny import tiny_model

LONGEST = 64


def stretched(seed: int = 0) -> PreTrainedModel:
    """Frequencies change beyond 64 tokens."""
    return tiny_model(
        seed=seed,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )


def tokens(length: int) -> Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.manual_seed(length))


def logits(model: PreTrainedModel, length: int) -> Tensor:
    with torch.no_grad():
        return model(tokens(length)).logits


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Whatever a rotary embedding remembers."""
    rotary = model.model.rotary_emb
    hooks = [list(getattr(rotary, kind)) for kind in vars(rotary) if "_hooks" in kind]
    return rotary.inv_freq.tolist(), rotary.max_seq_len_cached, hooks, sorted(vars(rotary))


def test_a_model_by_itself_remembers_the_longest_sequence() -> None:
    """Else these tests would show nothing."""
    model = stretched()
    expected = logits(stretched(), 100)
    logits(model, 200)
    assert not torch.allclose(logits(model, 100), expected, atol=1e-3)


def test_inside_the_block_every_sequence_is_the_first() -> None:
    model = stretched()
    with longer_sequences_forgotten(model):
        for length in (200, 100, 30, 150):
            assert torch.equal(logits(model, length), logits(stretched(), length))


@pytest.mark.parametrize("read_before", [None, 30, 200], ids="{} tokens before".format)
@pytest.mark.parametrize("raises", [False, True], ids=["done", "raised"])
def test_afterwards_the_model_remembers_what_it_did_before(
    read_before: int | None, raises: bool
) -> None:
    model, untouched = stretched(), stretched()
    if read_before:
        logits(model, read_before)
        logits(untouched, read_before)
    before = state(model)
    with suppress(KeyError), longer_sequences_forgotten(model):
        logits(model, 250)
        assert state(model) != before
        if raises:
            raise KeyError
    assert state(model) == before
    for length in (100, 220, 120):
        assert torch.equal(logits(model, length), logits(untouched, length))


def test_other_embeddings_get_no_hook() -> None:
    model = tiny_model()
    with longer_sequences_forgotten(model):
        assert not model.model.rotary_emb._forward_pre_hooks
