"""RULER's answers in the files of kvpress's evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamickv.evaluate.datasets import Example
from dynamickv.evaluate.kvpress_results import read_predictions, string_matches, write_results


def example(task: str, name: str, *answers: str) -> Example:
    return Example(
        task=task,
        id=name,
        fields={"input": "Where?"},
        answers=list(answers),
        all_classes=None,
        ruler=True,
    )


def row(task: str, name: str, answer: str) -> dict[str, Any]:
    runs = [
        {"method": "FullKV", "parameters": {}, "answer": answer, "kept_fraction": 1.0},
        {
            "method": "SnapKV",
            "parameters": {"capacity": 64},
            "answer": "none, \u0001of them",
            "kept_fraction": 0.25,
        },
    ]
    return {"unit": {"task": task, "id": name}, "runs": runs}


EXAMPLES = [
    example("niah_single_1", "0", "12", "O'Brien"),
    example("niah_single_1", "1", "34"),
    example("qa_1", "0", "Rome", "Roma"),
]
ROWS = [
    row("niah_single_1", "0", 'They are 12,\nand "more"'),
    row("niah_single_1", "1", "34"),
    row("qa_1", "0", "it is roma"),
]


def test_what_is_written_has_kvpress_names_and_scores_and_reads_back(tmp_path: Path) -> None:
    full, snap = write_results(tmp_path, EXAMPLES, ROWS, "org/model", "4096")
    assert full.name == "ruler__4096__org--model__no_press__0.00"
    assert snap.name == "ruler__4096__org--model__dynamickv_snapkv_64__0.75"
    scores = json.loads((full / "metrics.json").read_text("utf-8"))
    assert scores == {"niah_single_1": {"string_match": 75.0}, "qa_1": {"string_match": 100.0}}
    for folder in (full, snap):
        lines = read_predictions(folder / "predictions.csv")
        assert [line["answer"] for line in lines] == [example.answers for example in EXAMPLES]
        assert string_matches(lines) == json.loads((folder / "metrics.json").read_text("utf-8"))
    assert json.loads((snap / "config.yaml").read_text("utf-8"))["compression_ratio"] == 0.75


def test_kvpress_own_file_is_read_with_answers_that_are_arrays(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(
        "question,answer,task,predicted_answer\n"
        "q,['12' '34'],niah_multivalue,\"34, then 12\"\nq,['Rome'],qa_1,Paris\n",
        "utf-8",
    )
    lines = read_predictions(path)
    assert [line["answer"] for line in lines] == [["12", "34"], ["Rome"]]
    assert string_matches(lines) == {
        "niah_multivalue": {"string_match": 100.0},
        "qa_1": {"string_match": 0.0},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task,answer\nqa_1,['x']\n", "has no column 'predicted_answer'"),
        ("task,answer,predicted_answer\nqa_1,Rome,x\n", "line 2: 'Rome' is no list of answers"),
    ],
)
def test_other_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=said):
        read_predictions(path)


def test_longbench_examples_are_refused(tmp_path: Path) -> None:
    other = Example(task="qasper", id="0", fields={}, answers=["x"], all_classes=None, ruler=False)
    with pytest.raises(ValueError, match="'qasper' is none of its tasks; leave --kvpress out"):
        write_results(tmp_path, [other], [], "m", "4096")
