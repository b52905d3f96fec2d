"""A text fed to caches that go on compressing: what is said of it is what such a cache says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import dynamickv as dkv
from dynamickv.decoding.forcing import forced
from dynamickv.decoding.forgetting import Choice
from dynamickv.evaluate import Journal, methods_at, rows_of, run
from dynamickv.evaluate.forgetting import (
    PARTS,
    ForgettingExperiment,
    curves,
    forgetting_csv,
    forgetting_summary,
    forgetting_table,
)
from dynamickv.record.aligned import Forced
from tests.engine.tiny import DOCUMENT, QUESTION, SMALL_INSTANCES, method_name

DECODING = dkv.Decoding(budget=32, buffer=8)
STEPS = 30
DECODABLE = [
    method
    for method in SMALL_INSTANCES
    if method.capabilities.decoding and getattr(method, "head_budgets", "") != "adaptive"
]
TEXT = DOCUMENT * 2


@pytest.mark.parametrize("method", DECODABLE, ids=method_name)
def test_a_runs_own_answer_fed_to_its_cache_is_what_that_cache_says(
    method: Any, llm: dkv.LoadedModel
) -> None:
    read = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    own = dkv.compare(
        llm, prefill=read, methods=[method], max_new_tokens=STEPS, decoding=DECODING
    ).runs[0]
    choices: list[Choice] = []
    along = forced(llm, read, method, own.token_ids, DECODING, choices.append)
    assert along.likeliest == own.token_ids
    assert along.probabilities == pytest.approx([math.exp(v) for v in own.logprobs], rel=1e-3)
    # The answer's last token is never fed, so nothing is chosen for it.
    assert [choice.seen - read.length for choice in choices] == [
        choice.position for choice in own.forgotten if choice.position < STEPS - 1
    ]
    assert len(choices) >= 2


def test_without_decoding_the_cache_keeps_what_it_kept_of_the_prompt(llm: dkv.LoadedModel) -> None:
    read, method = dkv.prefill(llm, DOCUMENT, QUESTION), dkv.SnapKV(capacity=24)
    own = dkv.compare(llm, prefill=read, methods=[method], max_new_tokens=STEPS).runs[0]
    assert forced(llm, read, method, own.token_ids).likeliest == own.token_ids
    with pytest.raises(ValueError, match="give at least one"):
        forced(llm, read, method, [])


def measured(llm: dkv.LoadedModel, path: Path, methods: Any, **changes: Any) -> list[Any]:
    sizes = {"prompt_tokens": 64, "answer_tokens": 64, "buffer": 8, **changes}
    experiment = ForgettingExperiment(llm, {"d": TEXT}, **sizes)
    for _ in run(experiment, methods, Journal(path)):
        pass
    return rows_of(Journal(path), experiment.units())


def test_a_budget_that_everything_fits_in_forgets_nothing(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    methods = methods_at(["FullKV", "SnapKV", "DynamicKV", "H2O"], [24, 500])
    (row,) = measured(llm, tmp_path / "f.jsonl", methods)
    for entry in row["runs"]:
        fits = entry["parameters"].get("capacity") != 24
        assert (entry["choices"] == 0) == fits
        assert (entry["surviving"] > 1 - 1e-4) == fits
        assert (entry["agreement"] == 1.0) == fits
        assert len(entry["agreement_curve"]) == len(entry["surviving_curve"]) == PARTS


def test_what_is_read_and_what_is_fed_are_the_text(llm: dkv.LoadedModel) -> None:
    experiment = ForgettingExperiment(llm, {"d": TEXT}, 64, 32)
    prompt, answer = experiment.parts(TEXT)
    assert len(llm.tokenizer(prompt)["input_ids"]) == 64
    assert TEXT.startswith(prompt + llm.tokenizer.decode(answer))
    assert len(answer) == 32


def test_curves_are_means_over_equal_parts_of_tokens_and_of_words() -> None:
    pieces = [" a"] * 16
    full = Forced(probabilities=[0.5] * 16, likeliest=[1] * 16, likeliest_probabilities=[0.5] * 16)
    own = Forced(
        probabilities=[0.5] * 8 + [0.25] * 7 + [0.75],
        likeliest=[1] * 12 + [2] * 4,
        likeliest_probabilities=[0.5] * 16,
    )
    told = curves(full, own, pieces)
    assert told["agreement"] == 0.75
    assert told["agreement_curve"] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert told["surviving_curve"] == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.75]
    assert told["surviving"] == pytest.approx((9 + 7 / 2) / 16)
    nats = -(8 * math.log(0.5) + 7 * math.log(0.25) + math.log(0.75)) / 16
    assert told["nats"] == pytest.approx(nats)


def test_the_summary_is_over_texts(llm: dkv.LoadedModel, tmp_path: Path) -> None:
    (row,) = measured(llm, tmp_path / "f.jsonl", methods_at(["SnapKV"], [24]))
    lost = {"surviving": 0.0, "surviving_curve": [0.0] * PARTS}
    other = {**row, "runs": [{**row["runs"][0], **lost}]}
    (line,) = forgetting_summary([row, other])
    assert (line["budget"], line["texts"]) == (24, 2)
    assert line["surviving"] == pytest.approx(row["runs"][0]["surviving"] / 2)
    low, high = line["surviving_interval"]
    assert low < line["surviving"] < high
    assert line["surviving_curve"] == pytest.approx(
        [value / 2 for value in row["runs"][0]["surviving_curve"]], abs=1e-6
    )
    assert "2 texts" in forgetting_table([line])
    assert len(forgetting_csv([line]).splitlines()) == 1 + PARTS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_tokens": 5}, "prompt_tokens must be at least 64, got 5"),
        ({"buffer": 0}, "buffer must be at least 1, got 0"),
        ({"answer_tokens": 99999}, "more than this model reads"),
        ({"answer_tokens": 1500}, "give a longer text"),
    ],
)
def test_what_cannot_be_fed_is_refused_in_a_sentence(
    changes: dict[str, int], words: str, llm: dkv.LoadedModel
) -> None:
    with pytest.raises(ValueError, match=words):
        ForgettingExperiment(llm, {"d": TEXT}, **changes)
