"""CAKE, LAVa and KeyDiff keep what their authors' code keeps, on recorded cases.

Departures are deliberate; each has its own test at the end. Reference arrays: tests/golden.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dynamickv as dkv
from tests.engine.methods import naive

FOLDER = Path(__file__).parents[2] / "golden"
ARRAYS = np.load(FOLDER / "golden2_shared.npz")
CASES = {
    case["id"]: case
    for case in json.loads((FOLDER / "golden2_shared.json").read_text("utf-8"))["cases"]
}
POOLINGS = {"maxpool": "max", "avgpool": "avg"}

CUT_LATER = "u04_cake"
"""capacity < n <= capacity + window, which the reference compresses with the first new token."""
GROWS = "u14_cake"
"""A budget rises by one at a later stage, when the reference has dropped the token."""
BLOCKWISE = "u17_keydiff"
"""kvpress's block form."""
NORMALIZED = "u12_lava"
"""The option `normalize`, which moves budgets between heads; layer budgets do not see it."""
FAILS = "u13_lava"
"""A budget above the prefix, on which the reference raises IndexError."""


def cases(method: str, *without: str) -> list[str]:
    return [key for key, case in CASES.items() if case["method"] == method and key not in without]


def kept_of(case: dict[str, Any]) -> int:
    return int(case["seq_len"] * (1 - case["ratio"]))


def method_of(key: str) -> dkv.CompressionMethod:
    case = CASES[key]
    if case["method"] == "keydiff":
        return dkv.KeyDiff(capacity=kept_of(case))
    settings = {"capacity": case["capacity"], "window_size": case["window"]}
    if case["method"] == "cake":
        return dkv.CAKE(**settings, tau1=case["tau1"], tau2=case["tau2"], gamma=case["gamma"])
    return dkv.LAVa(
        **settings,
        kernel_size=case["kernel"],
        pooling=POOLINGS[case["pooling"]],
        alpha=case["floor_alpha"],
    )


@cache
def inputs_of(key: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, keys and values of every layer."""
    case = CASES[key]
    rng = np.random.default_rng(case["seed"])
    size = case["seq_len"], case["head_dim"]
    layers = []
    for scale in case["q_scale"]:
        query = rng.standard_normal((1, case["n_q_heads"], *size), dtype=np.float32)
        states = [
            rng.standard_normal((1, case["n_kv_heads"], *size), dtype=np.float32) for _ in "kv"
        ]
        layers.append([torch.from_numpy(t) for t in (query * np.float32(scale), *states)])
    queries, keys, values = (list(tensors) for tensors in zip(*layers, strict=True))
    check = case.get("input_check")
    if check is not None:
        assert np.array_equal(np.float32(check["Q_layer0_first4"]), queries[0].ravel()[:4])
        assert np.array_equal(np.float32(check["K_lastlayer_last4"]), keys[-1].ravel()[-4:])
        assert np.array_equal(np.float32(check["V_lastlayer_last4"]), values[-1].ravel()[-4:])
    return queries, keys, values


@cache
def retained(key: str) -> dkv.Retention:
    return dkv.retain(method_of(key), *inputs_of(key))


def observed(key: str) -> list[dkv.LayerObservation]:
    return [
        dkv.LayerObservation(
            queries=query[0], keys=key_states[0], values=value[0], scaling=query.shape[-1] ** -0.5
        )
        for query, key_states, value in zip(*inputs_of(key), strict=True)
    ]


def array(key: str, name: str) -> np.ndarray:
    found: np.ndarray = ARRAYS[f"{key}.{name}"]
    return found


def reference_kept(key: str) -> list[list[tuple[set[int], set[int]]]]:
    """Per layer and head: the positions kept, and those tied with the last of them."""
    flat, ties, bounds = array(key, "kept"), array(key, "tie"), array(key, "tie_ptr")
    start, row, layers = 0, 0, []
    for counts in array(key, "kept_len").tolist():
        rows = []
        for count in counts:
            tied = set(ties[bounds[row] : bounds[row + 1]].tolist())
            rows.append((set(flat[start : start + count].tolist()), tied))
            start, row = start + count, row + 1
        layers.append(rows)
    assert start == len(flat)
    return layers


def scored(key: str) -> list[tuple[int, Tensor]]:
    """Our scores of the layers of which the reference's are recorded."""
    method: Any = method_of(key)
    layers = observed(key)
    places = [
        int(name.removeprefix("score_L"))
        for name in CASES[key]["arrays"]
        if name.startswith("score_L")
    ]
    return [(place, method.score(layers[place])) for place in places]


def weighed(key: str) -> list[float]:
    method: Any = method_of(key)
    return [method.weigh(layer)[1] for layer in observed(key)]


@pytest.mark.parametrize("key", [*cases("cake", CUT_LATER, GROWS), *cases("keydiff", BLOCKWISE)])
def test_kept_positions_equal_the_reference(key: str) -> None:
    case = CASES[key]
    end = case["seq_len"] - case.get("window", 0)
    for layer, rows in enumerate(reference_kept(key)):
        ours_of = retained(key).indices[layer]
        for head, ((kept, ties), ours) in enumerate(zip(rows, ours_of, strict=True)):
            where = f"layer {layer}, head {head}"
            prefix = {position for position in ours.tolist() if position < end}
            assert len(prefix) == len(kept), where
            assert prefix <= kept | ties, where
            assert kept - ties <= prefix, where
            assert ours.tolist()[len(prefix) :] == list(range(end, case["seq_len"])), where


@pytest.mark.parametrize(
    "key", [key for key, case in CASES.items() if "score_L0" in case["arrays"]]
)
def test_scores_equal_the_reference(key: str) -> None:
    for layer, ours in scored(key):
        np.testing.assert_allclose(ours, array(key, f"score_L{layer}"), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("key", cases("cake"))
def test_preferences_of_layers_equal_the_reference(key: str) -> None:
    np.testing.assert_allclose(weighed(key), array(key, "pref"), rtol=1e-3)


@pytest.mark.parametrize("key", cases("lava", FAILS))
def test_entropies_of_layers_equal_the_reference(key: str) -> None:
    np.testing.assert_allclose(weighed(key), array(key, "entropy"), rtol=1e-5)


@pytest.mark.parametrize("key", cases("cake", CUT_LATER))
def test_layer_budgets_of_cake_equal_the_reference(key: str) -> None:
    budgets = [budget - CASES[key]["window"] for budget in retained(key).budgets]
    assert budgets == array(key, "layer_budget").tolist()
    assert retained(key).budget_history == (tuple(budgets),)


@pytest.mark.parametrize("key", cases("lava", FAILS))
def test_layer_budgets_of_lava_equal_the_reference_after_every_layer_where_they_fit(
    key: str,
) -> None:
    prefix = CASES[key]["seq_len"] - CASES[key]["window"]
    history, trace = retained(key).budget_history, array(key, "budget_trace").tolist()
    assert len(history) == len(trace)
    fitting = 0
    for ours, row in zip(history, trace, strict=True):
        theirs = [budget for budget in row if budget >= 0]
        if max(theirs) <= prefix:
            assert list(ours) == theirs
            fitting += 1
    assert fitting > 0
    assert retained(key).budgets == [budget + CASES[key]["window"] for budget in history[-1]]


@pytest.mark.parametrize("key", CASES)
def test_no_more_than_capacity_times_layers_is_held(key: str) -> None:
    method: Any = method_of(key)
    assert sum(retained(key).budgets) <= method.capacity * CASES[key]["n_layers"]


# Departures from the references.


def test_cake_compresses_a_prompt_a_little_longer_than_the_capacity() -> None:
    """The reference leaves it whole until the first new token."""
    case = CASES[CUT_LATER]
    assert case["capacity"] < case["seq_len"] <= case["capacity"] + case["window"]
    assert (array(CUT_LATER, "kept_len") == case["seq_len"] - case["window"]).all()
    assert sum(retained(CUT_LATER).budgets) <= case["capacity"] * case["n_layers"]


def test_cake_in_one_shot_keeps_the_token_that_the_cascade_has_lost() -> None:
    theirs = array(GROWS, "prefix_len_trace")[-1].sum()
    ours = sum(retained(GROWS).budgets) - CASES[GROWS]["window"] * CASES[GROWS]["n_layers"]
    assert (theirs, ours) == (CASES[GROWS]["sum_kept"], CASES[GROWS]["sum_nominal"])
    for rows, heads in zip(reference_kept(GROWS), retained(GROWS).indices, strict=True):
        for (kept, _), held in zip(rows, heads, strict=True):
            assert kept <= set(held.tolist())


def random_claims(seed: int) -> tuple[list[float], int]:
    """Claims that lie orders of magnitude apart, as small temperatures make them, and a prefix."""
    rng = np.random.default_rng(seed)
    claims = (10.0 ** rng.uniform(-4, 4, rng.integers(2, 12))).tolist()
    return claims, int(rng.integers(40, 400))


@pytest.mark.parametrize("seed", range(300))
def test_cake_ends_with_no_more_than_it_held_while_the_prompt_was_read(seed: int) -> None:
    claims, prefix = random_claims(seed)
    method = dkv.CAKE(capacity=40)
    held = [prefix] * len(claims)
    for seen in range(1, len(claims) + 1):
        budgets = method.budgets_of(claims[:seen], len(claims), prefix)
        if seen == len(claims):
            assert all(now <= before for now, before in zip(budgets, held, strict=True))
        held[:seen] = map(min, held, budgets)


def test_cake_holds_while_reading_a_long_prompt_little_more_than_in_the_end() -> None:
    """A prompt as long as all layers' budgets together: what one layer cannot hold is nothing."""
    method, layers = dkv.CAKE(capacity=40), 10
    claims = (10.0 ** np.random.default_rng(0).uniform(-4, 4, layers)).tolist()
    for seen in range(1, layers):
        budgets = method.budgets_of(claims[:seen], layers, 40 * layers)
        assert sum(budgets) <= method.mean_budget * layers + 5 * seen


@pytest.mark.parametrize("seed", range(300))
def test_budgets_of_lava_only_fall_and_never_sum_to_more_than_all_layers_have(seed: int) -> None:
    claims, prefix = random_claims(seed)
    method = dkv.LAVa(capacity=40)
    stages = [
        method.budgets_of(claims[:seen], len(claims), prefix) for seen in range(1, len(claims) + 1)
    ]
    for before, now in pairwise(stages):
        assert all(later <= earlier for earlier, later in zip(before, now[:-1], strict=True))
    for budgets in stages:
        assert sum(budgets) <= method.mean_budget * len(claims)
        assert max(budgets) <= prefix
        assert sum(budgets) > min(method.mean_budget * len(claims), prefix * len(budgets)) - len(
            claims
        )


def test_lava_caps_a_budget_where_the_reference_fails_and_hands_on_the_rest() -> None:
    case, retention = CASES[FAILS], retained(FAILS)
    prefix = case["seq_len"] - case["window"]
    shares = np.array(weighed(FAILS))
    shares = shares / shares.sum() * (case["capacity"] - case["window"]) * case["n_layers"]
    assert shares.max() > prefix, "what the reference fails on"
    budgets = [budget - case["window"] for budget in retention.budgets]
    assert max(budgets) == prefix
    total = (case["capacity"] - case["window"]) * case["n_layers"]
    assert total - case["n_layers"] < sum(budgets) <= total


@pytest.mark.parametrize("key", cases("lava", FAILS))
def test_lavas_floor_of_a_head_follows_the_budget_of_its_layer(key: str) -> None:
    """The reference's is alpha x capacity, window included, whatever the layer's budget."""
    case = CASES[key]
    method, window = method_of(key), case["window"]
    floors, theirs = [], int(case["floor_alpha"] * case["capacity"])
    for heads, budget in zip(retained(key).indices, retained(key).budgets, strict=True):
        least = min(len(head) for head in heads) - window
        floors.append(int(method.alpha * (budget - window)))  # type: ignore[attr-defined]
        assert least >= floors[-1]
        assert sum(len(head) for head in heads) == budget * case["sel_heads"]
    assert set(floors) != {theirs}


def test_lavas_heads_share_the_best_scores_of_the_layer_where_there_is_no_floor() -> None:
    key = "u08_lava"
    method = dataclasses.replace(method_of(key), alpha=0)  # type: ignore[type-var]
    retention = dkv.retain(method, *inputs_of(key))
    for layer, heads in zip(observed(key), retention.indices, strict=True):
        scores = method.score(layer)  # type: ignore[attr-defined]
        prefix = scores.shape[1]
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for head, positions in enumerate(heads):
            kept[head, positions[positions < prefix]] = True
        assert scores[kept].min() >= scores[~kept].max()


def test_keydiff_has_no_block_form() -> None:
    ours = {tuple(head.tolist()) for layer in retained(BLOCKWISE).indices for head in layer}
    theirs = {tuple(sorted(kept)) for rows in reference_kept(BLOCKWISE) for kept, _ in rows}
    assert {len(head) for head in ours} == {len(head) for head in theirs}
    assert ours != theirs


def test_keydiff_keeps_its_capacity_wherever_it_lies_and_reads_keys_alone() -> None:
    key = "u16_keydiff"
    queries, keys, _ = inputs_of(key)
    kept = retained(key).indices[0]
    assert kept.shape[1] == kept_of(CASES[key])
    assert any(CASES[key]["seq_len"] - 1 not in head for head in kept.tolist())
    other = dkv.retain(method_of(key), [query.flip(2) for query in queries], keys)
    assert all(map(torch.equal, retained(key).indices, other.indices))


@pytest.mark.parametrize("key", ["u00_cake", "u07_lava", "u15_keydiff"])
def test_half_precision_inputs_are_scored_in_float32(key: str) -> None:
    halved = [[t.bfloat16() for t in tensors] for tensors in inputs_of(key)]
    widened = [[t.float() for t in tensors] for tensors in halved]
    ours, expected = (dkv.retain(method_of(key), *given) for given in (halved, widened))
    for kept, wide in zip(ours.indices, expected.indices, strict=True):
        assert all(map(torch.equal, kept, wide))


@pytest.mark.parametrize("key", ["u00_cake", "u07_lava", "u15_keydiff"])
def test_a_prompt_that_fits_the_capacity_is_kept_whole(key: str) -> None:
    length = CASES[key]["seq_len"]
    method = dataclasses.replace(method_of(key), capacity=length)  # type: ignore[type-var]
    queries, keys, _ = inputs_of(key)
    assert dkv.retain(method, queries, keys).kept_fraction == 1


def test_cake_refuses_a_window_over_which_nothing_varies() -> None:
    with pytest.raises(ValueError, match="window_size must be at least 2 tokens, got 1"):
        dkv.CAKE(capacity=40, window_size=1)


def test_lava_asks_for_values() -> None:
    queries, keys, values = inputs_of("u07_lava")
    method = method_of("u07_lava")
    with pytest.raises(ValueError, match="LAVa needs the values"):
        dkv.retain(method, queries, keys)
    with pytest.raises(ValueError, match="one tensor per layer, got 1 for 4 layers"):
        dkv.retain(method, queries, keys, values[:1])
    with pytest.raises(ValueError, match="same heads and positions"):
        dkv.retain(method, queries, keys, [value[:, :, 1:] for value in values])
    with pytest.raises(ValueError, match=r"values .* hold NaN or infinity"):
        dkv.retain(method, queries, keys, [value * float("nan") for value in values])


def test_moments_equal_a_loop() -> None:
    layer = observed("u01_cake")[0]
    window = 5
    mean, variance, dispersion = layer.moments(window)
    query_heads, length, head_dim = layer.queries.shape
    attention = np.zeros((query_heads, window, length - window))
    for head in range(query_heads):
        for row in range(window):
            seen = length - window + row + 1
            logits = layer.keys[head // 3, :seen].double() @ layer.queries[head, seen - 1].double()
            weights = naive.softmax(logits.numpy() * head_dim**-0.5)
            attention[head, row] = weights[: length - window]
    np.testing.assert_allclose(mean, attention.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(variance, attention.var(axis=1, ddof=1), rtol=1e-3, atol=1e-9)
    entropy = -(attention * np.log(attention + 1e-10)).sum(axis=1)
    np.testing.assert_allclose(dispersion, entropy, rtol=1e-4)
