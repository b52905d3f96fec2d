"""A step that is compiled as a whole computes what the model does, whatever each cache holds."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Format
from torch import Tensor, nn

import dynamickv as dkv
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode_step import RowSteps
from dynamickv.fast.packed import FEW_ROWS, PackedWeights
from dynamickv.records import Attended
from tests.engine.test_codes import quantized
from tests.engine.test_packed import needs_fast
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

pytestmark = needs_fast
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def in_blocks(outputs: int, inputs: int) -> bool:
    """Whether a matrix can be codes."""
    return outputs % 16 == inputs % 32 == 0


def of_codes(family: str = "llama", **changes: Any) -> tuple[dkv.LoadedModel, dkv.LoadedModel]:
    """One model whose layers' weights are codes, exact and fast."""
    shape = {"hidden_size": 96, "head_dim": 16, "vocab_size": 368, **changes}
    exact = tiny_llm(family, initializer_range=0.05, **shape)
    made = torch.Generator().manual_seed(1)
    for name, linear in exact.model.named_modules():
        if type(linear) is nn.Linear and in_blocks(*linear.weight.shape):
            kind = Format.Q8_0 if "down" in name or "v_proj" in name else Format.Q4_1
            linear.weight.data = quantized(kind, linear.weight.data)
            if linear.bias is not None:
                linear.bias.data.normal_(std=0.3, generator=made)
        if name.endswith("norm"):
            linear.weight.data.uniform_(0.5, 1.5, generator=made)
    return exact, dataclasses.replace(exact, packed=PackedWeights(exact.model))


def compiled(llm: dkv.LoadedModel) -> tuple[RowSteps, list[int]]:
    """Steps, and the rows of those that were taken as a whole."""
    steps, taken = RowSteps(llm), list[int]()
    whole = steps._step
    assert whole is not None

    def counted(x: Tensor, *others: Any) -> Tensor:
        taken.append(len(x))
        return whole(x, *others)

    steps._step = counted  # type: ignore[assignment]
    return steps, taken


def caches(read: dkv.Prefill, rows: int) -> list[KVCache]:
    """As many, of several methods, lengths and heads."""
    methods = [
        dkv.FullKV(),
        dkv.SnapKV(capacity=24),
        dkv.DynamicKV(capacity=32),
        dkv.SnapKV(capacity=24, granularity="query_head"),
    ]
    return [prune(read, methods[row % 4].select(read.layers), 2 * row) for row in range(rows)]


def held(cache: KVCache) -> list[Tensor]:
    return [states for layer in cache.whole_layers() for states in layer.held()]


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "wide heads": {"head_dim": 64},
    "wide": {"hidden_size": 192, "intermediate_size": 32},
    "biased": {"attention_bias": True},
}


def compare_steps(shape: str, rows: int) -> None:
    """Fail unless steps are the model's own but for what float32 rounds."""
    exact, fast = of_codes(shape if shape in FAMILIES else "llama", **SHAPES.get(shape, {}))
    read = dkv.prefill(exact, DOCUMENT, QUESTION)
    ours, theirs = caches(read, rows), caches(read, rows)
    (by_us, taken), by_torch = compiled(fast), RowSteps(exact)
    # More than one step, so that what the first wrote is read.
    for step in range(3):
        fed = [5 + row + step for row in range(rows)], [read.length + step] * rows
        found, expected = by_us(ours, *fed), by_torch(theirs, *fed)
        # Nine rows are multiplied in bfloat16.
        share = 0.03 if rows > FEW_ROWS else 1e-5
        assert (found - expected).norm() < share * expected.norm()
    assert taken == ([] if rows > FEW_ROWS else [rows] * 3)
    for own, true in zip(ours, theirs, strict=True):
        for states, wanted in zip(held(own), held(true), strict=True):
            assert states.shape == wanted.shape
            assert (states - wanted).norm() < share * wanted.norm()


@pytest.mark.parametrize("rows", [*range(1, FEW_ROWS + 1), FEW_ROWS + 1])
@pytest.mark.parametrize("shape", [*FAMILIES, *(name for name in SHAPES if name != "llama")])
def test_it_is_the_model_s_own_step_but_for_what_float32_rounds(shape: str, rows: int) -> None:
    compare_steps(shape, rows)


@pytest.mark.skipif(sys.platform != "linux", reason="another allocator")
@pytest.mark.parametrize("shape", ["llama", "wide heads"])
def test_no_memory_is_given_back_while_addresses_of_it_are_in_use(shape: str) -> None:
    program = f"from {__name__} import compare_steps as c; c({shape!r}, 1); c({shape!r}, 7)"
    # glibc overwrites what is given back.
    told = {**os.environ, "MALLOC_PERTURB_": "165"}
    done = subprocess.run([sys.executable, "-c", program], env=told, timeout=300, check=False)
    assert done.returncode == 0


def test_what_watches_a_layer_sees_its_queries_and_what_they_read() -> None:
    exact, fast = of_codes()
    read = dkv.prefill(exact, DOCUMENT, QUESTION)
    seen: list[list[tuple[int, Tensor, Tensor, float]]] = []
    for llm in (exact, fast):
        told: list[tuple[int, Tensor, Tensor, float]] = []

        def saw(layer: Any, attended: Attended, told: Any = told) -> None:
            told.append((layer.index, attended.queries, attended.keys, attended.scaling))

        pair = caches(read, 2)
        for layer in pair[1].whole_layers()[2:]:
            layer.after_attention = saw
        RowSteps(llm)(pair, [5, 6], [read.length] * 2)
        seen.append(told)
    assert [one[0] for one in seen[1]] == list(range(2, len(read.layers)))
    for true, own in zip(*seen, strict=True):
        assert own[0] == true[0]
        assert own[3] == true[3]
        for states, wanted in zip(own[1:3], true[1:3], strict=True):
            assert states.shape == wanted.shape
            assert (states - wanted).norm() < 1e-5 * wanted.norm()


def test_a_prefill_and_answers_of_every_method_go_through_it() -> None:
    exact, fast = of_codes()
    asked = [dkv.FullKV(), dkv.SnapKV(capacity=24), dkv.DynamicKV(capacity=24)]
    true, run = (
        dkv.compare(llm, DOCUMENT, QUESTION, methods=asked, max_new_tokens=8)
        for llm in (exact, fast)
    )
    for one, other in zip(true.runs, run.runs, strict=True):
        assert other.logprobs[0] == pytest.approx(one.logprobs[0], abs=0.05)


def narrowed(mlp: Any) -> None:
    """Prune a layer's MLP."""
    for name in ("gate_proj", "up_proj"):
        linear = getattr(mlp, name)
        linear.weight.data, linear.out_features = linear.weight.data[:32].clone(), 32
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :32].clone()
    mlp.down_proj.in_features = 32


SPOILED: dict[str, Any] = {
    "one matrix": lambda layer: layer.self_attn.o_proj.weight.data[0, 0].add_(0.001),
    "inner": lambda layer: narrowed(layer.mlp),
    "epsilon": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.1),
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.5),
    "head norm": lambda layer: setattr(layer.self_attn.k_norm, "variance_epsilon", 0.1),
}


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("place", [0, 1])
def test_a_model_of_unlike_layers_takes_its_steps_operation_by_operation(
    spoiled: str, place: int
) -> None:
    exact, fast = of_codes("qwen3")
    SPOILED[spoiled](exact.model.model.layers[place])
    steps = RowSteps(fast)
    assert steps._step is None
    read = dkv.prefill(exact, DOCUMENT, QUESTION)
    fed = [5], [read.length]
    found, expected = steps(caches(read, 1), *fed), RowSteps(exact)(caches(read, 1), *fed)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_its_weights_outlive_the_model_that_they_came_from() -> None:
    exact, fast = of_codes()
    read = dkv.prefill(exact, DOCUMENT, QUESTION)
    steps, _ = compiled(fast)
    expected = steps(caches(read, 1), [5], [read.length])
    for parameter in exact.model.model.layers.parameters():
        parameter.data = torch.full_like(parameter.data, torch.nan)
    assert torch.equal(steps(caches(read, 1), [5], [read.length]), expected)
