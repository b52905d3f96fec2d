"""The command line: results on stdout, progress on stderr, exit code 2 and one sentence on bad
input."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import dynamickv as dkv
from dynamickv.cli import lost_words, main
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, "utf-8")
    return path


@pytest.fixture
def run(model: Path, document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `compare` in this process with options changed; (exit code, stdout, stderr)."""

    def compare(*extra: str, **options: str | None) -> tuple[int, str, str]:
        chosen = {
            "document": str(document),
            "question": QUESTION,
            "model": str(model),
            "capacity": "24",
            "max_new_tokens": "4",
            **options,
        }
        arguments = ["compare", *extra]
        for name, value in chosen.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", value]
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return compare


# What it prints and writes.


def test_answers_and_a_table_go_to_stdout_and_progress_to_stderr(run: Any) -> None:
    code, out, err = run()
    assert code == 0
    assert "FullKV:" in out
    assert "DynamicKV:" in out
    assert "ms/token" in out
    for word in ("prefill", "decode"):
        assert f"{word}:" in err
    assert "it/s" not in out
    assert "%|" not in out


def test_the_answers_are_those_of_the_library(run: Any, model: Path) -> None:
    _, out, _ = run(max_new_tokens="6")
    trace = dkv.compare(
        tiny_llm(),
        DOCUMENT,
        QUESTION,
        methods=[dkv.FullKV(), dkv.DynamicKV(capacity=24)],
        max_new_tokens=6,
    )
    for answered in trace.runs:
        assert f"{answered.method}:\n{answered.answer.strip()}" in out
        assert f"{answered.kept_fraction:.1%}" in out


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_output_writes_the_record(run: Any, tmp_path: Path, name: str) -> None:
    code, out, err = run(output=str(tmp_path / name))
    assert code == 0
    assert f"Record saved to {tmp_path / name}" in err
    assert "Record saved" not in out
    trace = dkv.Trace.load(tmp_path / name)
    assert [answered.method for answered in trace.runs] == ["FullKV", "DynamicKV"]
    assert trace.runs[1].answer.strip() in out
    assert trace.prompt.question == QUESTION


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (
            "DynamicKV",
            {
                "window_size": 4,
                "kernel_size": 3,
                "pooling": "avg",
                "granularity": "query_head",
                "r_max": 2.5,
                "update_interval": 2,
            },
        ),
        ("CAKE", {"tau1": 0.5, "tau2": 2.0, "gamma": 7.0}),
        ("LAVa", {"alpha": 0.3}),
        (
            "VoteKV",
            {
                "context_size": 20,
                "voted_share": 0.5,
                "voting_size": 6,
                "smoothing": 3,
                "reach": 2,
            },
        ),
    ],
)
def test_every_option_reaches_the_method(
    method: str, given: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    told = {name: str(value) for name, value in given.items()}
    run(methods=method, capacity="30", output=str(tmp_path / "run.json"), **told)
    (answered,) = dkv.Trace.load(tmp_path / "run.json").runs
    assert (given | {"capacity": 30}).items() <= answered.parameters.items()
    assert len(answered.token_ids) == 4


def test_methods_may_be_spaced_and_repeated(run: Any) -> None:
    code, out, _ = run(methods=" SnapKV , FullKV,,SnapKV ")
    assert code == 0
    assert out.index("FullKV:") < out.index("SnapKV:")
    assert out.count("SnapKV:") == 1


def test_a_document_that_fits_says_loudly_that_there_is_nothing_to_compress(run: Any) -> None:
    code, out, _ = run(capacity="500")
    assert code == 0
    assert "NOTHING TO COMPRESS: DynamicKV may keep 500 tokens per layer" in out
    assert "NOTHING TO COMPRESS: FullKV" not in out


def test_every_registered_method_can_be_reported_when_nothing_is_compressed(run: Any) -> None:
    code, out, err = run(methods=",".join(dkv.METHODS), capacity="500", max_new_tokens="2")
    assert code == 0, err
    for name in dkv.METHODS:
        assert f"{name}:" in out


def test_manual_without_budgets_is_said_to_keep_the_capacity_everywhere(run: Any) -> None:
    said = "Manual without budgets keeps the capacity in every layer"
    code, _, err = run(methods="FullKV,Manual", max_new_tokens="2")
    assert (code, err.count(said)) == (0, 1)
    assert said not in run(methods="FullKV,SnapKV", max_new_tokens="2")[2]


def test_the_document_may_come_from_stdin(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(DOCUMENT.encode())))
    from_stdin = run(document="-")[1]
    assert from_stdin.splitlines()[-1] == run()[1].splitlines()[-1]


def test_a_byte_order_mark_is_no_part_of_the_document(
    run: Any, document: Path, tmp_path: Path
) -> None:
    document.write_text(DOCUMENT, "utf-8-sig")
    run(output=str(tmp_path / "run.json"))
    assert "\ufeff" not in dkv.Trace.load(tmp_path / "run.json").prompt.text


def test_a_truncated_document_is_announced(run: Any, document: Path) -> None:
    document.write_text("".join(f"Line {number} of the log. " for number in range(400)))
    code, out, _ = run("--truncate")
    assert code == 0
    assert "TRUNCATED" in out


def test_models_lists_what_can_be_loaded_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path))
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m" in out
    assert "Apache-2.0" in out
    assert str(tmp_path / "models") in out


def test_models_prepare_loads_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--prepare", str(model)]) == 0
    assert "is ready" in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert dkv.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["compare", "--capacity", "abc"], ["needle", "--lengths"], ["nothing"], []]
)
def test_options_that_cannot_be_read_are_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+; python -m dynamickv.* --help shows what there is\n", err)


# Bad input: exit code 2, one sentence on stderr, nothing on stdout.


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert "error: " in last
    for word in words:
        assert word in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"document": "missing.txt"}, ["there is no file missing.txt"]),
        ({"document": "/"}, ["there is no file /"]),
        ({"question": ""}, ["the question is empty"]),
        ({"question": "   "}, ["the question is empty"]),
        ({"question": QUESTION * 99}, ["the question has", "the document", "characters"]),
        ({"methods": "FullKV,Dynamic"}, ["no method 'Dynamic'", "DynamicKV"]),
        ({"methods": ""}, ["no method"]),
        ({"methods": " , "}, ["no method"]),
        ({"capacity": "8"}, ["--capacity must exceed --window-size=8", "got 8"]),
        ({"capacity": "0"}, ["capacity", "0"]),
        ({"capacity": "-5"}, ["capacity", "-5"]),
        ({"capacity": "many"}, ["--capacity", "many"]),
        ({"capacity": "1.5"}, ["--capacity", "1.5"]),
        ({"window_size": "30"}, ["--window-size=30", "24"]),
        ({"kernel_size": "4"}, ["--kernel-size must be odd", "4"]),
        ({"pooling": "median"}, ["pooling must be 'max' or 'avg'", "'median'"]),
        ({"granularity": "layer"}, ["granularity", "'layer'"]),
        ({"r_max": "0"}, ["--r-max", "0"]),
        ({"r_max": "nan"}, ["--r-max", "nan"]),
        ({"update_interval": "0"}, ["--update-interval", "0"]),
        ({"decode_budget": "0"}, ["--decode-budget must be at least 1 token, got 0"]),
        ({"decode_budget": "8"}, ["decoding budget 8", "--window-size=8"]),
        (
            {"decode_budget": "24", "decode_buffer": "0"},
            ["--decode-buffer must be at least 1", "got 0"],
        ),
        ({"decode_buffer": "16"}, ["give --decode-budget too"]),
        ({"decode_budget": "24", "methods": "Manual"}, ["Manual does not choose again"]),
        ({"output": "/nowhere/window_size.json"}, ["/nowhere/window_size.json"]),
        ({"max_new_tokens": "0"}, ["--max-new-tokens", "0"]),
        ({"model": "gpt-five"}, ["no model 'gpt-five'", "smollm2-135m"]),
        ({"model": "missing.gguf"}, ["no file missing.gguf"]),
        ({"model": "organisation/model"}, ["not on this machine", "cannot be reached"]),
        ({"model": "/tmp"}, ["/tmp"]),
        ({"output": "run.txt"}, ["--output run.txt", ".json or .json.gz"]),
        ({"output": "/nowhere/run.json"}, ["/nowhere/run.json", "does not exist"]),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    run: Any, options: dict[str, str], words: list[str]
) -> None:
    assert_refused(run(**options), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["the document is empty"]),
        (b" \n\t ", ["the document is empty"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", ["is not UTF-8 text"]),
        (DOCUMENT.encode("utf-16"), ["is not UTF-8 text"]),
        (b"text with a \x00 byte, longer than the question", ["is a binary file"]),
        (DOCUMENT.encode() * 20, ["tokens and this model reads 2,048"]),
    ],
    ids=["empty", "spaces", "png", "utf-16", "null-byte", "too-long"],
)
def test_bad_documents_are_refused_in_one_sentence(
    run: Any, document: Path, content: bytes, words: list[str]
) -> None:
    document.write_bytes(content)
    assert_refused(run(), *words)


@pytest.mark.slow
def test_five_megabytes_are_refused_in_one_sentence(run: Any, document: Path) -> None:
    document.write_bytes(b"A fact about the harbour. " * 200_000)
    assert_refused(run(), "tokens and this model reads 2,048")


def test_an_output_that_is_a_folder_is_refused_before_the_work(run: Any, tmp_path: Path) -> None:
    result = run(output=str(tmp_path))
    assert_refused(result, str(tmp_path))
    assert "prefill:" not in result[2]


@pytest.mark.parametrize("missing", ["document", "question"])
def test_missing_options_are_refused_by_name(run: Any, missing: str) -> None:
    assert_refused(run(**{missing: None}), f"--{missing}")


@pytest.mark.parametrize("arguments", [[], ["compute"], ["compare", "--nonsense"]])
def test_what_is_no_command_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_interrupting_ends_quietly(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamickv.cli.load_model", interrupted)
    code, out, err = run()
    assert code == 130
    assert out == ""
    assert "Traceback" not in err


# The real process, once for each outcome.


def as_process(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "dynamickv", *arguments],
        capture_output=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def test_the_process_answers_and_keeps_the_streams_apart(
    model: Path, document: Path, tmp_path: Path
) -> None:
    done = as_process(
        *("compare", "--document", str(document), "--question", QUESTION),
        *("--model", str(model), "--capacity", "24", "--max-new-tokens", "3"),
        *("--output", str(tmp_path / "run.json")),
    )
    assert done.returncode == 0
    assert b"DynamicKV:" in done.stdout
    assert b"prefill" in done.stderr
    assert b"prefill:" not in done.stdout
    assert dkv.Trace.load(tmp_path / "run.json").runs


def test_the_process_refuses_with_exit_code_2_and_no_traceback(document: Path) -> None:
    done = as_process("compare", "--document", str(document), "--question", " ")
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.splitlines()[-1] == b"error: the question is empty; enter some text"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["compare", "needle", "longbench", "sweep", "tasks", "models"])
def test_every_option_is_explained_and_tells_its_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = capsys.readouterr().out.partition("\noptions:")[2]
    explained = re.findall(r"^  (--[a-z0-9-]+)(?: \S+)?\s+[^\s-]", options, re.M)
    assert explained == re.findall(r"^  (--[a-z0-9-]+)", options, re.M)
    for name in {"window-size", "capacity", "seed"} & {option[2:] for option in explained}:
        text = options.partition(f"--{name} ")[2].partition("\n  --")[0]
        assert "default: " in text or (command, name) == ("sweep", "capacity")


def test_the_table_says_what_survives_and_which_word_is_lost(run: Any, tmp_path: Path) -> None:
    _, out, _ = run(max_new_tokens="12", output=str(tmp_path / "run.json"))
    trace = dkv.Trace.load(tmp_path / "run.json")
    full, held = trace.runs[0], trace.runs[1].aligned
    assert held is not None
    row = next(line for line in out.splitlines() if line.startswith("DynamicKV "))
    assert f"{held.surviving:.1%}" in row
    assert held.loss is not None
    first, last = held.token_spans[held.loss]
    word = "".join(full.pieces[first:last]).strip()
    both = held.probabilities_full[held.loss], held.probabilities[held.loss]
    shares = (f"{share:.0%}" if share >= 0.01 else f"{100 * share:.1g}%" for share in both)
    assert row.endswith(f"{word} {' -> '.join(shares)}")
    assert trace.model.precision in out.splitlines()[0]


def test_without_fullkv_the_dashes_are_explained(run: Any) -> None:
    said = "-: there is no FullKV run to compare with; add FullKV to --methods."
    assert said in run(methods="DynamicKV", max_new_tokens="2")[1].splitlines()
    assert said not in run(max_new_tokens="2")[1]


def test_a_lost_word_s_small_probabilities_tell_apart() -> None:
    full = Mock(pieces=[" goose"])
    for before, after, said in (
        (0.9, 0.02, "goose 90% -> 2%"),
        (0.014, 0.006, "goose 1% -> 0.6%"),
        (0.0003, 0.0, "goose 0.03% -> 0%"),
    ):
        held = Mock(
            loss=0, token_spans=[[0, 1]], probabilities=[after], probabilities_full=[before]
        )
        assert lost_words(held, full) == said


def test_compression_while_answering_is_said_and_recorded(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    options = {"decode_budget": "24", "decode_buffer": "4", "max_new_tokens": "10"}
    code, out, _ = run(output=str(file), **options)
    assert code == 0
    full, compressed = dkv.Trace.load(file).runs
    assert full.forgotten == []
    assert compressed.decoding == {"budget": 24, "buffer": 4}
    assert [choice.position for choice in compressed.forgotten] == [4, 8]
    assert out.count("chose again") == 1
    assert "(chose again 2 times while answering, down to 24 tokens per layer)" in out


def test_what_is_expected_is_looked_for(run: Any) -> None:
    _, out, _ = run(expected="ms okafor")
    assert "Expected 'ms okafor': in the document." in out
    assert "FullKV (misses what is expected):" in out
    _, out, _ = run(expected="nobody said this")
    assert "NOT in the document" in out


def test_an_unknown_precision_is_refused_before_the_model_is_loaded(run: Any) -> None:
    code, out, err = run(precision="rough", model="no such model")
    assert (code, out) == (2, "")
    assert "precision must be auto, exact, fast, got 'rough'" in err
