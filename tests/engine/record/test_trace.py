"""A run record survives the round trip to a file, and a broken or hostile one is refused in one
sentence."""

from __future__ import annotations

import base64
import copy
import dataclasses
import gzip
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dynamickv as dkv
from dynamickv.record import trace as trace_module
from dynamickv.record.trace import Retained, Scores, Trace
from tests.engine.tiny import QUESTION, SMALL_INSTANCES

DOCUMENT = "Rain 🌧️, 港口, e\u0301 and <b>markup</b>. " * 8


@pytest.fixture(scope="module")
def recorded(llm: dkv.LoadedModel) -> Trace:
    """A real comparison with every optional part present."""
    return dkv.compare(
        llm,
        DOCUMENT,
        QUESTION,
        methods=SMALL_INSTANCES,
        max_new_tokens=4,
        scores=True,
        expected="港口",
    )


@pytest.fixture
def data(recorded: Trace) -> dict[str, Any]:
    """The record as JSON data, free to be broken."""
    read: dict[str, Any] = json.loads(json.dumps(recorded.to_dict()))
    return read


# Round trips.


def test_a_record_survives_json(recorded: Trace, data: dict[str, Any]) -> None:
    assert Trace.from_dict(data) == recorded
    assert Trace.from_dict(data).to_dict() == recorded.to_dict()


@pytest.mark.parametrize("name", ["run.json", "run.json.gz", "lauf 🌧.json"])
def test_a_record_survives_a_file(recorded: Trace, tmp_path: Path, name: str) -> None:
    recorded.save(tmp_path / name)
    assert Trace.load(tmp_path / name) == recorded
    assert Trace.load(os.fspath(tmp_path / name)) == recorded


def test_a_gz_file_is_compressed_and_a_json_file_plain(recorded: Trace, tmp_path: Path) -> None:
    recorded.save(tmp_path / "run.json")
    recorded.save(tmp_path / "run.json.gz")
    plain = (tmp_path / "run.json").read_bytes()
    packed = (tmp_path / "run.json.gz").read_bytes()
    assert gzip.decompress(packed) == plain
    assert len(packed) < len(plain) / 2
    assert json.loads(plain)["schema"] == 2


def test_saving_twice_gives_the_same_bytes(
    recorded: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.save(tmp_path / "a.json.gz")
    monkeypatch.setattr("time.time", lambda: 1e9)
    recorded.save(tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_compression_is_recognised_by_content_not_by_name(recorded: Trace, tmp_path: Path) -> None:
    recorded.save(tmp_path / "run.json.gz")
    (tmp_path / "run.json.gz").rename(tmp_path / "run.json")
    assert Trace.load(tmp_path / "run.json") == recorded


def test_the_record_uses_the_documented_names(data: dict[str, Any]) -> None:
    assert set(data) == {
        "schema",
        "created",
        "versions",
        "model",
        "prompt",
        "prefill_seconds",
        "runs",
        "expected",
    }
    assert {
        "name",
        "revision",
        "num_layers",
        "num_query_heads",
        "num_kv_heads",
        "head_dim",
        "dtype",
        "device",
        "attention",
        "max_positions",
        "precision",
    } <= set(data["model"])
    assert {
        "length",
        "text",
        "text_utf16_offsets",
        "document_span",
        "document_utf16_span",
        "question_span",
        "question",
        "question_aware",
        "truncated",
        "original_length",
    } <= set(data["prompt"])
    assert {
        "method",
        "parameters",
        "answer",
        "token_ids",
        "logprobs",
        "pieces",
        "finish_reason",
        "budgets",
        "budget_history",
        "retained",
        "scores",
        "kv_bytes",
        "kv_bytes_full",
        "kept_fraction",
        "score_seconds",
        "prune_seconds",
        "decode_seconds",
        "agreement",
        "aligned",
        "erased",
        "decoding",
        "forgotten",
        "expected_found",
    } <= set(data["runs"][0])
    assert set(data["runs"][0]["agreement"]) == {
        "first_divergence",
        "token_match",
        "rouge_l",
        "divergence",
    }


def test_optional_parts_may_be_missing(data: dict[str, Any]) -> None:
    for run in data["runs"]:
        del run["scores"], run["agreement"]
    read = Trace.from_dict(data)
    assert {run.scores for run in read.runs} == {run.agreement for run in read.runs} == {None}


def test_fields_of_later_versions_are_passed_over(data: dict[str, Any], recorded: Trace) -> None:
    data["later"] = data["prompt"]["later"] = data["runs"][0]["later"] = {"a": [1]}
    assert Trace.from_dict(data) == recorded


def test_whole_numbers_are_read_where_numbers_are_meant(data: dict[str, Any]) -> None:
    data["prefill_seconds"] = 6
    assert Trace.from_dict(data).prefill_seconds == 6.0


def test_a_record_without_runs_is_read(data: dict[str, Any]) -> None:
    data["runs"] = []
    with pytest.raises(ValueError, match="holds no run of 'FullKV'; it holds none"):
        Trace.from_dict(data).run("FullKV")


def test_a_run_is_found_by_its_method(recorded: Trace) -> None:
    assert recorded.run("SnapKV") is next(r for r in recorded.runs if r.method == "SnapKV")
    with pytest.raises(ValueError, match="no run of 'snapkv'; it holds FullKV, "):
        recorded.run("snapkv")


# Bit sets.


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, 3, 8), (4, 9, 33)])
def test_retained_bits_survive_packing(shape: tuple[int, int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.4
    packed = Retained.pack(mask)
    assert packed.heads == shape[1]
    np.testing.assert_array_equal(packed.unpack(shape[0], shape[2]), mask)


def test_retained_bits_are_most_significant_first() -> None:
    mask = np.zeros((1, 1, 9), bool)
    mask[0, 0, [0, 8]] = True
    assert base64.b64decode(Retained.pack(mask).bits) == b"\x80\x80"


def test_scores_survive_packing() -> None:
    scores = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(Scores.pack(scores.T).unpack(4, 3), scores.T)


# Saving.


def test_a_failed_save_leaves_the_old_file_and_no_other(
    recorded: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run.json"
    target.write_text("old", "utf-8")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        recorded.save(target)
    assert target.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_record_that_is_no_json_touches_nothing(recorded: Trace, tmp_path: Path) -> None:
    import dataclasses

    broken = dataclasses.replace(recorded, prefill_seconds=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_can_be_read_by_others(recorded: Trace, tmp_path: Path) -> None:
    recorded.save(tmp_path / "run.json")
    assert stat.S_IMODE((tmp_path / "run.json").stat().st_mode) & 0o444 == 0o444


def test_saving_into_a_missing_folder_is_an_os_error(recorded: Trace, tmp_path: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the system's own sentence
        recorded.save(tmp_path / "missing" / "run.json")


# Broken records. Every field: wrong type, size, range.

WRONG: dict[str, list[Any]] = {
    "text": [None, 5, [], {}, True, "\ud83c"],
    "whole": [None, "5", 1.5, [], True],
    "number": [None, "5", [], True],
    "flag": [None, 0, "true", []],
    "list": [None, 5, "[]", {}],
    "object": [None, 5, "{}", []],
}
FIELDS: dict[str, str] = {
    "created": "text",
    "versions": "object",
    "versions.torch": "text",
    "model": "object",
    "model.name": "text",
    "model.revision": "text",
    "model.num_layers": "whole",
    "model.num_query_heads": "whole",
    "model.num_kv_heads": "whole",
    "model.head_dim": "whole",
    "model.dtype": "text",
    "model.device": "text",
    "model.attention": "text",
    "model.max_positions": "whole",
    "prompt": "object",
    "prompt.length": "whole",
    "prompt.text": "text",
    "prompt.text_utf16_offsets": "list",
    "prompt.text_utf16_offsets.0": "list",
    "prompt.text_utf16_offsets.0.0": "whole",
    "prompt.document_span": "list",
    "prompt.document_span.0": "whole",
    "prompt.document_utf16_span": "list",
    "prompt.question_span": "list",
    "prompt.question": "text",
    "prompt.question_aware": "flag",
    "prompt.truncated": "flag",
    "prompt.original_length": "whole",
    "prefill_seconds": "number",
    "runs": "list",
    "runs.1": "object",
    "runs.1.method": "text",
    "runs.1.parameters": "object",
    "runs.1.answer": "text",
    "runs.1.token_ids": "list",
    "runs.1.token_ids.0": "whole",
    "runs.1.pieces": "list",
    "runs.1.pieces.0": "text",
    "runs.1.logprobs": "list",
    "runs.1.logprobs.0": "number",
    "runs.1.finish_reason": "text",
    "runs.1.budgets": "list",
    "runs.1.budgets.0": "whole",
    "runs.1.budget_history": "list",
    "runs.1.retained": "object",
    "runs.1.retained.heads": "whole",
    "runs.1.retained.bits": "text",
    "runs.1.scores": "optional object",
    "runs.1.kv_bytes": "whole",
    "runs.1.kv_bytes_full": "whole",
    "runs.1.kept_fraction": "number",
    "runs.1.score_seconds": "number",
    "runs.1.prune_seconds": "number",
    "runs.1.decode_seconds": "list",
    "runs.1.decode_seconds.0": "number",
    "runs.1.decoded_together": "whole",
    "runs.1.agreement": "optional object",
    "runs.1.agreement.first_divergence": "optional whole",
    "runs.1.agreement.token_match": "number",
    "runs.1.agreement.rouge_l": "number",
    "model.precision": "text",
    "expected": "optional object",
    "expected.text": "text",
    "expected.document_utf16_span": "optional list",
    "runs.1.erased": "optional whole",
    "runs.1.expected_found": "optional flag",
    "runs.1.aligned": "optional object",
    "runs.1.aligned.utf16_spans": "list",
    "runs.1.aligned.utf16_spans.0": "list",
    "runs.1.aligned.token_spans.0.0": "whole",
    "runs.1.aligned.probabilities": "list",
    "runs.1.aligned.probabilities.0": "number",
    "runs.1.aligned.probabilities_full.0": "number",
    "runs.1.aligned.instead": "list",
    "runs.1.aligned.instead.0": "text",
    "runs.1.aligned.instead_probabilities.0": "number",
    "runs.1.aligned.surviving": "number",
    "runs.1.aligned.loss": "optional whole",
}


OPTIONAL = (
    "versions.torch",
    "runs",
    "runs.1.scores",
    "runs.1.agreement",
    "runs.1.decoded_together",
    "model.precision",
    "expected",
    "runs.1.erased",
    "runs.1.expected_found",
    "runs.1.aligned",
)


def put(data: Any, path: str, value: Any) -> Any:
    """The value at a dotted path, replaced."""
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in parents:
        data = data[step]
    before, data[last] = data[last], value
    return before


def refusal_of(data: Any) -> str:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the sentences differ
        Trace.from_dict(data)
    sentence = str(refusal.value)
    assert sentence
    assert "\n" not in sentence
    assert len(sentence) < 300
    return sentence


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (path, value)
        for path, kind in FIELDS.items()
        for value in WRONG[kind.removeprefix("optional ")]
        if not (kind.startswith("optional") and value is None)
    ],
)
def test_a_wrong_type_is_refused_by_the_fields_name(
    data: dict[str, Any], path: str, value: Any
) -> None:
    put(data, path, value)
    name = [step for step in path.split(".") if not step.isdigit()][-1]
    assert name in refusal_of(data)


@pytest.mark.parametrize(
    "path",
    [
        path
        for path, kind in FIELDS.items()
        if not path.split(".")[-1].isdigit() and path not in OPTIONAL
    ],
)
def test_a_missing_field_is_named(data: dict[str, Any], path: str) -> None:
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    holder: Any = data
    for step in parents:
        holder = holder[step]
    del holder[last]
    assert f"{last} is missing" in refusal_of(data)


LONG_INT = 10**30
DIVERGENCE: dict[str, Any] = {
    "token_ids": [1, 2],
    "pieces": [" a", " b"],
    "probabilities": [0.6, 0.1],
    "probabilities_full": [0.2, 0.5],
}

RANGES: list[tuple[str, Any]] = [
    ("model.num_layers", 0),
    ("model.num_layers", 5),
    ("model.num_layers", LONG_INT),
    ("model.num_query_heads", 0),
    ("model.num_query_heads", LONG_INT),
    ("model.num_kv_heads", 0),
    ("model.num_kv_heads", 7),
    ("model.head_dim", 0),
    ("model.max_positions", 0),
    ("prompt.length", 0),
    ("prompt.length", -1),
    ("prompt.length", 3),
    ("prompt.length", LONG_INT),
    ("prompt.text", ""),
    ("prompt.text", "short"),
    ("prompt.text_utf16_offsets", []),
    ("prompt.text_utf16_offsets.0", [0]),
    ("prompt.text_utf16_offsets.0", [0, 1, 2]),
    ("prompt.text_utf16_offsets.0", [5, 4]),
    ("prompt.text_utf16_offsets.0", [-1, 4]),
    ("prompt.text_utf16_offsets.0", [0, 10**6]),
    ("prompt.document_span", [0, 10**6]),
    ("prompt.document_span", [3, 2]),
    ("prompt.document_span", [-1, 2]),
    ("prompt.document_utf16_span", [0, 10**6]),
    ("prompt.question_span", [0, 10**6]),
    ("prompt.question_span", []),
    ("prompt.original_length", 0),
    ("prefill_seconds", -1.0),
    ("runs.1.finish_reason", "error"),
    ("runs.1.token_ids", []),
    ("runs.1.token_ids.0", -1),
    ("runs.1.pieces", ["a"]),
    ("runs.1.logprobs", []),
    ("runs.1.decode_seconds", [0.1] * 9),
    ("runs.1.decode_seconds.0", -0.5),
    ("runs.1.budgets", []),
    ("runs.1.budgets", [24] * 7),
    ("runs.1.budgets.0", -1),
    ("runs.1.budgets.0", 10**6),
    ("runs.1.budget_history", [[1]] * 100),
    ("runs.1.budget_history", [[]]),
    ("runs.1.budget_history", [[1] * 100]),
    ("runs.1.budget_history", [[-5]]),
    ("runs.1.retained.heads", 0),
    ("runs.1.retained.heads", 3),
    ("runs.1.retained.heads", 6),
    ("runs.1.retained.bits", ""),
    ("runs.1.retained.bits", "AAAA"),
    ("runs.1.retained.bits", "A" * 400_000),
    ("runs.1.retained.bits", "not base64!"),
    ("runs.1.retained.bits", "ä"),
    ("runs.1.scores", {"bytes": ""}),
    ("runs.1.scores", {"bytes": "AAAA"}),
    ("runs.1.scores", {"bytes": "A" * 400_000}),
    ("runs.1.scores", {"bytes": "*"}),
    ("runs.1.kv_bytes", -1),
    ("runs.1.kv_bytes_full", -1),
    ("runs.1.kept_fraction", -0.1),
    ("runs.1.kept_fraction", 1.1),
    ("runs.1.score_seconds", -1.0),
    ("runs.1.decoded_together", 0),
    ("runs.1.prune_seconds", -1.0),
    ("runs.1.agreement.first_divergence", -1),
    ("runs.1.agreement.token_match", 1.5),
    ("runs.1.agreement.rouge_l", -0.5),
    ("model.precision", "rough"),
    ("expected.text", ""),
    ("expected.text", "a" * (2**16 + 1)),
    ("expected.document_utf16_span", [3]),
    ("expected.document_utf16_span", [3, 10**6]),
    ("runs.1.erased", -1),
    ("runs.1.erased", 10**6),
    ("runs.1.aligned.utf16_spans", []),
    ("runs.1.aligned.utf16_spans.0", [0, 10**6]),
    ("runs.1.aligned.utf16_spans.0", [2, 1]),
    ("runs.1.aligned.token_spans", [[0, 1]] * 9),
    ("runs.1.aligned.token_spans.0", [0, 9]),
    ("runs.1.aligned.token_spans.0", [-1, 1]),
    ("runs.1.aligned.probabilities", []),
    ("runs.1.aligned.probabilities.0", 1.5),
    ("runs.1.aligned.probabilities_full.0", -0.1),
    ("runs.1.aligned.instead", []),
    ("runs.1.aligned.instead_probabilities", []),
    ("runs.1.aligned.instead_probabilities.0", 2.0),
    ("runs.1.aligned.surviving", 1.01),
    ("runs.1.aligned.loss", -1),
    ("runs.1.aligned.loss", 9),
    ("runs.0.method", "SnapKV"),
    ("runs.1.agreement.divergence", DIVERGENCE | {"token_ids": [1]}),
    ("runs.1.agreement.divergence", DIVERGENCE | {"token_ids": [1, -2]}),
    ("runs.1.agreement.divergence", DIVERGENCE | {"pieces": ["a", "b", "c"]}),
    ("runs.1.agreement.divergence", DIVERGENCE | {"probabilities": [0.5, 1.5]}),
    ("runs.1.agreement.divergence", DIVERGENCE | {"probabilities_full": [-0.1, 0.5]}),
]


def test_a_divergence_is_read_as_written(data: dict[str, Any]) -> None:
    put(data, "runs.1.agreement.divergence", DIVERGENCE)
    assert Trace.from_dict(data).to_dict()["runs"][1]["agreement"]["divergence"] == DIVERGENCE


@pytest.mark.parametrize(("path", "value"), RANGES)
def test_a_value_out_of_range_is_refused(data: dict[str, Any], path: str, value: Any) -> None:
    put(data, path, value)
    refusal_of(data)


@pytest.mark.parametrize(
    "path", [path for path, kind in FIELDS.items() if kind in ("number", "whole")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(
    data: dict[str, Any], path: str, value: float
) -> None:
    put(data, path, value)
    refusal_of(data)


@pytest.fixture(scope="module")
def forgetful(llm: dkv.LoadedModel) -> dict[str, Any]:
    """The record of a run that went on compressing while it answered."""
    trace = dkv.compare(
        llm,
        DOCUMENT,
        QUESTION,
        methods=[dkv.SnapKV(capacity=12)],
        max_new_tokens=12,
        decoding=dkv.Decoding(budget=12, buffer=4),
    )
    read: dict[str, Any] = json.loads(json.dumps(trace.to_dict()))
    return read


def test_choices_while_answering_are_read_as_written(forgetful: dict[str, Any]) -> None:
    (run,) = Trace.from_dict(forgetful).runs
    assert run.decoding == {"budget": 12, "buffer": 4}
    assert [choice.position for choice in run.forgotten] == [4, 8]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("decoding", None, "none without decoding"),
        ("decoding", {"budget": 12}, "budget and buffer"),
        ("decoding.buffer", 0, "decoding.buffer is 0"),
        ("forgotten.0.position", 9, "retained.bits holds"),
        ("forgotten.1.position", 3, "forgotten[1].position is 3"),
        ("forgotten.1.position", 13, "forgotten[1].position is 13"),
        ("forgotten.0.position", "4", "forgotten[0].position is '4'"),
        ("forgotten.0.seconds", -1.0, "forgotten[0].seconds is -1.0"),
        ("forgotten.0.retained.heads", 6, "as many as the prompt's"),
        ("forgotten.0.retained.bits", "AA==", "retained.bits holds 1 bytes"),
        ("forgotten.1.retained", "everything", "more than was held"),
    ],
)
def test_choices_that_cannot_have_been_are_refused(
    forgetful: dict[str, Any], path: str, value: Any, words: str
) -> None:
    data = copy.deepcopy(forgetful)
    if value == "everything":
        shape = (data["model"]["num_layers"], 2, data["prompt"]["length"] + 8)
        value = dataclasses.asdict(Retained.pack(np.ones(shape, bool)))
    put(data, f"runs.0.{path}", value)
    assert words in refusal_of(data)


def test_a_record_of_schema_1_opens_and_says_what_it_lacks(
    recorded: Trace, data: dict[str, Any], tmp_path: Path
) -> None:
    assert recorded.lacks == []
    data["schema"] = 1
    del data["expected"], data["model"]["precision"]
    for run in data["runs"]:
        del run["aligned"], run["erased"], run["expected_found"]
    old = Trace.from_dict(data)
    assert old.lacks == [
        "each word's probability under both caches",
        "positions erased everywhere",
        "the precision of the model's products",
    ]
    assert {(run.aligned, run.erased) for run in old.runs} == {(None, None)}
    old.save(tmp_path / "old.json")
    assert Trace.load(tmp_path / "old.json") == old


@pytest.mark.parametrize("schema", [0, 3, None, "1", 1.5, [], True])
def test_another_schema_is_refused_by_number(data: dict[str, Any], schema: Any) -> None:
    data["schema"] = schema
    assert "schema" in refusal_of(data)


def test_a_missing_schema_is_refused(data: dict[str, Any]) -> None:
    del data["schema"]
    assert "schema" in refusal_of(data)


@pytest.mark.parametrize("value", [None, 5, "text", [], [{}], {}])
def test_what_is_no_record_is_refused(value: Any) -> None:
    refusal_of(value)


def test_too_many_runs_are_refused(data: dict[str, Any]) -> None:
    data["runs"] = [data["runs"][0]] * 65
    assert "runs" in refusal_of(data)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"a": {"b": []}}, "\ud83c", ["\ud83c"]]
)
def test_parameters_hold_only_what_can_be_saved_again(data: dict[str, Any], value: Any) -> None:
    """A record that is read can be written."""
    data["runs"][1]["parameters"]["extra"] = value
    try:
        read = Trace.from_dict(data)
    except ValueError as refusal:
        assert "parameters" in str(refusal)  # noqa: PT017 - either outcome is right
    else:
        json.dumps(read.to_dict(), allow_nan=False, ensure_ascii=False).encode("utf-8")


# Broken and hostile files.


def refused(content: bytes, tmp_path: Path) -> str:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the sentences differ
        Trace.load(path)
    with pytest.raises(ValueError):  # noqa: PT011 - the same
        Trace.from_bytes(content, "record.json")
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert len(sentence) < 300
    return sentence


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"not json",
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b'{"schema": 1}',
        b"\x1f\x8b",
        b"\x1f\x8b" + b"\x00" * 50,
        gzip.compress(b'{"schema": 1}', mtime=0)[:-12],
        gzip.compress(b"not json", mtime=0),
        gzip.compress(b"", mtime=0),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5_000,
        b'{"schema": 1, "created": "\\ud83c"}',
    ],
    ids=lambda content: repr(content[:14]),
)
def test_a_file_that_is_no_record_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    sentence = refused(content, tmp_path)
    assert "record" in sentence


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_with_numbers_that_are_none_is_refused(
    data: dict[str, Any], constant: str, tmp_path: Path
) -> None:
    data["prefill_seconds"] = "HERE"
    text = json.dumps(data).replace('"HERE"', constant)
    sentence = refused(text.encode(), tmp_path)
    assert constant in sentence or "prefill_seconds" in sentence


def test_a_compressed_bomb_is_refused_before_it_unfolds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    monkeypatch.setattr(trace_module, "MAX_BYTES", 2**20)
    bomb = gzip.compress(b" " * 2**27, compresslevel=9)
    assert len(bomb) < 2**20
    tracemalloc.start()
    sentence = refused(bomb, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "larger than 1 MiB" in sentence
    assert peak < 2**24


def test_a_file_that_is_too_large_is_refused_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "MAX_BYTES", 2**20)
    assert "larger than 1 MiB" in refused(b" " * (2**20 + 1), tmp_path)


def test_deep_nesting_inside_a_field_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(data).replace('"answer": "', '"answer": ' + "[" * 50_000 + '"', 1)
    refused(text.encode(), tmp_path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "missing.json")


def test_reading_does_not_change_the_data(data: dict[str, Any]) -> None:
    before = copy.deepcopy(data)
    Trace.from_dict(data)
    assert data == before


@pytest.mark.parametrize("wreck", [lambda text: text[:-1], lambda text: text[: len(text) // 2]])
def test_a_cut_off_file_is_refused(
    recorded: Trace, tmp_path: Path, wreck: Callable[[bytes], bytes]
) -> None:
    for name in ("run.json", "run.json.gz"):
        recorded.save(tmp_path / name)
        content = wreck((tmp_path / name).read_bytes())
        if name == "run.json.gz" and content == (tmp_path / name).read_bytes()[:-1]:
            continue  # one byte of the closing size is missing, the record itself is whole
        refused(content, tmp_path)
