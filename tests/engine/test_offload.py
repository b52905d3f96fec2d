"""Weights that lie elsewhere than where they work change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
from transformers import PreTrainedModel

import dynamickv as dkv
from tests.engine.test_generate_modes import LENGTHS, compressed, left_padded, plain, prompts
from tests.engine.tiny import (
    DOCUMENT,
    QUESTION,
    SMALL_INSTANCES,
    heads_of,
    method_name,
    tiny_llm,
    tiny_model,
    tiny_tokenizer,
)

OTHERS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def offloaded(place: str, folder: Path) -> PreTrainedModel:
    """The tiny model with its weights in that place."""
    model: Any = tiny_model()
    if place == "cpu":
        accelerate.cpu_offload(model)
    elif place == "disk":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    else:
        layers = range(model.config.num_hidden_layers)
        places = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in layers}
        places |= dict.fromkeys(OTHERS, "cpu")
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)
    if place != "some layers on disk":
        assert model.device.type == "meta"
    return model


PLACES = ["cpu", "disk", "some layers on disk"]


def inputs_of(method: Any) -> list[Any]:
    """One prompt, and rows of unlike length."""
    inputs = [plain(prompts(70)[0])]
    if method.name != "LAVa":  # parts heads, which rows cannot
        inputs.append(left_padded(prompts(*LENGTHS)))
    return inputs


@pytest.fixture(scope="module", params=SMALL_INSTANCES, ids=method_name)
def in_place(request: pytest.FixtureRequest) -> tuple[Any, list[Any]]:
    """A method, and what it answers and holds where all weights lie where they work."""
    method = request.param
    return method, [compressed(tiny_model(), method, given) for given in inputs_of(method)]


@pytest.mark.parametrize("place", PLACES)
def test_a_compressed_generate_answers_alike(
    place: str, in_place: tuple[Any, list[Any]], tmp_path: Path
) -> None:
    method, pairs_in_place = in_place
    model = offloaded(place, tmp_path)
    for given, (expected, held) in zip(inputs_of(method), pairs_in_place, strict=True):
        answer, cache = compressed(model, method, given)
        assert answer == expected
        assert cache.nbytes == held.nbytes
        pairs = zip(cache.retention().indices, held.retention().indices, strict=True)
        assert all(heads_of(mine) == heads_of(own) for mine, own in pairs)


@pytest.mark.parametrize("place", PLACES)
def test_a_comparison_records_the_same(place: str, tmp_path: Path) -> None:
    model = offloaded(place, tmp_path)
    away = dkv.LoadedModel.wrap(model, tiny_tokenizer(), "tiny", "test")
    traces = [
        dkv.compare(llm, DOCUMENT, QUESTION, methods=SMALL_INSTANCES, max_new_tokens=8)
        for llm in (tiny_llm(), away)
    ]
    for expected, run in zip(*(trace.runs for trace in traces), strict=True):
        assert run.token_ids == expected.token_ids
        assert run.retained == expected.retained
        assert run.kv_bytes == expected.kv_bytes
        assert run.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
