"""Every method keeps what its reference implementation keeps, token for token, on recorded cases.

Departures from the references are deliberate; each has its own test at the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynamickv as dkv
from dynamickv.scoring import count_global_top
from tests.engine.methods import naive

FOLDER = Path(__file__).parents[2] / "golden"
ARRAYS = np.load(FOLDER / "golden_shared.npz")
CASES = {
    case["id"]: case
    for case in json.loads((FOLDER / "golden_shared.json").read_text("utf-8"))["cases"]
}
METHOD_NAMES = {
    "snapkv": "SnapKV",
    "dynamickv": "DynamicKV",
    "pyramidkv": "PyramidKV",
    "h2o": "H2O",
    "streamingllm": "StreamingLLM",
}
POOLINGS = {"maxpool": "max", "avgpool": "avg"}

FITS = {"s09_dynamickv", "s18_dynamickv"}
"""Cases with n <= capacity from which the reference evicts nevertheless."""
THIRTY_LAYERS = {"s06_dynamickv", "s07_dynamickv", "s08_dynamickv"}
"""30 layers: the reference's last update comes after layer 28."""


def our_name(case: dict[str, Any]) -> str | None:
    return METHOD_NAMES.get(case["method"].removesuffix("_kvhead"))


def cases(*names: str, without: Set[str] = frozenset(), raising: bool = False) -> list[str]:
    """Ids of the cases of those methods, as far as the methods are registered."""
    return [
        key
        for key, case in CASES.items()
        if our_name(case) in (names or METHOD_NAMES.values())
        and our_name(case) in dkv.METHODS
        and key not in without
        and ("expect_error" in case) is raising
    ]


def method_of(case: dict[str, Any]) -> dkv.CompressionMethod:
    name = our_name(case)
    assert name is not None
    settings = {
        "capacity": case["capacity"],
        "window_size": case["window"],
        "kernel_size": case["kernel"],
        "pooling": POOLINGS[case["pooling"]],
        "granularity": "kv_head" if case["method"].endswith("_kvhead") else "query_head",
        "group_reduction": case.get("gqa_agg"),
        "r_max": case.get("r_max"),
        "beta": case.get("beta"),
        # The reference keeps capacity - window tokens at the start and the window at the end.
        "sinks": case["capacity"] - case["window"],
    }
    return dkv.build_method(name, **settings)


@cache
def inputs_of(key: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    case = CASES[key]
    rng = np.random.default_rng(case["seed"])
    size = case["seq_len"], case["head_dim"]
    queries, keys = [], []
    for scale in case["q_scale"]:
        query = rng.standard_normal((1, case["n_q_heads"], *size), dtype=np.float32)
        key_states = rng.standard_normal((1, case["n_kv_heads"], *size), dtype=np.float32)
        rng.standard_normal((1, case["n_kv_heads"], *size), dtype=np.float32)
        queries.append(torch.from_numpy(query * np.float32(scale)))
        keys.append(torch.from_numpy(key_states))
    check = case.get("input_check")
    if check is not None:
        assert np.array_equal(np.float32(check["Q_layer0_first4"]), queries[0].ravel()[:4])
        assert np.array_equal(np.float32(check["K_lastlayer_last4"]), keys[-1].ravel()[-4:])
    return queries, keys


@cache
def retained(key: str) -> dkv.Retention:
    return dkv.retain(method_of(CASES[key]), *inputs_of(key))


def scores_of(key: str) -> list[torch.Tensor]:
    method = method_of(CASES[key])
    assert isinstance(method, dkv.ScoredMethod)
    return [
        method.score(
            dkv.LayerObservation(
                queries=query[0],
                keys=key_states[0],
                scaling=CASES[key]["head_dim"] ** -0.5,
                mass=torch.from_numpy(
                    naive.attention_received(query[0].numpy(), key_states[0].numpy())
                ).float()
                if method.needs_mass
                else None,
            )
        )
        for query, key_states in zip(*inputs_of(key), strict=True)
    ]


def array(key: str, name: str) -> np.ndarray:
    found: np.ndarray = ARRAYS[f"{key}.{name}"]
    return found


def reference_kept(key: str) -> list[list[tuple[set[int], set[int]]]]:
    """Per layer and head: the prefix positions kept, and those tied with the last of them."""
    heads, flat, ties = CASES[key]["sel_heads"], array(key, "kept"), array(key, "tie")
    bounds, start, layers = array(key, "tie_ptr"), 0, []
    for layer, count in enumerate(array(key, "kept_len").tolist()):
        rows = []
        for head in range(heads):
            row = layer * heads + head
            rows.append(
                (
                    set(flat[start : start + count].tolist()),
                    set(ties[bounds[row] : bounds[row + 1]].tolist()),
                )
            )
            start += count
        layers.append(rows)
    assert start == len(flat)
    return layers


def our_prefix(key: str, layer: int) -> list[set[int]]:
    """Prefix positions that we keep, one set per head of the reference."""
    case, kept = CASES[key], retained(key).indices[layer]
    heads = kept.shape[0]
    if heads != case["sel_heads"]:
        # A method without a granularity chooses alike for all heads.
        assert "granularity" not in dkv.METHODS[str(our_name(case))].__dataclass_fields__
        kept = kept.repeat_interleave(case["sel_heads"] // heads, dim=0)
    prefix = case["seq_len"] - case["window"]
    return [{position for position in row if position < prefix} for row in kept.tolist()]


@pytest.mark.parametrize("key", cases(without=FITS | THIRTY_LAYERS))
def test_kept_positions_equal_the_reference(key: str) -> None:
    for layer, rows in enumerate(reference_kept(key)):
        for head, ((kept, ties), ours) in enumerate(zip(rows, our_prefix(key, layer), strict=True)):
            where = f"layer {layer}, head {head}"
            assert len(ours) == len(kept), where
            assert ours <= kept | ties, where
            assert kept - ties <= ours, where


@pytest.mark.parametrize("key", cases())
def test_the_window_is_kept_in_every_case(key: str) -> None:
    case = CASES[key]
    window = list(range(case["seq_len"] - case["window"], case["seq_len"]))
    for kept in retained(key).indices:
        assert all(row[-len(window) :] == window for row in kept.tolist())


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        (key, int(name.removeprefix("score_L")))
        for key in cases()
        for name in CASES[key]["arrays"]
        if name.startswith("score_L")
    ],
)
def test_scores_equal_the_reference(key: str, layer: int) -> None:
    np.testing.assert_allclose(scores_of(key)[layer], array(key, f"score_L{layer}"), rtol=1e-5)


@pytest.mark.parametrize("key", cases("DynamicKV"))
def test_counts_of_the_best_scores_over_all_layers_equal_the_reference(key: str) -> None:
    case, scores = CASES[key], scores_of(key)
    base = case["capacity"] - case["window"]
    for layer, expected in zip(
        array(key, "update_layers").tolist(), array(key, "topk_counts").tolist(), strict=True
    ):
        seen = layer + 1
        counts = count_global_top(scores[:seen], base * case["n_q_heads"] * seen)
        assert counts == expected[:seen]


@pytest.mark.parametrize(
    "key", cases("DynamicKV", without=FITS | {"s10_dynamickv", "s17_dynamickv"})
)
def test_budgets_after_every_update_equal_the_reference(key: str) -> None:
    history = retained(key).budget_history
    for ours, expected in zip(history, array(key, "budget_trace").tolist(), strict=False):
        assert list(ours) == [budget for budget in expected if budget >= 0]
    extra = 1 if key in THIRTY_LAYERS else 0
    assert len(history) == len(array(key, "update_layers")) + extra


@pytest.mark.parametrize("key", cases("DynamicKV", without=FITS | THIRTY_LAYERS))
def test_prefix_left_after_the_last_update_equals_the_reference(key: str) -> None:
    left = array(key, "prefix_len_trace")[-1] + CASES[key]["window"]
    assert retained(key).budgets == left.tolist()


@pytest.mark.parametrize("key", cases("DynamicKV"))
def test_no_more_than_capacity_times_layers_is_held_in_the_end(key: str) -> None:
    case = CASES[key]
    assert sum(retained(key).budgets) <= case["capacity"] * case["n_layers"]


# Departures from the references.


@pytest.mark.parametrize(
    "key", [key for key in cases() if CASES[key]["seq_len"] <= CASES[key]["capacity"]]
)
def test_a_prompt_that_fits_the_capacity_is_kept_whole(key: str) -> None:
    case = CASES[key]
    assert retained(key).budgets == [case["seq_len"]] * case["n_layers"]
    assert retained(key).kept_fraction == 1


@pytest.mark.parametrize("key", sorted(FITS))
def test_the_reference_evicts_from_these_prompts_that_fit(key: str) -> None:
    assert array(key, "kept_len").min() < CASES[key]["seq_len"] - CASES[key]["window"]


@pytest.mark.parametrize("key", cases(raising=True))
def test_prompts_on_which_the_reference_raises_are_kept_whole(key: str) -> None:
    case = CASES[key]
    assert retained(key).budgets == [case["seq_len"]] * case["n_layers"]


@pytest.mark.parametrize("key", [key for key in cases() if CASES[key].get("window_dup_layers")])
def test_a_budget_above_what_a_layer_still_holds_repeats_no_position(key: str) -> None:
    lengths = array(key, "final_cache_len")
    for layer in CASES[key]["window_dup_layers"]:
        assert lengths[layer] > retained(key).budgets[layer]
    for kept in retained(key).indices:
        assert (kept.diff(dim=1) > 0).all()


@pytest.mark.parametrize("key", cases("DynamicKV"))
def test_a_last_update_follows_the_last_layer(key: str) -> None:
    history = retained(key).budget_history
    if CASES[key]["seq_len"] > CASES[key]["capacity"]:
        assert len(history[-1]) == CASES[key]["n_layers"]


@pytest.mark.parametrize("key", sorted(THIRTY_LAYERS))
def test_the_added_last_update_only_removes_from_what_the_reference_keeps(key: str) -> None:
    for layer, rows in enumerate(reference_kept(key)):
        for (kept, ties), ours in zip(rows, our_prefix(key, layer), strict=True):
            assert ours <= kept | ties
    case = CASES[key]
    theirs = array(key, "kept_len").sum() + case["window"] * case["n_layers"]
    assert sum(retained(key).budgets) <= case["capacity"] * case["n_layers"]
    if key == "s07_dynamickv":
        assert theirs > case["capacity"] * case["n_layers"], "the reference holds too much here"


def test_shares_that_all_round_to_nothing_become_an_even_split() -> None:
    """The reference divides by zero when no layer's share reaches one token."""
    case = CASES["s22_dynamickv"]
    method = dataclasses.replace(method_of(case), capacity=33, r_max=1.0)
    retention = dkv.retain(method, *inputs_of("s22_dynamickv"))
    assert retention.budget_history[0] == (7, 7, 7, 9), "30 layers x 1 token over the 4 layers seen"


@pytest.mark.parametrize("key", ["s01_dynamickv", "s24_snapkv"])
def test_half_precision_inputs_are_scored_in_float32(key: str) -> None:
    method = method_of(CASES[key])
    queries, keys = inputs_of(key)
    halved = [[t.bfloat16() for t in tensors] for tensors in (queries, keys)]
    widened = [[t.float() for t in tensors] for tensors in halved]
    ours = dkv.retain(method, *halved)
    expected = dkv.retain(method, *widened)
    for kept, wide in zip(ours.indices, expected.indices, strict=True):
        assert torch.equal(kept, wide)


@pytest.mark.parametrize("key", cases())
def test_positions_are_stored_in_position_order(key: str) -> None:
    for kept in retained(key).indices:
        assert kept.dtype == torch.long
        assert (kept.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", sorted(set(dkv.METHODS) & set(METHOD_NAMES.values())))
def test_the_default_granularity_is_the_kv_head(name: str) -> None:
    case = CASES["s01_dynamickv"]
    method = dkv.build_method(name, capacity=case["capacity"])
    retention = dkv.retain(method, *inputs_of("s01_dynamickv"))
    assert {kept.shape[0] for kept in retention.indices} == {case["n_kv_heads"]}


def test_the_update_interval_is_a_parameter() -> None:
    method = dataclasses.replace(method_of(CASES["s02_dynamickv"]), update_interval=3)
    history = dkv.retain(method, *inputs_of("s02_dynamickv")).budget_history
    assert [len(update) for update in history] == [3, 6, 8]


def test_every_reference_method_has_cases() -> None:
    """The skipping of unregistered methods hides nothing: what is registered is compared."""
    for name in set(dkv.METHODS) & set(METHOD_NAMES.values()):
        assert cases(name)
