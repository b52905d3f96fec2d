"""Several questions: what each of the three caches holds, and what the table says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dynamickv as dkv
from dynamickv.evaluate import Journal, methods_at, rows_of, run
from dynamickv.evaluate import turns as turns_module
from dynamickv.evaluate.turns import TurnsExperiment, chosen_for
from dynamickv.evaluate.turns_data import Asked, KeyValues, read_folder
from dynamickv.evaluate.turns_summary import turns_summary, turns_table
from tests.engine.tiny import DOCUMENT, QUESTION, SMALL_INSTANCES, method_name

ROOT = Path(__file__).parents[2]
QUESTIONS = [Asked(QUESTION), Asked("Who is the keeper?"), Asked("When was it built?")]
METHODS = methods_at(["FullKV", "SnapKV", "H2O", "DynamicKV"], [24])
COMPRESSING = [method for method in SMALL_INSTANCES if method.capabilities.capacity]


def measured(llm: dkv.LoadedModel, path: Path, methods: Any = METHODS) -> list[dict[str, Any]]:
    experiment = TurnsExperiment(llm, {"d": (DOCUMENT, QUESTIONS)}, max_new_tokens=6)
    for _ in run(experiment, methods, Journal(path)):
        pass
    return rows_of(Journal(path), experiment.units())


def test_each_way_says_what_a_comparison_of_that_cache_says(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    rows = measured(llm, tmp_path / "t.jsonl")
    document = dkv.prefill(llm, DOCUMENT, mass=True)
    for row, asked in zip(rows, QUESTIONS, strict=True):
        anew = dkv.prefill(llm, DOCUMENT, asked.question, mass=True)
        for method, entry in zip(METHODS, row["runs"], strict=True):
            settings: Any = {"methods": [method], "max_new_tokens": 6}
            blind = dkv.compare(llm, prefill=document, question=asked.question, **settings).runs[0]
            own = dkv.compare(llm, prefill=anew, **settings).runs[0]
            assert (entry["anew"]["answer"], entry["anew"]["kv_bytes"]) == (
                own.answer,
                own.kv_bytes,
            )
            assert entry["blind"]["kv_bytes"] == blind.kv_bytes
            assert entry["blind"]["answer"] == blind.answer
        (full, *_) = row["runs"]
        assert full["first"] == full["blind"] == full["anew"] == row["full"]


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_the_first_questions_cache_holds_its_capacity_of_the_document_alone(
    method: dkv.CompressionMethod, llm: dkv.LoadedModel
) -> None:
    document = dkv.prefill(llm, DOCUMENT, mass=True)
    first = dkv.with_question(llm, document, QUESTION)
    chosen = chosen_for(method, first, document.length)
    assert chosen.prompt_length == document.length
    capacity = method.parameters["capacity"]
    held = [head.numel() for kept in chosen.indices for head in kept]
    assert sum(held) == pytest.approx(capacity * len(held), abs=len(held))
    assert sum(held) <= capacity * len(held) + (method.name == "PyramidKV") * len(held)
    assert all(int(head.max()) < document.length for kept in chosen.indices for head in kept)


def test_the_first_question_decides_what_its_cache_holds(llm: dkv.LoadedModel) -> None:
    document, method = dkv.prefill(llm, DOCUMENT), dkv.SnapKV(capacity=24)
    for one, other in ((QUESTION, "Who is the keeper?"), (QUESTION, QUESTION)):
        kept = [
            chosen_for(method, dkv.with_question(llm, document, asked), document.length).indices
            for asked in (one, other)
        ]
        assert all(map(torch.equal, *kept)) == (one == other)


def test_a_document_is_read_once_for_all_its_questions(
    llm: dkv.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = turns_module.prefill

    def counted(*arguments: Any, **settings: Any) -> dkv.Prefill:
        reads.append(arguments[1])
        return real(*arguments, **settings)

    monkeypatch.setattr(turns_module, "prefill", counted)
    assert len(measured(llm, tmp_path / "t.jsonl")) == 3
    assert reads == [DOCUMENT]


def test_a_stopped_run_goes_on_and_methods_may_be_added(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    whole = measured(llm, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    (tmp_path / "t.jsonl").write_text("\n".join(lines[:2]) + '\n{"torn')
    parts = measured(llm, tmp_path / "t.jsonl")
    few = measured(llm, tmp_path / "few.jsonl", METHODS[:2])
    assert len(few[0]["runs"]) == 2
    more = measured(llm, tmp_path / "few.jsonl")
    for rows in (parts, more):
        assert [row["runs"] for row in rows] == [row["runs"] for row in whole]


def test_made_up_tables_hold_every_pair_once_and_their_questions_answers() -> None:
    made = KeyValues(samples=3, pairs=20, questions=4)
    documents = made.documents()
    assert documents == made.documents()
    assert documents != KeyValues(samples=3, pairs=20, questions=4, seed=1).documents()
    assert len({text for text, _ in documents.values()}) == 3
    for text, asked in documents.values():
        assert text.count('": "') == 20
        assert len({one.question for one in asked}) == 4
        for one in asked:
            key = one.question.split('"')[1]
            assert text.count(f'"{key}": "{one.answers[0]}"') == 1


def test_the_shipped_questions_have_their_answers_in_their_documents() -> None:
    documents = read_folder(ROOT / "assets" / "tasks")
    assert len(documents) == 15
    for name, (text, asked) in documents.items():
        assert len(asked) >= 4
        for one in asked:
            assert any(answer.lower() in text.lower() for answer in one.answers), (name, one)


def row(document: str, turn: int, **found: float) -> dict[str, Any]:
    ways = {
        way: {"found": value, "token_match": 0.5, "rouge_l": value / 2, "kv_bytes": 2**20,
              "kept_fraction": 0.1}
        for way, value in found.items()
    }  # fmt: skip
    run = {"method": "SnapKV", "parameters": {"capacity": 24}, **ways}
    return {"unit": {"document": document, "turn": turn}, "runs": [run]}


def test_the_table_pairs_the_later_questions_and_leaves_the_first_apart() -> None:
    rows = [
        row("a", 0, first=1.0, blind=0.0, anew=1.0),
        row("a", 1, first=0.0, blind=0.0, anew=1.0),
        row("a", 2, first=1.0, blind=0.0, anew=1.0),
        row("b", 0, first=1.0, blind=1.0, anew=1.0),
        row("b", 1, first=0.0, blind=1.0, anew=1.0),
    ]
    first, blind, anew = turns_summary(rows)
    assert [line["way"] for line in (first, blind, anew)] == ["first", "blind", "anew"]
    assert (first["documents"], first["questions"]) == (2, 3)
    assert first["first_question"]["found"] == 1.0
    assert blind["first_question"]["found"] == 0.5
    # Means of the documents' means: a has 1/2, b has 0.
    assert first["found"]["mean"] == 0.25
    assert anew["found_over_first"]["mean"] == 0.75
    assert anew["found_over_first"]["interval"] == [0.5, 1.0]
    assert blind["found_over_first"]["mean"] == pytest.approx((-0.5 + 1) / 2)
    assert first["found_over_first"] is None
    assert "+75.0 (+50.0 to +100.0)" in turns_table([first, blind, anew])


def test_one_document_has_an_interval_over_its_questions() -> None:
    rows = [row("a", n, first=0.0, blind=0.0, anew=float(n % 2)) for n in range(1, 9)]
    low, high = turns_summary(rows)[2]["found_over_first"]["interval"]
    assert 0 < low < 0.5 < high < 1
