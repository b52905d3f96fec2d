"""Bad input: one clear sentence each, whatever a browser or a script sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dynamickv as dkv
from app import inputs
from app.theme import METHOD_STYLES, method_style
from tests.app.synthetic import synthetic_trace

TEXT = "A long document about a harbour. " * 40
SETTINGS = {"capacity": 128, "window_size": 8, "kernel_size": 7, "pooling": "max", "r_max": 10}


def request(**changes: Any) -> inputs.Request:
    values: dict[str, Any] = {"document": TEXT, "question": "Who?", "methods": ["DynamicKV"]}
    values |= {"max_new_tokens": 64, "settings": SETTINGS} | changes
    return inputs.build_request(**values)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"document": ""}, "document is empty"),
        ({"document": " \n\t "}, "document is empty"),
        ({"question": "  "}, "question is empty"),
        ({"document": None}, "must be text"),
        ({"document": "a" * 5_000_000}, "5,000,000 characters and this page reads 1,000,000"),
        (
            {"document": "Short.", "question": "A question that is longer?"},
            "longer than the document",
        ),
        ({"methods": ["Magic"]}, "Unknown method 'Magic'; choose from FullKV"),
        ({"methods": "DynamicKV"}, "list of names"),
        ({"settings": SETTINGS | {"capacity": 4}}, "capacity must exceed window_size=8"),
        ({"settings": SETTINGS | {"capacity": "x"}}, "whole number"),
        ({"settings": SETTINGS | {"capacity": float("nan")}}, "whole number"),
        ({"settings": SETTINGS | {"kernel_size": 4}}, "kernel_size must be odd"),
        ({"settings": SETTINGS | {"pooling": "median"}}, "pooling must be"),
        ({"max_new_tokens": 0}, "between 1 and 512"),
        ({"max_new_tokens": 10**9}, "between 1 and 512"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        request(**changes)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_fullkv_always_runs_and_the_order_is_the_registry_s() -> None:
    names = [method.name for method in request(methods=["DynamicKV", "SnapKV"]).methods]
    assert names == ["FullKV", "SnapKV", "DynamicKV"]


def test_methods_take_the_settings_they_know() -> None:
    dynamic = request(settings=SETTINGS | {"r_max": 5, "update_interval": 2}).methods[-1]
    assert dynamic.parameters["r_max"] == 5
    assert dynamic.parameters["update_interval"] == 2


def test_untouched_settings_leave_every_method_its_own_defaults() -> None:
    form = {"capacity": 128} | inputs.form_defaults()
    for name in inputs.offered_methods():
        assert inputs.build_method(name, form) == inputs.build_method(name, {"capacity": 128})


def test_every_offered_method_runs_from_a_capacity_alone() -> None:
    for name in inputs.offered_methods():
        assert inputs.build_method(name, {"capacity": 128}).name == name
    assert {"FullKV", "SnapKV", "DynamicKV"} <= set(inputs.offered_methods())


def test_every_offered_method_has_its_own_look() -> None:
    looks = [method_style(name) for name in inputs.offered_methods()]
    assert len({look.light for look in looks}) == len({look.glyph for look in looks}) == len(looks)
    assert method_style("Unheard of") not in METHOD_STYLES.values()


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
        inputs.read_text_upload(file)
    assert not file.exists()


def test_an_upload_is_read_and_deleted(tmp_path: Path) -> None:
    file = tmp_path / "note.md"
    file.write_bytes("\ufeffGrüße, 港 🌊\r\n${x}".encode() + b"\xff")
    assert inputs.read_text_upload(file) == "Grüße, 港 🌊\r\n${x}\ufffd"
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
        inputs.read_examples_upload(file, task, 20)
    assert str(tmp_path) not in str(error.value)
    assert not file.exists()


def test_the_first_examples_are_read_and_the_file_is_deleted(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(jsonl(LINE, {**LINE, "_id": "2"}, "{torn"))
    examples = inputs.read_examples_upload(file, "qasper", 2)
    assert [(example.task, example.id) for example in examples] == [
        ("qasper", "1"),
        ("qasper", "2"),
    ]
    assert not file.exists()
    file.write_bytes(jsonl({"input": "A text. Who?", "outputs": ["Ann"]}))
    (ruler,) = inputs.read_examples_upload(file, None, 2)
    assert (ruler.task, ruler.ruler) == ("mine", True)


def test_a_run_file_opens_and_a_broken_one_is_one_sentence(tmp_path: Path) -> None:
    trace = synthetic_trace(tokens=120, capacity=32)
    trace.save(tmp_path / "run.json.gz")
    assert inputs.read_run_upload(tmp_path / "run.json.gz") == trace
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a run record"):
        inputs.read_run_upload(tmp_path / "bad.json")
    assert list(tmp_path.iterdir()) == []


def test_methods_listed_are_the_engine_s() -> None:
    assert set(inputs.offered_methods()) <= set(dkv.METHODS)
