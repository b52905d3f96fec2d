"""The example documents: well-formed, answerable, and recorded."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import dynamickv as dkv
from dynamickv.reading.prompt import encode_prompt

ASSETS = Path(__file__).parents[3] / "assets"
KINDS = {"find a fact", "summarise", "code", "few-shot", "needle", "story"}
FIELDS = {
    "id",
    "title",
    "kind",
    "question",
    "expected",
    "evidence",
    "capacity",
    "max_new_tokens",
    "document",
}
LARGEST_RUN_FILE = 1024 * 1024

EXAMPLES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ASSETS / "examples").glob("*.json"))
}
every_example = pytest.mark.parametrize("name", EXAMPLES)


def document(name: str) -> str:
    path = ASSETS / "examples" / EXAMPLES[name]["document"]
    return path.read_text(encoding="utf-8")


def expected(name: str) -> list[str]:
    return list(EXAMPLES[name]["expected"])


def recorded(name: str) -> dkv.Trace:
    return dkv.Trace.load(ASSETS / "runs" / f"{name}.json.gz")


def test_every_kind_of_example_is_there():
    assert {example["kind"] for example in EXAMPLES.values()} == KINDS


@every_example
def test_example_is_well_formed(name):
    example = EXAMPLES[name]
    assert set(example) == FIELDS
    assert expected(name)
    assert example["id"] == name
    assert example["document"] == f"{name}.txt"
    assert example["title"].strip()
    assert example["question"].strip()
    assert all(part.strip() for part in expected(name))
    assert 64 <= example["capacity"] <= 1024
    assert 1 <= example["max_new_tokens"] <= 128


@every_example
def test_document_begins_and_ends_with_text(name):
    assert document(name) == document(name).strip()


@every_example
def test_every_piece_of_evidence_occurs_once(name):
    assert EXAMPLES[name]["evidence"]
    for piece in EXAMPLES[name]["evidence"]:
        assert document(name).count(piece) == 1, piece


@every_example
def test_evidence_holds_the_answer(name):
    evidence = " ".join(EXAMPLES[name]["evidence"])
    for part in expected(name):
        assert part in evidence


def test_needle_lies_two_fifths_deep():
    text = document("needle-3k")
    depth = text.index(EXAMPLES["needle-3k"]["evidence"][0]) / len(text)
    assert depth == pytest.approx(0.4, abs=0.02)


def test_code_example_is_python():
    ast.parse(document("code"))


@every_example
def test_recorded_run_is_of_this_example(name):
    trace, example = recorded(name), EXAMPLES[name]
    start, end = trace.prompt.document_utf16_span
    prompt = trace.prompt.text.encode("utf-16-le")
    assert prompt[2 * start : 2 * end].decode("utf-16-le") == document(name)
    assert trace.prompt.question == example["question"]
    assert trace.prompt.question_aware
    assert not trace.prompt.truncated
    assert trace.model.name == dkv.DEFAULT_MODEL
    assert {"FullKV", "SnapKV", "DynamicKV"} <= {run.method for run in trace.runs}
    for run in trace.runs:
        assert run.parameters.get("capacity", example["capacity"]) == example["capacity"]
        assert len(run.token_ids) <= example["max_new_tokens"]


@every_example
def test_recorded_run_is_small(name):
    assert (ASSETS / "runs" / f"{name}.json.gz").stat().st_size < LARGEST_RUN_FILE


@every_example
def test_recorded_full_cache_answers_right(name):
    answer = recorded(name).run("FullKV").answer
    for part in expected(name):
        assert part in answer


def test_recorded_runs_show_both_gain_and_loss():
    """Examples picked so that DynamicKV always looks good would teach nothing."""
    right = [
        all(part in recorded(name).run("DynamicKV").answer for part in expected(name))
        for name in EXAMPLES
    ]
    assert any(right)
    assert not all(right)


def test_every_recorded_run_has_an_example():
    assert {path.name for path in (ASSETS / "runs").iterdir()} == {
        f"{name}.json.gz" for name in EXAMPLES
    }


@pytest.fixture(scope="module")
def embedded() -> dkv.LoadedModel:
    return dkv.load_model(device="cpu", precision="exact")


@pytest.mark.model
@every_example
def test_document_has_between_1500_and_3500_tokens(name, embedded):
    prompt = encode_prompt(
        embedded.tokenizer, document(name), EXAMPLES[name]["question"], limit=8192
    )
    first, last = prompt.document_span
    assert 1500 <= last - first <= 3500
    assert prompt.length == recorded(name).prompt.length
