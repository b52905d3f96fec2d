"""Needle grids: what is hidden where, one prefill per cell, resuming, scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import dynamickv as dkv
from dynamickv.evaluate import Journal, methods_at, rows_of, run
from dynamickv.evaluate import needle as needle_module
from dynamickv.evaluate.haystack import Haystack, Hidden, hide
from dynamickv.evaluate.needle import NeedleExperiment, NeedleGrid, even_depths
from dynamickv.evaluate.summary import needle_summary
from dynamickv.evaluate.tables import FEWEST, standing
from dynamickv.fast.packed import PackedWeights

METHODS = methods_at(["FullKV", "SnapKV", "DynamicKV"], [24, 48])


def grid(**changes: Any) -> NeedleGrid:
    settings: dict[str, Any] = {"lengths": (500, 700), "depths": (0.0, 0.5, 1.0)}
    return NeedleGrid(**{**settings, "max_new_tokens": 4, **changes})


def measured(
    llm: dkv.LoadedModel, path: Path, methods: Any = METHODS, **changes: Any
) -> tuple[NeedleExperiment, list[dict[str, Any]]]:
    experiment = NeedleExperiment(llm, grid(**changes))
    for _ in run(experiment, methods, Journal(path)):
        pass
    return experiment, rows_of(Journal(path), experiment.units())


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(depth: float) -> None:
    sentences = ["one two three four."] * 50
    text = hide(sentences, ["HERE."], depth, words)
    assert words(text.partition("HERE.")[0]) / 200 == pytest.approx(depth, abs=0.01)
    assert text.replace("HERE. ", "").replace(" HERE.", "") == " ".join(sentences)


def test_several_needles_are_spread_from_the_depth_to_the_end() -> None:
    text = hide(["one two three four."] * 50, ["A.", "B."], 0.5, words)
    places = [words(text.partition(mark)[0]) for mark in ("A.", "B.")]
    assert places == [100, pytest.approx(150, abs=3)]


@pytest.mark.parametrize("needles", [1, 3])
def test_a_cell_fits_its_length_and_asks_for_what_it_hides(
    llm: dkv.LoadedModel, needles: int
) -> None:
    experiment = NeedleExperiment(llm, grid(needles=needles))
    for unit in experiment.units():
        document, hidden = experiment.document(unit)
        assert len(hidden.expected) == needles
        for fact, value in zip(hidden.facts, hidden.expected, strict=True):
            assert document.count(fact) == 1
            assert value in fact
            assert value not in hidden.question
        length = dkv.prefill(llm, document, hidden.question).length
        assert unit["length"] - 60 <= length <= unit["length"]


def test_no_two_trials_share_their_text_or_facts(llm: dkv.LoadedModel) -> None:
    experiment = NeedleExperiment(llm, grid(samples=2, lengths=(500,)))
    units = experiment.units()
    trials = [experiment.document(unit) for unit in units]
    assert len({hidden.facts for _, hidden in trials}) == len(units)
    assert len({document[:40] for document, _ in trials}) == len(units)
    assert [experiment.document(unit) for unit in units] == trials


def test_the_haystack_may_be_a_folder_of_texts(llm: dkv.LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Second text. It ends here!")
    (tmp_path / "a.txt").write_text("First text. It goes on?\nA line without a stop")
    experiment = NeedleExperiment(llm, grid(haystack=str(tmp_path)))
    document, hidden = experiment.document(experiment.units()[1])
    rest = document.replace(hidden.facts[0], "")
    for sentence in ("First text.", "It goes on?", "A line without a stop", "It ends here!"):
        assert rest.count(sentence) > 2
    assert Haystack(str(tmp_path)).name != Haystack().name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no .txt files"),
        ({"a.txt": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"a.txt": b"  "}, "empty"),
    ],
)
def test_a_folder_without_usable_texts_is_refused(
    tmp_path: Path, content: dict[str, bytes], words: str
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=words):
        Haystack(str(tmp_path))


def test_one_prefill_per_cell_serves_every_method_and_capacity(
    llm: dkv.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills = []
    prefill = needle_module.prefill

    def counted(*arguments: Any, **options: Any) -> dkv.Prefill:
        prefills.append(options["mass"])
        return prefill(*arguments, **options)

    monkeypatch.setattr(needle_module, "prefill", counted)
    experiment, rows = measured(llm, tmp_path / "a.jsonl", depths=(0.5,))
    assert len(prefills) == len(experiment.units()) == len(rows) == 2
    assert not any(prefills)
    assert [len(row["runs"]) for row in rows] == [5, 5]
    first, second = (
        [(r["method"], r["parameters"].get("capacity")) for r in row["runs"]] for row in rows
    )
    assert first == second
    assert first[0] == ("FullKV", None)
    assert set(first[1:]) == {(name, size) for name in ("SnapKV", "DynamicKV") for size in (24, 48)}


def test_the_answers_are_those_of_the_library(llm: dkv.LoadedModel, tmp_path: Path) -> None:
    experiment, rows = measured(llm, tmp_path / "a.jsonl", depths=(0.5,), lengths=(500,))
    document, hidden = experiment.document(experiment.units()[0])
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=24)]
    trace = dkv.compare(llm, document, hidden.question, methods=methods, max_new_tokens=4)
    held = {(r["method"], r["parameters"].get("capacity")): r for r in rows[0]["runs"]}
    for answered in trace.runs:
        row = held[answered.method, answered.parameters.get("capacity")]
        assert row["answer"] == answered.answer
        assert row["kv_bytes"] == answered.kv_bytes
        assert row["agreement"]["token_match"] == pytest.approx(answered.agreement.token_match)


def test_a_resumed_run_measures_only_what_is_missing(llm: dkv.LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    experiment = NeedleExperiment(llm, grid(depths=(0.0, 1.0)))
    steps = run(experiment, METHODS[:2], Journal(path))
    for step in steps:
        if step.done == 3:
            break
    steps.close()
    first = path.read_text()
    again = [step for step in run(experiment, METHODS[:2], Journal(path)) if step.row]
    assert [step.total for step in again] == [1]
    assert path.read_text().startswith(first)
    # A method more: only its runs are added, next to the old ones.
    added = [step.row for step in run(experiment, METHODS[:3], Journal(path)) if step.row]
    assert [[r["method"] for r in row["runs"]] for row in added] == [["SnapKV"]] * 4
    whole, rows = measured(llm, tmp_path / "b.jsonl", METHODS[:3], depths=(0.0, 1.0))
    resumed = rows_of(Journal(path), whole.units())
    for one, other in zip(resumed, rows, strict=True):
        assert [r["answer"] for r in one["runs"]] == [r["answer"] for r in other["runs"]]
    assert [step.total for step in run(experiment, METHODS[:3], Journal(path))] == [0]


def test_results_of_other_settings_are_not_mixed(llm: dkv.LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    measured(llm, path, METHODS[:1], depths=(0.5,), lengths=(500,))
    other = NeedleExperiment(llm, grid(seed=7))
    with pytest.raises(ValueError, match=r"a\.jsonl was measured with seed=0 and not 7"):
        list(run(other, METHODS[:1], Journal(path)))


@pytest.mark.parametrize("first", ["exact", "fast"])
def test_results_of_another_precision_are_not_mixed(
    llm: dkv.LoadedModel, tmp_path: Path, first: str
) -> None:
    fast = dataclasses.replace(llm, packed=PackedWeights(llm.model))
    one, other = (llm, fast) if first == "exact" else (fast, llm)
    path = tmp_path / "a.jsonl"
    Journal(path).append({"settings": NeedleExperiment(one, grid()).settings})
    said = f"measured with precision={one.precision!r} and not {other.precision!r}"
    with pytest.raises(ValueError, match=said):
        list(run(NeedleExperiment(other, grid()), METHODS[:1], Journal(path)))


def test_a_journal_whose_first_line_was_torn_says_its_settings_all_the_same(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"settings": {"experim', "utf-8")
    experiment, rows = measured(llm, path, METHODS[:1], depths=(0.5,), lengths=(500,))
    assert len(rows) == 1
    assert Journal(path).read()[0] == {"settings": experiment.settings}


def test_stopping_loses_only_the_cell_at_hand(llm: dkv.LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    experiment = NeedleExperiment(llm, grid())
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(rows_of(Journal(path), experiment.units())) == 2

    steps = list(run(experiment, METHODS, Journal(path), stop=stop))
    assert steps[-1].done == 2
    assert steps[-1].total == 6
    assert steps[-1].seconds_left > 0
    assert len(rows_of(Journal(path), experiment.units())) == 2


def test_the_summary_counts_every_hidden_value(
    llm: dkv.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needle_module, "contains_all", lambda answer, expected: 0.5)
    _, rows = measured(llm, tmp_path / "a.jsonl", METHODS[:2], needles=2)
    full, snap = needle_summary(rows)
    assert (full["method"], full["capacity"], full["exact"], full["trials"]) == (
        "FullKV",
        None,
        0.5,
        12,
    )
    assert full["interval"] == pytest.approx([0.2538, 0.7462], abs=1e-4)
    assert full["over_snapkv"] is None
    assert {(cell["length"], cell["depth"]) for cell in snap["cells"]} == {
        (length, depth) for length in (500, 700) for depth in (0.0, 0.5, 1.0)
    }
    assert full["kept_fraction"] == 1.0


def test_the_difference_to_snapkv_is_paired_at_equal_capacity(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    _, rows = measured(llm, tmp_path / "a.jsonl", depths=(0.5,))
    for row in rows:
        for one in row["runs"]:
            one["exact"] = float(
                one["method"] == "DynamicKV" and one["parameters"]["capacity"] == 48
            )
    gains = {(r["method"], r["capacity"]): r["over_snapkv"] for r in needle_summary(rows)}
    assert gains["DynamicKV", 48] == {"mean": 1.0, "interval": [1.0, 1.0], "pairs": len(rows)}
    assert gains["DynamicKV", 24]["mean"] == 0.0
    assert gains["SnapKV", 48] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": (1.5,)}, "depths run from 0 .* got 1.5"),
        ({"lengths": ()}, "at least one length"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"needles": 0}, "needles must be at least 1, got 0"),
        ({"lengths": (4000,)}, r"4,000 tokens .* \(2,048\); lower the length to 2,044"),
        ({"haystack": "/nowhere"}, "there is no folder /nowhere"),
    ],
)
def test_bad_grids_are_refused(llm: dkv.LoadedModel, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NeedleExperiment(llm, grid(**changes))


def test_a_length_without_room_is_refused_when_it_is_measured(llm: dkv.LoadedModel) -> None:
    experiment = NeedleExperiment(llm, grid(lengths=(40,)))
    with pytest.raises(ValueError, match="no room for a text"):
        experiment.document(experiment.units()[0])


def test_depths_are_even() -> None:
    assert even_depths(5) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert even_depths(1) == (0.0,)


def test_a_needle_of_ones_own_is_used(llm: dkv.LoadedModel) -> None:
    own = Hidden(("The best thing is a sandwich.",), "What is best?", ("a sandwich",))
    experiment = NeedleExperiment(llm, grid(custom=own))
    document, hidden = experiment.document(experiment.units()[0])
    assert hidden is own
    assert document.startswith(own.facts[0])


@pytest.mark.parametrize("trials", [1, 2, FEWEST - 1, FEWEST])
def test_a_few_trials_are_no_verdict(trials: int) -> None:
    def run(method: str, exact: float) -> dict[str, Any]:
        return {
            "method": method, "parameters": {"capacity": 64}, "exact": exact, "fuzzy": exact,
            "kept_fraction": 0.1, "kv_bytes": 10,
        }  # fmt: skip

    rows = [
        {
            "unit": {"length": 512, "depth": 0.5, "sample": sample},
            "expected": ["7"],
            "runs": [run("SnapKV", 0.0), run("DynamicKV", 1.0)],
        }
        for sample in range(trials)
    ]
    said = " ".join(standing(needle_summary(rows), "exact"))
    assert ("too few to tell" in said) == (trials < FEWEST)
    assert ("ahead of it" in said) == (trials >= FEWEST)
