"""Rotary scaling: dynamic scaling follows the present sequence alone and leaves no trace on a raw
model; what a scaled model reads."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedModel

import dynamickv as dkv
from dynamickv.models.rope import longer_sequences_forgotten
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm, tiny_model

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


def reads(**settings: Any) -> int:
    return dkv.Geometry.of(LlamaConfig(**settings)).max_positions


@pytest.mark.parametrize(
    ("rope", "positions", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 512, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 4096, 4096),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            40960,
            131072,
        ),
        ({"rope_type": "yarn", "factor": 3.7, "original_max_position_embeddings": 1000}, 999, 3700),
        ({"rope_type": "linear", "factor": 4.0}, 512, 2048),
        ({"rope_type": "dynamic", "factor": 2.5}, 1024, 2560),
        (
            {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 512},
            2048,
            2048,
        ),
        (
            {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 512},
            512,
            2048,
        ),
        (
            {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 512},
            2048,
            2048,
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
            131072,
        ),
        ({"rope_type": "default"}, 512, 512),
    ],
)
def test_scaling_extends_what_a_model_reads_once(
    rope: dict[str, Any], positions: int, longest: int
) -> None:
    settings = {"rope_theta": 10000.0, **rope}
    assert reads(max_position_embeddings=positions, rope_parameters=settings) == longest


def test_model_cards_recipes_are_understood() -> None:
    """As they stand in config.json, under the older name."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert reads(max_position_embeddings=512, rope_scaling=yarn) == 2048
    assert (
        reads(max_position_embeddings=512, rope_scaling={"type": "linear", "factor": 4.0}) == 2048
    )


def test_layers_with_scalings_of_their_own_hold_the_product_already() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(max_position_embeddings=131072, rope_parameters=rope)
    assert dkv.Geometry.of(config).max_positions == 131072


def test_a_prompt_beyond_the_original_length_is_answered() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    llm = tiny_llm(
        max_position_embeddings=128,
        rope_parameters={**yarn, "original_max_position_embeddings": 128},
    )
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=2)
    assert trace.prompt.length > 128
    assert len(trace.runs[0].token_ids) == 2
