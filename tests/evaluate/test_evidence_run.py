"""The evidence is shared among processes: every document once, wherever a run was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import dynamickv as dkv
from benchmarks import evidence_run
from benchmarks.evidence_run import Setting, documents, ruler, shared
from dynamickv.evaluate.datasets import Example
from dynamickv.evaluate.experiment import Row, Stop, Unit
from dynamickv.evaluate.journal import Journal
from dynamickv.evaluate.longbench import LongBenchExperiment, Protocol
from dynamickv.evaluate.ruler import make_examples

METHODS = [dkv.FullKV()]


class Told:
    """An experiment of three documents with two questions each, that answers with their names."""

    settings: dict[str, Any] = {"experiment": "told"}  # noqa: RUF012

    def units(self) -> list[Unit]:
        return [{"document": name, "turn": turn} for name in "abc" for turn in (0, 1)]

    def size(self, unit: Unit) -> float:
        return 1.0

    def measure(self, unit: Unit, methods: Sequence[dkv.CompressionMethod], stop: Stop) -> Row:
        return {"runs": [{"method": "FullKV", "parameters": {}, "answer": unit["document"]}]}


def measured(journal: Journal) -> list[tuple[str, int]]:
    units = [row["unit"] for row in journal.read() if "unit" in row]
    return [(unit["document"], unit["turn"]) for unit in units]


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    (tmp_path / "claims").mkdir()
    return tmp_path / "claims"


def test_each_process_takes_whole_documents_that_no_other_has(tmp_path: Path, claims: Path) -> None:
    journals = [Journal(tmp_path / "turns.jsonl", rank) for rank in range(2)]
    first, second = (shared(Told(), METHODS, one, claims, lambda: False) for one in journals)
    assert [next(first).done for _ in range(2)] == [0, 1]
    quick = [step.row["unit"]["document"] for step in second if step.row]
    assert quick == ["b", "b", "c", "c"]
    assert [step.row["unit"]["document"] for step in first if step.row] == ["a"]
    assert sorted(measured(journals[0])) == [(name, turn) for name in "abc" for turn in (0, 1)]


def test_what_a_stopped_process_had_taken_is_measured_by_the_next_run(
    tmp_path: Path, claims: Path
) -> None:
    journal = Journal(tmp_path / "turns.jsonl")
    stopped = shared(Told(), METHODS, journal, claims, lambda: False)
    assert [next(stopped).done for _ in range(2)] == [0, 1]
    stopped.close()
    assert measured(journal) == [("a", 0)]
    again = tmp_path / "again"
    again.mkdir()
    assert sum(step.row is not None for step in shared(Told(), METHODS, journal, again, never)) == 5
    assert len(set(measured(journal))) == len(measured(journal)) == 6


def never() -> bool:
    return False


def test_once_it_is_late_nothing_more_is_taken(tmp_path: Path, claims: Path) -> None:
    assert list(shared(Told(), METHODS, Journal(tmp_path / "t.jsonl"), claims, lambda: True)) == []
    assert list(claims.iterdir()) == []


def test_an_example_made_as_it_is_measured_is_the_one_made_before(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "essay.txt").write_text("The pier is green. Nobody remembers why. " * 40, "utf-8")
    lazy, methods = ruler(Setting(llm, tmp_path, tmp_path, small=True), ["niah_single_1"], 2)
    assert [len(document.units()) for document in documents(lazy)] == [1, 1]
    unit = lazy.units()[1]
    (made,) = make_examples(
        unit["task"],
        900,
        1,
        lambda text: len(llm.tokenizer(text)["input_ids"]),
        haystack=evidence_run.Haystack(str(tmp_path)),
        seed=evidence_run.SEED * 1000 + 1,
    )
    text = f"{made.opening}\n{made.question}{made.answer_prefix}"
    example = Example(
        **unit, fields={"input": text}, answers=list(made.answers), all_classes=None, ruler=True
    )
    whole = LongBenchExperiment(llm, [example], Protocol.official(max_new_tokens=8))
    assert (whole.units(), whole.settings) == ([unit], lazy.settings)
    few = methods[:2]
    now, before = (one.measure(unit, few, never) for one in (lazy, whole))
    assert now["runs"] == before["runs"]
