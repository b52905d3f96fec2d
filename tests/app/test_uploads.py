"""Bad files: one clear sentence each, and nothing is left of any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app import uploads
from tests.app.synthetic import synthetic_trace


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("photo.txt", b"\x89PNG\r\n\x1a\n\0\0\0" * 50, "does not look like text"),
        ("noise.md", bytes(range(128, 256)) * 20, "does not look like text"),
        ("big.txt", b"a" * (2 * 2**20 + 1), "larger than 2 MiB"),
        ("blank.txt", b" \n ", "holds no text"),
        ("paper.pdf", b"%PDF", "upload a .txt or .md file"),
    ],
)
def test_bad_uploads_are_one_sentence_and_leave_nothing(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        uploads.read_text_upload(file)
    assert not file.exists()


def test_an_upload_is_read_and_deleted(tmp_path: Path) -> None:
    file = tmp_path / "note.md"
    file.write_bytes("\ufeffGrüße, 港 🌊\r\n${x}".encode() + b"\xff")
    assert uploads.read_text_upload(file) == "Grüße, 港 🌊\r\n${x}\ufffd"
    assert not file.exists()


LINE = {"context": "A long text.", "input": "Who?", "answers": ["Ann"], "_id": "1"}


def jsonl(*rows: dict[str, object] | str) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "task", "content", "sentence"),
    [
        ("qasper.json", None, jsonl(LINE), "upload a .jsonl file"),
        ("qasper.jsonl", None, b" " * (8 * 2**20 + 1), "larger than 8 MiB"),
        ("qasper.jsonl", None, b"\n", "qasper.jsonl holds no examples"),
        ("qasper.jsonl", None, jsonl(LINE, "{torn"), "^qasper.jsonl, line 2: the line is not JSON"),
        ("qasper.jsonl", None, b'{"\xff"}', "line 1: the line is not UTF-8"),
        ("my file.jsonl", None, jsonl(LINE), "'my file' is no task's name"),
        ("=cmd.jsonl", None, jsonl({**LINE, "outputs": ["a"]}), "is no task's name"),
        ("mine.jsonl", None, jsonl(LINE), "'mine' is no task of LongBench"),
        ("mine.jsonl", "trec", jsonl(LINE), "'all_classes' is missing"),
        ("qasper.jsonl", None, jsonl({**LINE, "context": "a" * 1_000_001}), "Example 1 has 1,000,"),
        ("qasper.jsonl", None, jsonl(LINE, {**LINE, "answers": ["a" * 20_001]}), "Example 2 has"),
    ],
)
def test_bad_examples_are_one_sentence_and_leave_nothing(
    tmp_path: Path, name: str, task: str | None, content: bytes, sentence: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        uploads.read_examples_upload(file, task, 20)
    assert str(tmp_path) not in str(error.value)
    assert not file.exists()


def test_the_first_examples_are_read_and_the_file_is_deleted(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(jsonl(LINE, {**LINE, "_id": "2"}, "{torn"))
    examples = uploads.read_examples_upload(file, "qasper", 2)
    assert [(example.task, example.id) for example in examples] == [
        ("qasper", "1"),
        ("qasper", "2"),
    ]
    assert not file.exists()
    file.write_bytes(jsonl({"input": "A text. Who?", "outputs": ["Ann"]}))
    (ruler,) = uploads.read_examples_upload(file, None, 2)
    assert (ruler.task, ruler.ruler) == ("mine", True)


def test_a_run_file_opens_and_a_broken_one_is_one_sentence(tmp_path: Path) -> None:
    trace = synthetic_trace(tokens=120, capacity=32)
    trace.save(tmp_path / "run.json.gz")
    assert uploads.read_run_upload(tmp_path / "run.json.gz") == trace
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a run record"):
        uploads.read_run_upload(tmp_path / "bad.json")
    assert list(tmp_path.iterdir()) == []
