"""The contract that every registered method keeps, and what its parameters accept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import dynamickv as dkv
from tests.engine.tiny import (
    COMPRESSING,
    DOCUMENT,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    heads_of,
    method_name,
    random_layers,
    retain,
    small_instances,
    tiny_llm,
)

LENGTH = 60
CAPACITY = 24
QUERIES, KEYS = random_layers(seed=1, length=LENGTH)

OVERSPENT = {"PyramidKV": (NUM_LAYERS - 1) / 2}
"""Tokens per layer by which a method may exceed the capacity on average, as its reference does."""

every_method = pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
every_compressing_method = pytest.mark.parametrize("method", COMPRESSING, ids=method_name)


def query_head_instances() -> list[dkv.CompressionMethod]:
    return [
        method
        for method in small_instances(granularity="query_head")
        if getattr(method, "granularity", None) == "query_head"
    ]


def positions(retention: dkv.Retention) -> list[list[list[int]]]:
    return [heads_of(kept) for kept in retention.indices]


def test_the_methods_of_this_release_are_registered_under_their_own_names() -> None:
    assert {"FullKV", "SnapKV", "DynamicKV"} <= set(dkv.METHODS)
    assert all(name == kind.name for name, kind in dkv.METHODS.items())


def test_no_registered_method_is_left_out_of_these_tests() -> None:
    assert {method.name for method in SMALL_INSTANCES} == set(dkv.METHODS)


@every_method
def test_positions_are_ascending_unique_and_within_the_prompt(method: Any) -> None:
    retention = retain(method, QUERIES, KEYS)
    assert len(retention.indices) == NUM_LAYERS
    for kept in retention.indices:
        assert len(kept) == 2
        for head in kept:
            assert head.dtype == torch.long
            assert (head.diff() > 0).all()
            assert head.min() >= 0
            assert head.max() < LENGTH


@pytest.mark.parametrize(
    "method", [m for m in SMALL_INSTANCES if m.name != "KeyDiff"], ids=method_name
)
def test_the_end_of_the_prompt_is_kept_in_every_layer_and_head(method: Any) -> None:
    """KeyDiff has no window: its own test says so."""
    window = getattr(method, "window_size", 1)
    for kept in retain(method, QUERIES, KEYS).indices:
        assert all(head[-window:] == [*range(LENGTH - window, LENGTH)] for head in heads_of(kept))


@every_compressing_method
def test_no_more_than_capacity_times_layers_is_kept(method: Any) -> None:
    budgets = retain(method, QUERIES, KEYS).budgets
    assert sum(budgets) <= (CAPACITY + OVERSPENT.get(method.name, 0)) * NUM_LAYERS
    assert sum(budgets) < LENGTH * NUM_LAYERS


@every_compressing_method
def test_the_capacity_is_not_wasted(method: Any) -> None:
    """Permanent cuts may leave a little unused, never half of it."""
    assert sum(retain(method, QUERIES, KEYS).budgets) > CAPACITY * NUM_LAYERS / 2


@every_method
def test_budgets_and_kept_fraction_agree_with_the_positions(method: Any) -> None:
    retention = retain(method, QUERIES, KEYS)
    assert retention.prompt_length == LENGTH
    means = [sum(map(len, kept)) / len(kept) for kept in retention.indices]
    assert retention.budgets == means
    held = sum(len(row) for kept in retention.indices for row in kept)
    assert retention.kept_fraction == pytest.approx(held / (NUM_LAYERS * 2 * LENGTH))


@pytest.mark.parametrize("length", [1, 7, 8, 9, CAPACITY - 1, CAPACITY])
@every_method
def test_a_prompt_no_longer_than_the_capacity_is_kept_whole(method: Any, length: int) -> None:
    retention = retain(method, *random_layers(seed=2, length=length))
    assert retention.budgets == [length] * NUM_LAYERS
    assert retention.kept_fraction == 1


@every_compressing_method
def test_a_prompt_one_token_above_the_capacity_is_compressed(method: Any) -> None:
    retention = retain(method, *random_layers(seed=2, length=CAPACITY + 1))
    assert retention.kept_fraction < 1 or method.name in OVERSPENT


@every_method
def test_choosing_twice_gives_the_same_positions(method: Any) -> None:
    first, second = (retain(method, QUERIES, KEYS) for _ in range(2))
    assert first.budget_history == second.budget_history
    assert positions(first) == positions(second)


@every_method
def test_choosing_changes_neither_queries_nor_keys(method: Any) -> None:
    queries, keys = ([tensor.clone() for tensor in tensors] for tensors in (QUERIES, KEYS))
    retain(method, queries, keys)
    for before, after in ((QUERIES, queries), (KEYS, keys)):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", query_head_instances(), ids=method_name)
def test_query_head_granularity_chooses_for_every_query_head(method: Any) -> None:
    retention = retain(method, QUERIES, KEYS)
    assert {len(kept) for kept in retention.indices} == {6}
    fitting = retain(method, *random_layers(seed=2, length=CAPACITY))
    assert {len(kept) for kept in fitting.indices} == {6}
    if method.capabilities.window or method.capabilities.mass:
        one_group = heads_of(retention.indices[0])[:3]
        assert one_group[0] != one_group[1]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 9])
@every_method
def test_every_number_of_layers_works(method: Any, num_layers: int) -> None:
    retention = retain(method, *random_layers(seed=3, num_layers=num_layers))
    assert len(retention.budgets) == num_layers
    assert min(retention.budgets) >= 1


@every_method
def test_query_heads_may_equal_kv_heads(method: Any) -> None:
    queries, keys = random_layers(seed=4, query_heads=3, kv_heads=3)
    assert {len(kept) for kept in retain(method, queries, keys).indices} == {3}


@pytest.mark.parametrize(
    "method",
    [m for m in SMALL_INSTANCES if not m.needs_mass],
    ids=method_name,
)
def test_the_last_queries_that_a_method_names_are_enough(method: Any) -> None:
    tail = method.tail
    ours = retain(method, [query[:, :, -tail:] for query in QUERIES], KEYS)
    whole = retain(method, QUERIES, KEYS)
    assert positions(ours) == positions(whole)


@every_method
def test_parameters_are_json_and_build_the_same_method_again(method: Any) -> None:
    assert json.loads(json.dumps(method.parameters)) == method.parameters
    assert dkv.build_method(method.name, **method.parameters) == method


@every_method
def test_methods_are_frozen_and_take_keywords_only(method: Any) -> None:
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))
    with pytest.raises(TypeError):
        type(method)(64)


def test_the_papers_values_are_the_defaults() -> None:
    method = dkv.DynamicKV(capacity=128)
    assert method.parameters == {
        "capacity": 128,
        "granularity": "kv_head",
        "window_size": 8,
        "kernel_size": 7,
        "pooling": "max",
        "group_reduction": "mean",
        "head_budgets": "uniform",
        "r_max": 10.0,
        "update_interval": 4,
        "progressive": True,
    }


# A method that a stranger adds: one class, one line in METHODS.


@dataclass(frozen=True, kw_only=True)
class FirstTokens(dkv.ScoredMethod):
    """Prefers what comes early."""

    name: ClassVar[str] = "FirstTokens"

    def score(self, layer: dkv.LayerObservation) -> Tensor:
        prefix = layer.prompt_length - self.window_size
        return torch.arange(prefix, 0, -1.0).expand(layer.num_kv_heads, -1)


def test_a_new_method_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dkv.METHODS, "FirstTokens", FirstTokens)
    method = dkv.build_method("FirstTokens", capacity=CAPACITY, r_max=3.0)
    retention = retain(method, QUERIES, KEYS)
    expected = [*range(CAPACITY - 8), *range(LENGTH - 8, LENGTH)]
    assert all(row == expected for kept in retention.indices for row in kept.tolist())


# Bad parameters: a ValueError that names the parameter, its value and what to do.

WHOLE = [0, -3, 1.5, "9", None, True, float("nan")]
CHOICE = ["MAX", "", None, 1]
BAD_VALUES: dict[str, list[Any]] = {
    "capacity": WHOLE,
    "window_size": WHOLE,
    "kernel_size": [*WHOLE, 2, 6],
    "pooling": CHOICE,
    "granularity": CHOICE,
    "group_reduction": CHOICE,
    "head_budgets": CHOICE,
    "progressive": [0, "no", None],
    "update_interval": WHOLE,
    "r_max": [0, -1.0, float("nan"), float("inf"), "10", None, True],
    "beta": WHOLE,
    "tau1": [0, -1.0, 0.01, float("nan"), float("inf"), "1", None, True],
    "tau2": [0, -1.0, 0.01, float("nan"), float("inf"), "1", None, True],
    "gamma": [0, -1.0, float("nan"), float("inf"), "200", None, True],
    "alpha": [-0.1, 1.5, float("nan"), "0.2", None, True],
    "context_size": [*WHOLE, 8],
    "voted_share": [-0.1, 1.5, float("nan"), "0.5", None, True],
    "voting_size": WHOLE,
    "smoothing": [*WHOLE, 4],
    "reach": [-1, 1.5, "4", None, True],
    "sinks": [-1, 1.5, "4", None, True],
    "pinned": ["3", 3, None, [[3]], [[4, 3]], [[-1, 3]], [[0, 1.5]], [[0, True]], [3]],
    "evicted": ["3", 3, None, [[3]], [[4, 3]], [[-1, 3]], [[0, 1.5]], [[0, True]], [3]],
    "budgets": ["12", 12, None, [12.5] * NUM_LAYERS, [0] * NUM_LAYERS, [True] * NUM_LAYERS],
}


@pytest.mark.parametrize(
    ("method", "parameter", "enough", "more"),
    [
        ("DynamicKV", "r_max", 1e6, 1e308),
        ("ShiftKV", "r_max", 1e6, 1e308),
        ("VoteKV", "reach", LENGTH, 10**19),
        ("VoteKV", "smoothing", 2 * LENGTH + 1, 10**10 + 1),
    ],
)
def test_beyond_what_a_prompt_holds_a_larger_value_changes_nothing(
    method: str, parameter: str, enough: float, more: float
) -> None:
    kept, same = (
        dkv.retain(dkv.METHODS[method](capacity=CAPACITY, **{parameter: value}), QUERIES, KEYS)
        for value in (enough, more)
    )
    assert all(map(torch.equal, kept.indices, same.indices))


def parameters_of(methods: list[dkv.CompressionMethod]) -> list[tuple[str, str]]:
    return [(m.name, field.name) for m in methods for field in dataclasses.fields(m)]


def test_every_parameter_of_every_method_has_bad_values_here() -> None:
    assert {name for _, name in parameters_of(SMALL_INSTANCES)} <= set(BAD_VALUES)


@pytest.mark.parametrize(("method", "parameter"), parameters_of(SMALL_INSTANCES))
def test_a_bad_value_is_refused_by_name_and_value(method: str, parameter: str) -> None:
    for value in BAD_VALUES[parameter]:
        if (method, parameter, value) == ("Manual", "capacity", 0):
            continue  # its default: then budgets are asked for, as tested below
        settings = {"capacity": CAPACITY, parameter: value}
        with pytest.raises(ValueError, match=parameter) as refusal:
            dkv.METHODS[method](**settings)
        sentence = str(refusal.value)
        assert "\n" not in sentence
        shown = value[0] if isinstance(value, list) else value
        assert str(shown) in sentence or repr(shown) in sentence


def test_capacity_not_above_the_window_names_both_numbers() -> None:
    with pytest.raises(ValueError, match="capacity must exceed window_size=8 tokens, got 8"):
        dkv.SnapKV(capacity=8, window_size=8)


def test_an_even_kernel_names_the_reason() -> None:
    with pytest.raises(
        ValueError, match="kernel_size must be odd to keep positions aligned, got 4"
    ):
        dkv.DynamicKV(capacity=64, kernel_size=4)


@pytest.mark.skipif("Manual" not in dkv.METHODS, reason="not registered")
class TestManual:
    def test_budgets_are_kept_as_given_window_included(self) -> None:
        budgets = [8, 9, 30, 60, 99, 12]
        retention = dkv.retain(dkv.build_method("Manual", budgets=budgets), QUERIES, KEYS)
        assert retention.budgets == [8, 9, 30, 60, 60, 12]

    def test_the_capacity_becomes_the_mean_of_the_budgets(self) -> None:
        manual = dkv.build_method("Manual", budgets=[8, 9, 30, 60, 99, 12], capacity=500)
        assert manual.parameters["capacity"] == 36

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({}, "Manual needs budgets, one number of tokens per layer"),
            ({"budgets": [8, 7]}, r"budgets\[1\] must be at least 8 tokens, got 7"),
            ({"budgets": [8, 8], "kernel_size": 2}, "kernel_size must be odd"),
            ({"budgets": [8, 8], "granularity": "head"}, "granularity must be"),
            ({"budgets": [8], "window_size": "8"}, "window_size must be a whole number"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, settings: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            dkv.METHODS["Manual"](**settings)

    def test_a_number_of_budgets_other_than_the_layers_names_both(self) -> None:
        with pytest.raises(ValueError, match="budgets has 2 numbers and the model 6 layers"):
            dkv.retain(dkv.build_method("Manual", budgets=[20, 20]), QUERIES, KEYS)


def test_an_unknown_method_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"no method 'Snap'; choose from FullKV, .*DynamicKV"):
        dkv.build_method("Snap", capacity=64)
    with pytest.raises(ValueError, match="no method 'fullkv'"):
        dkv.build_methods(["SnapKV", "fullkv"], capacity=64)


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="DynamicKV needs capacity; give it a value"):
        dkv.build_method("DynamicKV")


def test_build_methods_keeps_the_registrys_order_and_drops_repeats() -> None:
    built = dkv.build_methods(["DynamicKV", "FullKV", "DynamicKV"], capacity=64, r_max=None)
    assert built == [dkv.FullKV(), dkv.DynamicKV(capacity=64)]


def test_a_window_wider_than_the_recorded_queries_says_what_to_do() -> None:
    tails = [query[:, :, -4:] for query in QUERIES]
    with pytest.raises(
        ValueError, match="window_size=8 needs as many queries, and 4 were recorded"
    ):
        dkv.retain(dkv.SnapKV(capacity=CAPACITY), tails, KEYS)


@pytest.mark.skipif("H2O" not in dkv.METHODS, reason="not registered")
def test_h2o_without_the_attention_of_all_queries_says_what_to_do() -> None:
    tails = [query[:, :, -20:] for query in QUERIES]
    with pytest.raises(ValueError, match="prefill with mass=True or give the queries of the whole"):
        dkv.retain(dkv.build_method("H2O", capacity=CAPACITY), tails, KEYS)


# Bad tensors.


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([], []),
        (QUERIES, KEYS[:-1]),
        ([q[0] for q in QUERIES], KEYS),
        ([q[:, :, :, :4] for q in QUERIES], KEYS),
        ([q[:, :5] for q in QUERIES], KEYS),
        (QUERIES, [k[:, :, :-1] for k in KEYS]),
        (QUERIES, [k[:, :, :0] for k in KEYS]),
        ([q.repeat(2, 1, 1, 1) for q in QUERIES], [k.repeat(2, 1, 1, 1) for k in KEYS]),
        ([q[:, :, -9:] for q in QUERIES], [*KEYS[:-1], KEYS[-1][:, :, :-1]]),
        ([*QUERIES[:-1], QUERIES[-1] * float("nan")], KEYS),
        (QUERIES, [KEYS[0] / 0, *KEYS[1:]]),
        ([q.numpy() for q in QUERIES], KEYS),
    ],
    ids=[
        "no-layers",
        "fewer-keys",
        "no-batch",
        "other-head-dim",
        "heads-not-a-multiple",
        "more-queries-than-keys",
        "empty-prompt",
        "batch-of-two",
        "unequal-layers",
        "nan",
        "infinity",
        "arrays",
    ],
)
@every_method
def test_tensors_that_do_not_belong_together_are_refused(
    method: Any, queries: list[Tensor], keys: list[Tensor]
) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the sentences differ
        retain(method, queries, keys)
    assert "\n" not in str(refusal.value)


def test_a_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(ValueError, match="give an instance such as"):
        dkv.retain(dkv.FullKV, QUERIES, KEYS)  # type: ignore[arg-type]


class Flat(dkv.DynamicKV):
    """DynamicKV with an `allocate` of its own."""

    def allocate(self, scores: Sequence[Tensor], num_layers: int) -> list[int]:
        """As much for every layer."""
        return [self.mean_budget] * len(scores)


def test_a_method_made_of_dynamickv_settles_its_own_budgets() -> None:
    read = dkv.prefill(tiny_llm(), DOCUMENT, QUESTION)
    kinds = Flat, dkv.DynamicKV
    even, own = (kind(capacity=24).select(read.layers).budgets for kind in kinds)
    assert set(even) == {24}
    assert set(own) != {24}
