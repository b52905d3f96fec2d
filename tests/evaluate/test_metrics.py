"""The metrics are LongBench's, and the intervals are what their names say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamickv.evaluate import metrics
from dynamickv.evaluate.metrics import (
    METRICS,
    contains_all,
    contains_any,
    fuzzy,
    repetition,
    rouge_gives_up,
)
from dynamickv.evaluate.statistics import bootstrap, wilson

GOLDEN = Path(__file__).parents[1] / "golden" / "longbench_metrics.json"
OFFICIAL = {
    "qa_f1_score": "qa_f1",
    "qa_f1_zh_score": "qa_f1_zh",
    "rouge_score": "rouge_l",
    "rouge_zh_score": "rouge_l_zh",
    "classification_score": "classification",
    "retrieval_score": "retrieval",
    "retrieval_zh_score": "retrieval_zh",
    "count_score": "count",
    "code_sim_score": "code_similarity",
}
CASES = json.loads(GOLDEN.read_text("utf-8"))


@pytest.mark.parametrize("official", OFFICIAL)
def test_every_case_scores_as_the_official_scorer_says(official: str) -> None:
    cases = [case for case in CASES if case["metric"] == official]
    assert cases
    for case in cases:
        score = METRICS[OFFICIAL[official]](
            case["prediction"], case["ground_truth"], all_classes=case.get("all_classes")
        )
        assert score == pytest.approx(case["expected"], abs=1e-6), case


def test_the_registry_has_exactly_the_official_metrics() -> None:
    assert set(METRICS) == set(OFFICIAL.values())


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_answer_scores_nothing(name: str) -> None:
    truth = {"retrieval": "Paragraph 3", "retrieval_zh": "段落3"}.get(name, "three")
    assert METRICS[name]("", truth, all_classes=["three", "four"]) == 0.0


def test_classes_are_removed_while_walking_as_the_official_scorer_does() -> None:
    # "a" is removed, so "ab" moves to its place and is never looked at.
    assert METRICS["classification"]("a ab abc", "abc", all_classes=["a", "ab", "abc"]) == 0.5


def test_classification_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs all_classes"):
        METRICS["classification"]("a", "a")


def test_retrieval_without_a_paragraph_is_refused() -> None:
    with pytest.raises(ValueError, match="'Page 3' names no paragraph"):
        METRICS["retrieval"]("3", "Page 3")


def test_ruler_wants_every_text_or_any() -> None:
    assert contains_all("The codes are 12 and Foo.", ["12", "foo", "13", "x9"]) == 0.5
    assert contains_any("The codes are 12.", ["13", "12"]) == 1.0
    assert contains_any("None.", ["13", "12"]) == 0.0


def test_fuzzy_rewards_nearly_right_values_and_no_short_answers() -> None:
    assert fuzzy("It is 48213, I think.", ["48213"]) == 1.0
    assert 0.5 < fuzzy("It is 48219.", ["48213"]) < 1.0
    assert fuzzy("4", ["48213"]) < 0.5
    assert fuzzy("", ["48213"]) == 0.0
    assert fuzzy("48213", ["48213", "70707"]) < 0.8


def test_repetition_tells_a_looping_answer_from_one_that_says_it_once() -> None:
    once = "the cat sat on the mat and went home"
    assert METRICS["rouge_l"](f"{once} " * 50, once) == METRICS["rouge_l"](once, once)
    assert repetition(once) == 0.0
    assert repetition(f"{once} " * 50) > 0.97
    assert repetition("再来一次" * 20) > 0.9
    assert repetition("") == repetition("one two three") == 0.0


def words(number: int) -> str:
    return " ".join(f"w{place}" for place in range(number))


@pytest.mark.parametrize("depth", [0, 600])
def test_rouge_gives_up_at_the_same_length_however_deep_its_caller_is(depth: int) -> None:
    def below(calls: int, number: int) -> float:
        if calls:
            return below(calls - 1, number)
        return METRICS["rouge_l"](words(number), words(number))

    assert below(depth, 900) > 0.99
    assert below(depth, 1100) == 0.0


def test_where_rouge_gives_up_can_be_asked() -> None:
    assert rouge_gives_up(words(1100), words(1100))
    assert not rouge_gives_up(words(900), words(900))
    assert not rouge_gives_up("other words", "none of these")


def test_the_engine_is_imported_without_the_metric_libraries(tmp_path: Path) -> None:
    for name in ("rouge", "jieba", "rapidfuzz"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')")
    code = (
        "import dynamickv as dkv\n"
        "try: dkv.evaluate.metrics.METRICS['rouge_l']('a', 'b')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "HF_HUB_OFFLINE": "1"},
    )
    assert "pip install 'dynamickv[evaluate]'" in done.stdout, done.stderr


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(metrics.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package rouge; install it with pip"):
        metrics.require_libraries()


@pytest.mark.parametrize(
    ("hits", "count", "interval"),
    # Newcombe 1998, table I: Wilson's method.
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611))],
)
def test_wilsons_interval_is_that_of_the_literature(
    hits: int, count: int, interval: tuple[float, float]
) -> None:
    assert wilson(hits, count) == pytest.approx(interval, abs=1e-4)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        low, high = bootstrap([rng.normal(3.0, 1.0, 60).tolist()], seed)
        covered += low <= 3.0 <= high
    assert 88 <= covered <= 100


def test_the_bootstrap_weighs_groups_alike_and_repeats_itself() -> None:
    groups = [[0.0] * 5, [1.0] * 500]
    assert bootstrap(groups) == (0.5, 0.5)
    assert bootstrap([[0.0, 1.0, 0.5]]) == bootstrap([[0.0, 1.0, 0.5]])
    with pytest.raises(ValueError, match="at least 1 value"):
        bootstrap([[1.0], []])
