"""The commands: tables on stdout, progress on stderr, exit code 2 and one sentence on bad input,
results intact whatever happens; several processes give what one gives."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dynamickv as dkv
from dynamickv.cli import main
from dynamickv.evaluate import Journal, Share, methods_at, rows_of, run
from dynamickv.evaluate.datasets import read_tasks
from dynamickv.evaluate.longbench import LongBenchExperiment, Protocol
from tests.engine.tiny import DOCUMENT, QUESTION
from tests.evaluate.test_longbench import LINE, write

Command = Callable[..., tuple[int, str, str]]
LINES = [{**LINE, "_id": str(n), "context": DOCUMENT + str(n)} for n in range(5)]


@pytest.fixture
def call(
    model_folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> Command:
    """Run a command in this process, in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([arguments[0], "--model", model_folder, *arguments[1:]])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


NEEDLE = (
    "needle",
    "--lengths",
    "400",
    "--depths",
    "2",
    "--capacity",
    "24",
    "--max-new-tokens",
    "3",
)


def longbench_options(folder: Path) -> tuple[str, ...]:
    return (
        *("longbench", "--data", str(folder), "--capacity", "24"),
        *("--max-new-tokens", "3", "--output", str(folder / "out")),
    )


def test_needle_prints_its_table_and_writes_summary_and_lines(call: Command) -> None:
    code, out, err = call(*NEEDLE, "--methods", "FullKV,SnapKV", "--output", "n.json")
    assert code == 0, err
    assert "SnapKV" in out
    assert "paper: Mistral-7B, 32K, capacity 64" in out
    assert "n:" in err
    assert "unit" not in out
    record = json.loads(Path("n.json").read_text())
    assert [line["method"] for line in record["summary"]] == ["FullKV", "SnapKV"]
    assert {"date", "device", "torch", "model", "processes"} <= set(record["circumstances"])
    assert len(Path("n.jsonl").read_text().splitlines()) == 3
    again = call(*NEEDLE, "--methods", "FullKV,SnapKV", "--output", "n.json")
    assert again[1] == out
    assert len(Path("n.jsonl").read_text().splitlines()) == 3


def test_a_needle_of_ones_own(call: Command) -> None:
    own = ("--needle", "The best thing is a pie.", "--question", "What is best?")
    code, _, err = call(*NEEDLE, "--methods", "FullKV", *own, "--expected", "pie")
    assert code == 0, err
    assert json.loads(Path("needle.jsonl").read_text().splitlines()[1])["expected"] == ["pie"]
    assert call(*NEEDLE, *own)[2].splitlines()[-1] == (
        "error: --needle needs --question and --expected; give all three"
    )


def test_longbench_writes_tables_for_every_task(call: Command, tmp_path: Path) -> None:
    write(tmp_path, qasper=LINES, trec=[{**LINE, "all_classes": ["a", "b"], "answers": ["a"]}])
    code, out, err = call(*longbench_options(tmp_path), "--limit", "2", "--methods", "FullKV,H2O")
    assert code == 0, err
    assert "Mistral-7B" in out
    assert "H2O" in (tmp_path / "out" / "scores.csv").read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["summary"]
    assert {task: cell["examples"] for task, cell in summary[0]["tasks"].items()} == {
        "qasper": 2,
        "trec": 1,
    }


def test_sweep_writes_a_csv(call: Command) -> None:
    Path("d.txt").write_text(DOCUMENT)
    code, out, err = call(
        *("sweep", "--document", "d.txt", "--question", QUESTION, "--max-new-tokens", "3"),
        *("--methods", "FullKV,SnapKV,DynamicKV", "--capacity", "16,32"),
    )
    assert code == 0, err
    assert "KL nats" in out
    assert len(Path("sweep.csv").read_text().splitlines()) == 5


def test_tasks_print_the_distances(call: Command, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(DOCUMENT + name)
    Path("q.json").write_text(json.dumps({"fact": "Who?", "summary": "Summarise."}))
    code, out, err = call(
        "tasks", "--documents", str(tmp_path), "--questions", "q.json", "--capacity", "24"
    )
    assert code == 0, err
    assert "same task, other document" in out
    assert json.loads(Path("tasks.json").read_text())["summary"][0]["kinds"] == ["fact", "summary"]


TURNS = ("turns", "--capacity", "24", "--max-new-tokens", "3", "--methods", "FullKV,SnapKV")


def test_turns_ask_a_document_its_questions_and_go_on_where_they_stopped(call: Command) -> None:
    Path("d.txt").write_text(DOCUMENT)
    Path("q.txt").write_text(f"{QUESTION}\n\nWho is the keeper?\nWhen was it built?\n")
    own = (*TURNS, "--document", "d.txt", "--questions", "q.txt")
    code, out, err = call(*own)
    assert code == 0, err
    assert "1 document, 2 questions after the first, 0 with a known answer" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        "method",
        "FullKV",
        *["SnapKV"] * 3,
    ]
    record = json.loads(Path("turns.json").read_text())
    ways = [line["way"] for line in record["summary"] if line["method"] == "SnapKV"]
    assert ways == ["first", "blind", "anew"]
    assert len(Path("turns.jsonl").read_text().splitlines()) == 4
    assert call(*own)[1] == out
    assert len(Path("turns.jsonl").read_text().splitlines()) == 4
    code, _, err = call(*own, "--max-new-tokens", "4")
    assert code == 2
    assert "turns.jsonl was measured with --max-new-tokens=3 and not 4" in err


def test_forgetting_prints_its_curves_and_writes_a_csv(call: Command) -> None:
    Path("d.txt").write_text(DOCUMENT * 2)
    code, out, err = call(
        *("forgetting", "--document", "d.txt", "--methods", "SnapKV,DynamicKV", "--capacity", "24"),
        *("--prompt-tokens", "64", "--answer-tokens", "64", "--buffer", "8"),
    )
    assert code == 0, err
    assert "same next token" in out
    assert len(Path("forgetting.csv").read_text().splitlines()) == 1 + 2 * 8
    assert len(json.loads(Path("forgetting.json").read_text())["summary"]) == 2


def test_turns_make_tables_up_where_nothing_is_given(call: Command) -> None:
    made = (*TURNS, "--samples", "2", "--pairs", "8", "--asked", "2", "--methods", "SnapKV")
    code, out, err = call(*made)
    assert code == 0, err
    assert "2 documents, 2 questions after the first, 2 with a known answer" in out


def test_turns_read_scbench_files_and_folders_of_texts(call: Command) -> None:
    Path("kv").mkdir()
    turns = [{"input": QUESTION, "answer": "x"}, {"input": "Who?", "answer": ["y", "z"]}]
    line = json.dumps({"id": 7, "context": DOCUMENT, "multi_turns": turns})
    Path("kv/scbench_kv.jsonl").write_text(f"{line}\n{line.replace('7', '8')}\n")
    code, _, err = call(*TURNS, "--data", "kv", "--limit", "1")
    assert code == 0, err
    rows = [json.loads(row) for row in Path("turns.jsonl").read_text().splitlines()[1:]]
    assert [row["unit"]["document"] for row in rows] == ["scbench_kv-7"] * 2
    assert [row["expected"] for row in rows] == [["x"], ["y", "z"]]
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(DOCUMENT)
    Path("texts/b.txt").write_text(DOCUMENT)
    Path("texts/questions.json").write_text(json.dumps({"b": {"fact": "Who?", "sum": "Sum up."}}))
    code, out, err = call(*TURNS, "--data", "texts", "--output", "t.json")
    assert code == 0, err
    assert "1 document, 1 question after the first, 0 with a known answer" in out
    Path("texts/turns.json").write_text(json.dumps({"a": ["Who?", {"question": "When?"}]}))
    code, out, err = call(*TURNS, "--data", "texts", "--output", "u.json")
    assert code == 0, err
    assert json.loads(Path("u.jsonl").read_text().splitlines()[1])["unit"]["document"] == "a"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("q.txt", "Only one?", "q.txt needs a list of at least 2 questions"),
        ("q.txt", "[torn", "q.txt is not JSON"),
        ("q.txt", '["a?", 3]', "q.txt, question 2 is no text"),
        ("q.txt", '[{"answers": ["a"]}, "b?"]', "q.txt, question 1 is no text"),
        ("q.txt", '[{"question": "a?", "answers": [1]}, "b?"]', "question 1 has answers that are"),
        ("data/a.jsonl", "{torn", "a.jsonl, line 1 is not JSON"),
        ("data/a.jsonl", '{"multi_turns": []}', "line 1 has no text in its field context"),
        ("data/a.jsonl", '{"context": "a", "multi_turns": [1]}', "line 1 needs a list of at least"),
        ("data/a.jsonl", "\n", "a.jsonl is empty"),
        ("data/turns.json", '{"b": ["a?", "b?"]}', "questions for 'b', but there is no b.txt"),
        ("data/turns.json", "[]", "turns.json is no table"),
        ("data/none.json", "{}", "has no questions for its texts"),
    ],
)
def test_questions_that_cannot_be_asked_are_named_by_their_place(
    call: Command, file: str, content: str, words: str
) -> None:
    Path("data").mkdir()
    Path("data/a.txt").write_text(DOCUMENT)
    Path("d.txt").write_text(DOCUMENT)
    Path(file).write_text(content)
    own = ("--document", "d.txt", "--questions", "q.txt")
    code, out, err = call("turns", *(own if file == "q.txt" else ("--data", "data")))
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert not Path("turns.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("needle", "--methods", "Dynamic"), "no method 'Dynamic'"),
        (("needle", "--methods", ","), "no method to measure"),
        (("needle", "--capacity", "many"), "--capacity takes whole numbers, such as 64,128, got"),
        (("needle", "--capacity", "0"), "at least 1"),
        (("needle", "--capacity", "4"), "capacity must exceed sinks=4 tokens, got 4"),
        (("needle", "--lengths", "-5"), "--lengths takes numbers of at least 1"),
        (("needle", "--lengths", "9999"), "lower the length to"),
        (("needle", "--depths", "0"), "--depths takes a number of depths"),
        (("needle", "--depths", "0,2"), "depths run from 0"),
        (("needle", "--haystack", "/nowhere"), "there is no folder /nowhere"),
        (("needle", "--output", "a.txt"), "ends in .json"),
        (("needle", "--output", "/nowhere/a.json"), "does not exist"),
        (("longbench", "--data", "/nowhere"), "there is no folder /nowhere"),
        (("longbench", "--data", ".", "--tasks", "qasper"), "holds no .jsonl files"),
        (("longbench", "--prompts", "none.json"), "none.json: no such file"),
        (("longbench", "--limit", "0", "--data", "."), "limit must be at least 1"),
        (("sweep", "--document", "none.txt", "--question", "?"), "there is no file none.txt"),
        (("tasks", "--documents", "/nowhere"), "there is no folder /nowhere"),
        (("forgetting", "--document", "none.txt"), "there is no file none.txt"),
        (("forgetting", "--document", ","), "--document names no file"),
        (("forgetting", "--document", "n", "--methods", "CAKE"), "leave decoding out"),
        (("forgetting", "--document", "n", "--buffer", "0"), "buffer must be at least 1 token"),
        (("turns", "--data", "/nowhere"), "there is no folder /nowhere"),
        (("turns", "--data", ".", "--limit", "0"), "limit must be at least 1"),
        (("turns", "--document", "none.txt"), "--document needs --questions"),
        (("turns", "--questions", "none.txt"), "--questions needs --document"),
        (("turns", "--document", "n", "--questions", "n"), "there is no file n"),
        (("turns", "--samples", "0"), "samples must be at least 1"),
        (("turns", "--asked", "1"), "asked must be at least 2"),
        (("turns", "--pairs", "4"), "pairs must be from the number of questions (5)"),
        (("turns", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("turns", "--output", "a.txt"), "ends in .json"),
        (("tasks", "--documents", "."), "holds no .txt files"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_one_sentence(
    call: Command, arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in err
    assert list(Path().iterdir()) == []


def test_a_malformed_line_is_reported_and_skipped_on_request(call: Command, tmp_path: Path) -> None:
    write(tmp_path, qasper=[LINES[0], "{torn"])
    code, out, err = call(*longbench_options(tmp_path), "--methods", "FullKV")
    assert (code, out) == (2, "")
    assert "qasper.jsonl, line 2: the line is not JSON" in err.splitlines()[-1]
    code, _, err = call(*longbench_options(tmp_path), "--methods", "FullKV", "--skip-malformed")
    assert code == 0
    assert "line 2" in err


def test_a_full_disk_ends_with_one_sentence_and_keeps_what_was_measured(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, qasper=LINES[:3])
    real, lines = os.write, []

    def full(descriptor: int, content: bytes) -> int:
        if content.startswith(b'{"unit"'):
            lines.append(content)
        if len(lines) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    code, out, err = call(*longbench_options(tmp_path), "--methods", "FullKV,SnapKV")
    monkeypatch.setattr(os, "write", real)
    assert (code, out) == (2, "")
    results = tmp_path / "out" / "results.jsonl"
    assert err.splitlines()[-1].endswith(f"{results}: no space left on device")
    kept = results.read_text()
    assert len(kept.splitlines()) == 2
    assert call(*longbench_options(tmp_path), "--methods", "FullKV,SnapKV")[0] == 0
    assert results.read_text().startswith(kept)
    assert len(results.read_text().splitlines()) == 4


# Several processes.


def scored(rows: list[dict[str, Any]]) -> list[Any]:
    """What is measured, without what took how long."""
    return [
        (row["unit"], row["prompt_tokens"], sorted(row["runs"], key=lambda r: json.dumps(r)))
        for row in rows
    ]


def test_shares_are_disjoint_and_cover_everything() -> None:
    work = list(range(7))
    shares = [Share(rank, 3).mine(work) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == work
    assert [len(share) for share in shares] == [3, 2, 2]
    assert Share().mine(work) == work


def test_a_lost_part_is_measured_again_and_nothing_else(
    llm: dkv.LoadedModel, tmp_path: Path
) -> None:
    write(tmp_path, qasper=LINES)
    methods = methods_at(["FullKV", "SnapKV"], [24])
    examples, protocol = read_tasks(tmp_path), Protocol.official(max_new_tokens=3)
    experiment = LongBenchExperiment(llm, examples, protocol)

    def part(name: str, rank: int, world: int) -> int:
        journal = Journal(tmp_path / name, rank)
        return sum(
            step.row is not None for step in run(experiment, methods, journal, Share(rank, world))
        )

    def results(name: str) -> list[Any]:
        return scored(rows_of(Journal(tmp_path / name), experiment.units()))

    assert part("one.jsonl", 0, 1) == 5
    # Alone, a process sees what others wrote before it started; together, all start from one list.
    second = run(experiment, methods, Journal(tmp_path / "two.jsonl", 1), Share(1, 2))
    next(second)
    assert part("two.jsonl", 0, 2) == 3
    assert sum(step.row is not None for step in second) == 2
    assert results("two.jsonl") == results("one.jsonl")
    (tmp_path / "two.1.jsonl").unlink()
    assert len(results("two.jsonl")) == 3
    assert part("two.jsonl", 0, 1) == 2
    assert results("two.jsonl") == results("one.jsonl")


@pytest.mark.slow
def test_two_launched_processes_equal_one(
    call: Command, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, qasper=LINES)
    options = longbench_options(tmp_path)[:-1]
    code, alone, err = call(*options, str(tmp_path / "one"))
    assert code == 0, err

    def launched() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
             "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
             "--dynamo_backend", "no", "--main_process_port", "0", "-m", "dynamickv",
             *options, str(tmp_path / "two"), "--model", model_folder],
            capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    units = [{"task": "qasper", "id": str(n)} for n in range(5)]
    parts = [tmp_path / "two" / name for name in ("results.jsonl", "results.1.jsonl")]
    one = scored(rows_of(Journal(tmp_path / "one" / "results.jsonl"), units))
    assert len(one) == 5
    for lost in (False, True):
        if lost:
            parts[1].unlink()
        together = launched()
        assert together.returncode == 0, together.stderr
        assert together.stdout == alone
        assert scored(rows_of(Journal(parts[0]), units)) == one
        # A line of settings each, and the examples: 3 and 2, then the 2 lost ones, one each.
        lines = [len(part.read_text().splitlines()) for part in parts]
        assert lines == ([5, 2] if lost else [4, 3])
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["circumstances"]["processes"] == "2"


@pytest.mark.slow
def test_bad_input_stops_all_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dynamickv",
         "longbench", "--data", str(tmp_path / "missing")],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: there is no folder" in done.stderr
