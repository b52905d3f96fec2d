"""Sweeps against FullKV, and budgets that follow the task or do not."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynamickv as dkv
from dynamickv.evaluate import Journal, methods_at, rows_of, run
from dynamickv.evaluate import sweep as sweep_module
from dynamickv.evaluate.sweep import SweepExperiment, capacities_up_to, sweep_csv, sweep_summary
from dynamickv.evaluate.tables import sweep_table, tasks_table
from dynamickv.evaluate.tasks import TaskExperiment, read_documents, read_questions, tasks_summary
from dynamickv.record.trace import Retained
from tests.engine.tiny import DOCUMENT, QUESTION

METHODS = methods_at(["H2O", "SnapKV", "DynamicKV"], [16])


@pytest.fixture(scope="module")
def swept(llm: dkv.LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("sweep") / "s.jsonl"
    experiment = SweepExperiment(llm, DOCUMENT, QUESTION, max_new_tokens=8)
    experiment.prepare(mass=True)
    for _ in run(experiment, METHODS, Journal(path)):
        pass
    return rows_of(Journal(path), experiment.units())


def test_capacities_double_up_to_the_prompt() -> None:
    assert capacities_up_to(100) == [16, 32, 64, 100]
    assert capacities_up_to(64) == [16, 32, 64]
    assert capacities_up_to(10) == [10]


def test_a_sweep_runs_from_16_to_the_whole_prompt(
    llm: dkv.LoadedModel, swept: list[dict[str, Any]]
) -> None:
    length = dkv.prefill(llm, DOCUMENT, QUESTION).length
    assert [row["unit"]["capacity"] for row in swept] == capacities_up_to(length)
    lines = sweep_summary(swept)
    for line in lines:
        if line["capacity"] == length:
            assert line["token_match"] == line["rouge_l"] == 1.0
            assert line["kl_max"] == pytest.approx(0.0, abs=1e-5)
            assert line["kv_bytes"] == line["kv_bytes_full"]
        else:
            assert line["kl_mean"] > 1e-4
            assert line["kv_bytes"] < line["kv_bytes_full"]
    assert [line["method"] for line in lines[:5]] == ["H2O"] * 5


def test_a_sweep_resumes_by_method_and_capacity(llm: dkv.LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    experiment = SweepExperiment(llm, DOCUMENT, QUESTION, [16, 32], max_new_tokens=4)
    list(run(experiment, METHODS[1:], Journal(path)))
    assert [s.total for s in run(experiment, METHODS[1:], Journal(path))] == [0]
    added = [s.row for s in run(experiment, METHODS[1:2] + METHODS[2:], Journal(path)) if s.row]
    assert added == []
    wider = SweepExperiment(llm, DOCUMENT, QUESTION, [16, 32, 48], max_new_tokens=4)
    assert [s.row["unit"] for s in run(wider, METHODS[1:], Journal(path)) if s.row] == [
        {"capacity": 48}
    ]


def test_one_prefill_and_one_full_answer_serve_the_whole_sweep(
    llm: dkv.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    prefill, answers = sweep_module.prefill, sweep_module.answers

    def counted_prefill(*arguments: Any, **options: Any) -> Any:
        calls.append("prefill")
        return prefill(*arguments, **options)

    def counted_answers(llm: Any, read: Any, methods: Any, *rest: Any) -> Any:
        calls.extend(method.name for method in methods if method.name == "FullKV")
        return answers(llm, read, methods, *rest)

    monkeypatch.setattr(sweep_module, "prefill", counted_prefill)
    monkeypatch.setattr(sweep_module, "answers", counted_answers)
    experiment = SweepExperiment(llm, DOCUMENT, QUESTION, [16, 32, 48], max_new_tokens=4)
    list(run(experiment, METHODS[1:], Journal(tmp_path / "s.jsonl")))
    assert sorted(calls) == ["FullKV", "prefill"]


def test_the_divergence_is_that_of_word_by_word_decoding(llm: dkv.LoadedModel) -> None:
    read = dkv.prefill(llm, DOCUMENT, QUESTION)
    (full,) = dkv.compare(llm, prefill=read, methods=[dkv.FullKV()], max_new_tokens=6).runs
    forced = dkv.forced_logits(llm, read, dkv.FullKV(), full.token_ids)
    # FullKV's own words are its likeliest ones, with the probabilities it decoded them with.
    assert forced[:-1].argmax(-1).tolist() == full.token_ids[1:]
    assert forced.exp().sum(-1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    chosen = forced[torch.arange(5), torch.tensor(full.token_ids[1:])]
    assert chosen.tolist() == pytest.approx(full.logprobs[1:], abs=1e-4)
    other = dkv.forced_logits(llm, read, dkv.SnapKV(capacity=24), full.token_ids)
    p, q = forced.double().exp().numpy(), other.double().exp().numpy()
    expected = (p * np.log(p / q)).sum(-1)
    assert dkv.divergence(forced, other).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.max() > 1e-3


def test_forcing_nothing_or_without_a_question_is_refused(llm: dkv.LoadedModel) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        dkv.forced_logits(llm, dkv.prefill(llm, DOCUMENT, QUESTION), dkv.FullKV(), [])
    with pytest.raises(ValueError, match="document alone"):
        dkv.forced_logits(llm, dkv.prefill(llm, DOCUMENT), dkv.FullKV(), [1])


def test_the_csv_holds_every_figure_and_no_formula(swept: list[dict[str, Any]]) -> None:
    lines = sweep_summary(swept)
    lines[0]["answer"] = '=HYPERLINK("x")'
    read = list(csv.DictReader(io.StringIO(sweep_csv(lines))))
    assert len(read) == len(lines)
    assert float(read[1]["kl_mean"]) == lines[1]["kl_mean"]
    assert read[0]["answer"] == '\'=HYPERLINK("x")'
    assert "DynamicKV" in sweep_table(lines)


# Tasks.

DOCUMENTS = {f"text {n}": DOCUMENT.replace("1911", str(1900 + n)) for n in range(5)}


@pytest.fixture(scope="module")
def asked(llm: dkv.LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("tasks") / "t.jsonl"
    experiment = TaskExperiment(llm, DOCUMENTS)
    list(run(experiment, methods_at(["SnapKV", "DynamicKV"], [24]), Journal(path)))
    return rows_of(Journal(path), experiment.units())


def test_every_document_meets_every_kind_of_task(asked: list[dict[str, Any]]) -> None:
    units = [(row["unit"]["document"], row["unit"]["kind"]) for row in asked]
    kinds = ["find a fact", "summarise", "count", "complete code", "few-shot label"]
    assert units == [(document, kind) for document in DOCUMENTS for kind in kinds]


def test_even_budgets_have_no_distance_and_dynamic_ones_have(asked: list[dict[str, Any]]) -> None:
    even, dynamic = tasks_summary(asked, "SnapKV"), tasks_summary(asked, "DynamicKV")
    assert even["distance"]["within"] == even["distance"]["across"] == 0.0
    assert dynamic["distance"]["across"] > 0.0
    assert dynamic["distance"]["documents"] == 5
    for kind in dynamic["kinds"]:
        assert sum(dynamic["profiles"][kind]) == pytest.approx(1.0)
        assert len(dynamic["budgets"][kind]) == 6
        assert dynamic["moved"][kind][kind] == 0.0
    assert "5 documents" in tasks_table(dynamic)


def row(document: str, kind: str, budgets: list[int], kept: list[int]) -> dict[str, Any]:
    mask = np.zeros((2, 1, 10), bool)
    mask[:, :, kept] = True
    one = {"method": "DynamicKV", "parameters": {}, "budgets": budgets, "heads": 1}
    return {
        "unit": {"document": document, "kind": kind},
        "document_tokens": 10,
        "runs": [{**one, "kept": Retained.pack(mask).bits}],
    }


def test_distances_separate_tasks_exactly_when_budgets_follow_them() -> None:
    follows = [
        row(f"d{n}", kind, budgets, kept)
        for n in range(5)
        for kind, budgets, kept in (("a", [60, 40], [0, 1]), ("b", [40, 60], [1, 2, 3, 4]))
    ]
    summary = tasks_summary(follows)
    assert summary["distance"] == {
        "documents": 5,
        "even": True,
        "within": 0.0,
        "across": pytest.approx(0.2),
        "same_document": pytest.approx(0.2),
        "same_document_interval": pytest.approx([0.2, 0.2]),
        "separation": pytest.approx(0.2),
        "interval": pytest.approx([0.2, 0.2]),
    }
    assert summary["moved"] == {"a": {"a": 0.0, "b": 0.5}, "b": {"a": 0.75, "b": 0.0}}
    rng = np.random.default_rng(0)
    ignores = []
    for n in range(8):
        first = int(rng.integers(30, 70))
        ignores += [row(f"d{n}", kind, [first, 100 - first], [0]) for kind in ("a", "b", "c")]
    low, high = tasks_summary(ignores)["distance"]["interval"]
    assert low <= 0.0 <= high


def test_documents_that_differ_between_tasks_do_not_pass_for_tasks() -> None:
    # Budgets follow the document's kind and never the task; "c" is asked of the second kind alone.
    prose = [row(f"p{n}", k, [70, 30], [0]) for n in range(4) for k in "ab"]
    code = [row(f"c{n}", k, [30, 70], [0]) for n in range(4) for k in "abc"]
    summary = tasks_summary(prose + code)
    distance = summary["distance"]
    assert summary["asked"] == {"a": 8, "b": 8, "c": 4}
    assert not distance["even"]
    # 16 of the 28 pairs mix the kinds: "a" of one lies 0.4 from "a" of the other, and "c" too.
    assert distance["across"] == pytest.approx(0.4 * 16 / 28)
    assert distance["same_document"] == 0.0
    assert distance["same_document_interval"] == [0.0, 0.0]
    assert distance["separation"] == pytest.approx(0.0)
    assert distance["interval"] == pytest.approx([0.0, 0.0])
    assert "documents per task: a 8, b 8, c 4" in tasks_table(summary)
    assert "hold the task alone" in tasks_table(summary)
    assert "hold the task alone" not in tasks_table(tasks_summary(prose))
    follows = [
        row(f"{n}", k, [b, 100 - b], [0]) for n in range(4) for k, b in (("a", 60), ("b", 50))
    ]
    follows += [row("d", "b", [50, 50], [0]), row("d", "c", [10, 90], [0])]
    # Only pairs of the first four meet two kinds: what "c" adds is not counted.
    assert tasks_summary(follows)["distance"]["separation"] == pytest.approx(0.1)
    assert tasks_summary(follows)["distance"]["same_document"] == pytest.approx((0.4 + 0.4) / 5)


def test_documents_that_share_no_task_have_no_separation() -> None:
    distance = tasks_summary([row("d", "a", [1, 1], [0]), row("e", "b", [3, 1], [1])])["distance"]
    assert distance["within"] is distance["separation"] is distance["interval"] is None
    assert distance["same_document"] is None
    assert distance["across"] == pytest.approx(0.25)


def test_one_document_has_no_separation() -> None:
    distance = tasks_summary([row("d", "a", [1, 1], [0]), row("d", "b", [2, 1], [1])])["distance"]
    assert distance["within"] is None
    assert distance["separation"] is None
    assert distance["same_document"] == pytest.approx(1 / 6)


def test_documents_come_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "a.txt").write_text("A")
    assert read_documents(tmp_path) == {"a": "A", "b": "B"}
    with pytest.raises(ValueError, match="there is no folder"):
        read_documents(tmp_path / "missing")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_documents(tmp_path)


def test_documents_with_questions_of_their_own_meet_only_these(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(DOCUMENT)
    (tmp_path / "b.txt").write_text(DOCUMENT + "b")
    documents = read_documents(tmp_path)
    assert read_questions(tmp_path, documents) == {}
    own = {"b": {"count": "How many?", "complete code": "Go on."}}
    (tmp_path / "questions.json").write_text(json.dumps(own))
    assert read_questions(tmp_path, documents) == own
    shared = {"count": "How many words?", "summarise": "Sum up."}
    experiment = TaskExperiment(llm, documents, shared, own)
    units = experiment.units()
    assert [(unit["document"], unit["kind"]) for unit in units] == [
        ("a", "count"),
        ("a", "summarise"),
        ("b", "count"),
        ("b", "complete code"),
    ]
    # Its own wording of a kind, and not that of the others, is what is measured.
    swapped = TaskExperiment(llm, documents, shared, {"b": {"count": "How many words?"}})
    assert units[2]["prompt"] != swapped.units()[2]["prompt"]
    (measured,) = (experiment.measure(units[2], METHODS[1:2], lambda: False),)
    assert measured["prompt_tokens"] == dkv.prefill(llm, DOCUMENT + "b", "How many?").length


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "no table from document to kind"),
        ('{"a": {}}', "no table from document to kind"),
        ('{"a": {"count": " "}}', "no table from document to kind"),
        ('{"x": {"count": "?"}}', "there is no x.txt"),
    ],
)
def test_unusable_questions_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_questions(tmp_path, {"a": "A"})


def test_the_shipped_documents_give_five_to_every_kind() -> None:
    folder = Path(__file__).parents[2] / "assets" / "tasks"
    documents = read_documents(folder)
    questions = read_questions(folder, documents)
    assert questions.keys() == documents.keys()
    asked = [kind for own in questions.values() for kind in own]
    assert {kind: asked.count(kind) for kind in dict.fromkeys(asked)} == {
        "complete code": 5,
        "find a fact": 15,
        "summarise": 15,
        "count": 15,
        "few-shot label": 5,
    }


def test_one_question_is_no_comparison_of_tasks(llm: dkv.LoadedModel) -> None:
    with pytest.raises(ValueError, match="at least 2 questions, got 1"):
        TaskExperiment(llm, DOCUMENTS, {"count": "How many?"})
    with pytest.raises(ValueError, match="no run of H2O"):
        tasks_summary([row("d", "a", [1, 1], [0])], "H2O")
