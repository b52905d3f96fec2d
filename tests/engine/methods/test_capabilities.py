"""Every row of the table of capabilities says what the method really does."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dynamickv as dkv
from dynamickv.answer import recording_for
from dynamickv.integrations.vllm.blocks import BlockPlan, kept_before_tail
from dynamickv.integrations.vllm.options import CONNECTOR, method_of
from tests.engine.tiny import (
    DOCUMENT,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    random_layers,
    retain,
    tiny_llm,
)

LENGTH = 60
CAPACITY = 24
QUERIES, KEYS = random_layers(seed=3, length=LENGTH)
OTHER_QUERIES, OTHER_KEYS = random_layers(seed=4, length=LENGTH)
READ_FROM = {"mass": "mass", "window": "queries", "values": "values"}
"""What a row says is read, and where an observed layer holds it."""

every_method = pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)


def observed(**replaced: list[Any]) -> list[dkv.LayerObservation]:
    """Layers with everything that is recorded for a method; `replaced` by field, one a layer."""
    layers = []
    for place, (queries, keys) in enumerate(zip(QUERIES, KEYS, strict=True)):
        fields: dict[str, Any] = {
            "queries": queries[0],
            "keys": keys[0],
            "scaling": keys.shape[-1] ** -0.5,
            "values": keys[0].flip(-1),
            "mass": queries[0].square().sum(-1),
        }
        fields |= {name: values[place] for name, values in replaced.items()}
        layers.append(dkv.LayerObservation(**fields))
    return layers


def positions(retention: dkv.Retention) -> list[list[int]]:
    return [head.tolist() for kept in retention.indices for head in kept]


def of_small_size(method: dkv.CompressionMethod, **settings: Any) -> dkv.CompressionMethod:
    return dkv.build_method(method.name, capacity=CAPACITY, **settings)


@pytest.mark.parametrize("what", READ_FROM)
@every_method
def test_a_choice_follows_what_its_row_says_is_read(
    method: dkv.CompressionMethod, what: str
) -> None:
    says = getattr(dkv.capabilities(method.name), what)
    field = READ_FROM[what]
    other = {
        "mass": [queries[0].square().sum(-1) for queries in OTHER_QUERIES],
        "queries": [queries[0] for queries in OTHER_QUERIES],
        "values": [keys[0] for keys in OTHER_KEYS],
    }
    before = positions(method.select(observed()))
    assert (positions(method.select(observed(**{field: other[field]}))) != before) == says


@every_method
def test_what_is_recorded_for_a_method_is_enough_and_mass_is_only_where_the_row_says_so(
    method: dkv.CompressionMethod, llm: dkv.LoadedModel
) -> None:
    recording = recording_for([method])
    read = dkv.prefill(llm, DOCUMENT, QUESTION, **recording)
    assert (read.layers[0].mass is not None) == dkv.capabilities(method.name).mass
    assert dkv.preview(method, read).budgets
    if recording["mass"]:
        with pytest.raises(ValueError, match="prefill with mass=True"):
            dkv.preview(method, dkv.prefill(llm, DOCUMENT, QUESTION))


@every_method
def test_a_method_without_a_capacity_keeps_everything(method: dkv.CompressionMethod) -> None:
    retention = retain(of_small_size(method), QUERIES, KEYS)
    assert (retention.kept_fraction < 1) == dkv.capabilities(method.name).capacity
    assert ("capacity" in method.parameters) == dkv.capabilities(method.name).capacity


@every_method
def test_budgets_given_layer_by_layer_are_kept_where_the_row_says_so(
    method: dkv.CompressionMethod,
) -> None:
    given = [10 + 3 * layer for layer in range(NUM_LAYERS)]
    retention = retain(of_small_size(method, budgets=given), QUERIES, KEYS)
    assert (retention.budgets == given) == dkv.capabilities(method.name).layer_budgets


@every_method
def test_query_heads_choose_for_themselves_where_the_row_says_so(
    method: dkv.CompressionMethod,
) -> None:
    retention = retain(of_small_size(method, granularity="query_head"), QUERIES, KEYS)
    heads = QUERIES[0].shape[1] if dkv.capabilities(method.name).query_heads else KEYS[0].shape[1]
    assert [len(kept) for kept in retention.indices] == [heads] * NUM_LAYERS


@every_method
def test_heads_compete_for_a_layers_budget_where_the_row_says_so(
    method: dkv.CompressionMethod,
) -> None:
    retention = retain(of_small_size(method, head_budgets="adaptive"), QUERIES, KEYS)
    differ = any(len({len(head) for head in kept}) > 1 for kept in retention.indices)
    assert differ == dkv.capabilities(method.name).adaptive_heads


def kept_while_reading(
    llm: dkv.LoadedModel, method: dkv.CompressionMethod, prompt: dkv.Prefill
) -> list[list[int]] | None:
    """What serve mode keeps, or None where it refuses the method."""
    token_ids = torch.tensor([prompt.prompt.token_ids])
    try:
        with dkv.compress(llm.model, method) as cache:
            llm.model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                past_key_values=cache,
                max_new_tokens=2,
                do_sample=False,
                pad_token_id=0,
            )
    except ValueError:
        return None
    return positions(cache.retention())


@every_method
def test_serve_mode_keeps_what_exploring_does_where_the_row_says_so(
    method: dkv.CompressionMethod,
) -> None:
    llm = tiny_llm()
    read = dkv.prefill(llm, DOCUMENT, QUESTION, **recording_for([method]))
    expected = positions(method.select(read.layers))
    served = kept_while_reading(llm, method, read)
    assert (served == expected) == dkv.capabilities(method.name).serve


def vllm_config(method: dkv.CompressionMethod) -> Any:
    """As much of a VllmConfig as the plugin reads, asking for that method."""
    options = {"method": method.name}
    if dkv.capabilities(method.name).capacity:
        options["capacity"] = CAPACITY  # type: ignore[assignment]
    off = dict.fromkeys(("enable_dbo", "enable_prefix_caching", "async_scheduling"), False)
    one = dict.fromkeys(
        (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ),
        1,
    )
    all_of_them = SimpleNamespace(cache_dtype="auto", **off, **one)
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector=CONNECTOR, kv_connector_extra_config=options
        ),
        speculative_config=None,
        scheduler_config=all_of_them,
        parallel_config=all_of_them,
        cache_config=all_of_them,
        use_v2_model_runner=False,
    )


@every_method
def test_the_vllm_plugin_takes_a_method_where_the_row_says_so(
    method: dkv.CompressionMethod,
) -> None:
    if dkv.capabilities(method.name).vllm:
        assert method_of(vllm_config(method)).name == method.name
        return
    with pytest.raises(ValueError, match=f"^{method.name} .*choose from ") as refusal:
        method_of(vllm_config(method))
    offered = str(refusal.value).partition("choose from ")[2].split(", ")
    assert offered == [name for name in dkv.METHODS if dkv.capabilities(name).vllm]


@every_method
def test_what_the_vllm_plugin_hands_a_method_is_enough_where_the_row_says_so(
    method: dkv.CompressionMethod,
) -> None:
    """A worker has a prompt's last queries and its keys, nothing else."""
    method = of_small_size(method)
    plan = BlockPlan.of(method, LENGTH, block_size=4)

    def filled() -> bool:
        selection = method.start(NUM_LAYERS)
        nothing = [None] * NUM_LAYERS
        last = [queries[0, :, -method.tail :] for queries in QUERIES]
        for layer in observed(queries=last, mass=nothing, values=nothing):
            selection.observe(layer)
        kept = [kept_before_tail(selection, layer, plan) for layer in range(NUM_LAYERS)]
        return all(held.shape[1] % plan.block_size == 0 for held in kept)

    if dkv.capabilities(method.name).vllm:
        assert filled()
    else:
        with pytest.raises(ValueError, match="not recorded"):
            filled()


@every_method
def test_no_row_says_that_a_method_chooses_while_answering_before_serve_mode_can(
    method: dkv.CompressionMethod,
) -> None:
    if "decoding" not in inspect.signature(dkv.compress).parameters:
        assert not dkv.capabilities(method.name).decoding


def test_a_row_is_found_by_name_and_an_unknown_name_lists_the_choices() -> None:
    assert all(dkv.capabilities(name) is dkv.METHODS[name].capabilities for name in dkv.METHODS)
    with pytest.raises(ValueError, match="there is no method 'Best'; choose from FullKV"):
        dkv.capabilities("Best")


def test_a_method_without_query_heads_refuses_a_choice_for_each() -> None:
    class OneChoice(dkv.SnapKV):
        capabilities = dataclasses.replace(dkv.SnapKV.capabilities, query_heads=False)

    assert OneChoice(capacity=16).granularity == "kv_head"
    with pytest.raises(ValueError, match="makes one choice per KV head; use granularity='kv_head'"):
        OneChoice(capacity=16, granularity="query_head")
