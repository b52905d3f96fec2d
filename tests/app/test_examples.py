"""Examples: what is shipped reads well, what is broken is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.examples import Example, load_examples
from dynamickv.record.trace import Trace


def test_broken_examples_are_left_out(tmp_path: Path, trace: Trace) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "runs").mkdir()
    good: dict[str, Any] = {
        "id": "a", "title": "A", "kind": "report", "question": "Q?", "capacity": 64,
        "max_new_tokens": 8, "document": "a.txt",
    }  # fmt: skip
    (tmp_path / "examples" / "a.json").write_text(json.dumps(good))
    (tmp_path / "examples" / "a.txt").write_text("text")
    (tmp_path / "examples" / "b.json").write_text("{")
    (tmp_path / "runs" / "a.json.gz").write_bytes(b"not gzip")
    examples = load_examples(tmp_path)
    assert list(examples) == ["a"]
    assert examples["a"].trace is None


def test_shipped_examples_have_records_and_readable_documents() -> None:
    for example in load_examples().values():
        assert example.document.strip()
        assert example.trace is not None, f"{example.id} has no readable recorded run"
        assert example.document in example.trace.prompt.text


def test_facts_are_whole_words_and_shipped_ones_are_in_their_documents(example: Example) -> None:
    expecting = replace(example, expected=("60", "Heron Seven", "港"))
    assert expecting.facts_in("It is 60.") == [True, False, False]
    assert expecting.facts_in("160 or 601, heron seven; 海港口") == [False, True, True]
    for shipped in load_examples().values():
        assert shipped.expected, shipped.id
        held = shipped.facts_in(shipped.document)
        assert all(held), (shipped.id, held)
