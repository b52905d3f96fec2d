"""LongBench and RULER: files, prompts, truncation, scores, tables."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dynamickv as dkv
from dynamickv.evaluate import Journal, methods_at, rows_of, run, tables
from dynamickv.evaluate import datasets as datasets_module
from dynamickv.evaluate.data import data_file
from dynamickv.evaluate.datasets import Example, hub_folder, read_tasks, task_names
from dynamickv.evaluate.longbench import LongBenchExperiment, Protocol, score
from dynamickv.evaluate.summary import longbench_summary
from tests.engine.tiny import DOCUMENT

LINE = {
    "input": "Who keeps the light?",
    "context": DOCUMENT,
    "answers": ["Ms Okafor"],
    "length": 80,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "a1",
}
RULER = {"index": 3, "input": DOCUMENT + "Who?", "outputs": ["Okafor", "Lind"], "length": 300}


def example(task: str = "qasper", **changes: Any) -> Example:
    settings: dict[str, Any] = {
        "fields": {"context": DOCUMENT, "input": "Who?"},
        "answers": ["Ms Okafor"],
        "all_classes": None,
        "ruler": False,
        "id": "a1",
    }
    return Example(task=task, **{**settings, **changes})


def write(folder: Path, **tasks: list[Any]) -> Path:
    for task, lines in tasks.items():
        text = "".join(
            (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n"
            for line in lines
        )
        (folder / f"{task}.jsonl").write_text(text, "utf-8")
    return folder


# Files.


def test_tasks_are_read_in_longbenchs_order_and_limited(tmp_path: Path) -> None:
    write(
        tmp_path, qasper=[{**LINE, "_id": str(n)} for n in range(5)], narrativeqa=[LINE], vt=[RULER]
    )
    assert task_names(tmp_path) == ["narrativeqa", "qasper", "vt"]
    read = read_tasks(tmp_path, limit=2)
    assert [(e.task, e.id) for e in read] == [
        ("narrativeqa", "a1"),
        ("qasper", "0"),
        ("qasper", "1"),
        ("vt", "3"),
    ]
    assert [e.task for e in read_tasks(tmp_path, ["vt", "vt"])] == ["vt"]


def test_examples_of_one_name_stay_apart(tmp_path: Path) -> None:
    write(tmp_path, qasper=[LINE, {**LINE, "input": "Another?"}])
    assert [e.id for e in read_tasks(tmp_path)] == ["a1", "a1, line 2"]


def test_rulers_own_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "niah_single_1").mkdir()
    row = {**RULER, "answer_prefix": " The answer is"}
    write(tmp_path / "niah_single_1", validation=[row])
    (read,) = read_tasks(tmp_path)
    assert read.ruler
    assert read.fields["input"].endswith("Who? The answer is")


@pytest.mark.parametrize("row", [{**LINE, "answers": "Okafor"}, {**RULER, "outputs": "Okafor"}])
def test_an_answer_that_is_one_text_is_read(tmp_path: Path, row: dict[str, Any]) -> None:
    write(tmp_path, qasper=[row])
    (read,) = read_tasks(tmp_path)
    assert read.answers == ["Okafor"]


@pytest.mark.parametrize(
    ("question", "prefix", "prompt"),
    [
        ("Who?", "The answer is", f"{DOCUMENT.rstrip()}\nWho? The answer is"),
        (" Who?\n", " The answer is", f"{DOCUMENT.rstrip()} Who?\n The answer is"),
        ("Who?", "", f"{DOCUMENT.rstrip()}\nWho?"),
    ],
)
@pytest.mark.parametrize("answer", ["Okafor", ["Okafor"]])
def test_kvpresss_columns_of_ruler_are_read(
    tmp_path: Path, question: str, prefix: str, prompt: str, answer: Any
) -> None:
    row = {
        "context": DOCUMENT.rstrip(),
        "question": question,
        "answer_prefix": prefix,
        "answer": answer,
        "task": "niah_single_1",
        "max_new_tokens": 128,
    }
    write(tmp_path, niah_single_1=[row])
    (read,) = read_tasks(tmp_path)
    assert read.ruler
    assert read.fields == {"input": prompt}
    assert read.answers == ["Okafor"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "the line is not JSON"),
        ("[1, 2]", "list and no object"),
        ({**LINE, "context": 3}, "'context' is not a text"),
        ({**LINE, "answers": []}, "'answers' is not a list of texts"),
        ({**LINE, "answers": 3}, "'answers' is not a list of texts"),
        ({**LINE, "context": " ", "input": ""}, "the prompt is empty"),
        ({"input": "a", "outputs": [4]}, "'outputs' is not a list of texts"),
        ({**LINE, "all_classes": "a"}, "'all_classes' is not a list of texts"),
    ],
)
def test_a_malformed_line_is_named_and_skipped_only_on_request(
    tmp_path: Path, line: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, qasper=[LINE, "", line, {**LINE, "_id": "b"}])
    with pytest.raises(ValueError, match=rf"qasper\.jsonl, line 3: .*{words}.*--skip-malformed"):
        read_tasks(tmp_path)
    assert [e.id for e in read_tasks(tmp_path, skip_malformed=True)] == ["a1", "b"]
    assert "qasper.jsonl, line 3" in caplog.text


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: the line is not UTF-8"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("tasks", "asked", "words"),
    [
        ({}, [], "holds no .jsonl files"),
        ({"qasper": [LINE]}, ["qasper", "quasper"], "no task 'quasper' in .*; choose from qasper"),
        ({"qasper": [""]}, [], "qasper.jsonl holds no examples"),
        ({"mine": [LINE]}, [], "mine.jsonl, line 1: 'mine' is no task of LongBench"),
        ({"trec": [LINE]}, [], "'all_classes' is missing"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(
    tmp_path: Path, tasks: dict[str, Any], asked: list[str], words: str
) -> None:
    write(tmp_path, **tasks)
    with pytest.raises(ValueError, match=words):
        read_tasks(tmp_path, asked)


def test_only_malformed_lines_leave_no_examples(tmp_path: Path) -> None:
    write(tmp_path, qasper=["nonsense"])
    with pytest.raises(ValueError, match="holds no examples, 1 malformed ones left out"):
        read_tasks(tmp_path, skip_malformed=True)


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no folder /nowhere"):
        read_tasks("/nowhere")


def test_the_hubs_archive_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/qasper.jsonl", json.dumps(LINE) + "\n")
        file.writestr("../../escaped.jsonl", json.dumps(LINE) + "\n")
        file.writestr("data/notes.txt", "no task")
    asked = []

    def download(*arguments: str, **options: str) -> str:
        asked.append((*arguments, options["repo_type"]))
        return str(archive)

    monkeypatch.setattr(datasets_module.huggingface_hub, "hf_hub_download", download)
    assert task_names(hub_folder()) == ["qasper", "escaped"]
    assert hub_folder() == tmp_path / "cache" / "longbench"
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]
    assert not (tmp_path / "escaped.jsonl").exists()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["longbench"]


def test_without_the_hub_a_folder_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="hub cannot be reached; give --data DIR"):
        hub_folder()


# Prompts.


def test_every_task_has_a_template_a_length_and_a_metric() -> None:
    tasks = data_file("longbench_tasks.json")
    assert len(tasks) == 21
    assert set(tasks) == set(data_file("longbench_prompts.json"))
    assert set(tasks) == set(data_file("longbench_max_new_tokens.json"))
    assert {task["metric"] for task in tasks.values()} == set(dkv.evaluate.metrics.METRICS)
    first = {name for name, task in tasks.items() if task.get("first_line")}
    assert first == {"trec", "triviaqa", "samsum", "lsht"}
    assert sum(task["language"] == "zh" for task in tasks.values()) == 5


def test_the_template_is_filled_and_a_text_with_braces_is_only_text() -> None:
    protocol = Protocol.official()
    fields = {"context": "def f(): return {input}", "input": "{context} {0} {x!r}"}
    prompt = protocol.prompt(example("repobench-p", fields=fields))
    assert prompt == data_file("longbench_prompts.json")["repobench-p"].replace(
        "{context}{input}", "def f(): return {input}{context} {0} {x!r}"
    )
    assert protocol.prompt(example("qasper_e")) == protocol.prompt(example("qasper"))
    assert protocol.prompt(example("vt", ruler=True, fields={"input": "as it is"})) == "as it is"


def test_templates_and_lengths_may_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"qasper": "Q {input} C {context}"}))
    (tmp_path / "l.json").write_text(json.dumps({"qasper": 5}))
    protocol = Protocol.official(tmp_path / "p.json", tmp_path / "l.json")
    assert protocol.prompt(example()) == f"Q Who? C {DOCUMENT}"
    assert protocol.answer_length(example()) == 5
    with pytest.raises(ValueError, match="no prompt template for task 'trec'; the file has qasper"):
        protocol.prompt(example("trec"))
    with pytest.raises(ValueError, match="no answer length for task 'trec'"):
        protocol.answer_length(example("trec"))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ("[]", "no table from task to str"), ('{"qasper": 3}', "no table")],
)
def test_files_that_are_no_templates_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        Protocol.official(tmp_path / "p.json")


def test_a_template_with_unknown_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"qasper": "{context} {question}"}))
    with pytest.raises(ValueError, match="other fields than"):
        Protocol.official(tmp_path / "p.json").prompt(example())


def test_official_lengths_hold_unless_one_is_given() -> None:
    assert Protocol.official().answer_length(example("gov_report")) == 512
    assert Protocol.official().answer_length(example("niah_multikey_1", ruler=True)) == 128
    assert Protocol.official().answer_length(example("qa_2", ruler=True)) == 32
    assert Protocol.official(max_new_tokens=7).answer_length(example("gov_report")) == 7


@pytest.mark.parametrize(
    ("positions", "answer", "limit"),
    [(8192, 128, 7950), (8192, 512, 7680), (32768, 512, 31500), (1_000_000, 512, 999_488)],
)
def test_prompts_are_as_long_as_in_the_papers_runs(positions: int, answer: int, limit: int) -> None:
    assert Protocol.official().limit(positions, answer) == limit
    assert Protocol.official(max_length=600).limit(positions, answer) == 600


def test_the_chat_template_is_optional_and_never_for_few_shot_and_code() -> None:
    plain, chat = Protocol.official(), Protocol.official(chat_template=True)
    assert not plain.with_chat_template(example())
    assert chat.with_chat_template(example())
    assert chat.with_chat_template(example("vt", ruler=True))
    for task in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"):
        assert not chat.with_chat_template(example(task))


def test_a_long_prompt_keeps_its_first_and_last_tokens_and_no_chat_template(
    llm: dkv.LoadedModel,
) -> None:
    text = "".join(f"Line {number} of the log.\n" for number in range(60))
    ids = llm.tokenizer(text).input_ids
    whole = dkv.prefill_text(llm, text)
    assert whole.prompt.token_ids == ids
    assert not whole.prompt.truncated
    assert whole.question_aware
    cut = dkv.prefill_text(llm, text, limit=101)
    halves = llm.tokenizer.decode(ids[:50]), llm.tokenizer.decode(ids[-50:])
    assert cut.prompt.text == "".join(halves)
    assert cut.prompt.token_ids == llm.tokenizer("".join(halves)).input_ids
    assert cut.prompt.truncated
    chat = dkv.prefill_text(llm, text, chat_template=True)
    assert chat.prompt.text == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    trace = dkv.compare(llm, prefill=cut, methods=[dkv.SnapKV(capacity=24)], max_new_tokens=2)
    assert dkv.Trace.from_dict(json.loads(json.dumps(trace.to_dict()))).prompt.truncated


def test_texts_that_cannot_be_read_are_refused(llm: dkv.LoadedModel) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        dkv.prefill_text(llm, "  ")
    with pytest.raises(ValueError, match=r"this model reads 2,048"):
        dkv.prefill_text(llm, DOCUMENT * 20)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        dkv.prefill_text(llm, DOCUMENT, limit=1)


# Scores.


@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum", "lsht"])
def test_few_shot_answers_are_scored_on_their_first_line(task: str) -> None:
    one = example(task, answers=["Location"], all_classes=["Food", "Location"])
    assert score(one, "\n\nLocation\nFood and much else") == pytest.approx(1.0, abs=1e-6)
    assert score(one, "Food\nLocation") == 0.0


def test_other_answers_are_scored_whole_and_against_every_truth() -> None:
    assert score(example(answers=["Mr Lind", "Ms Okafor"]), "well:\nMs Okafor") == pytest.approx(
        0.8
    )


def test_chinese_answers_are_segmented() -> None:
    one = example("dureader", answers=["港口建于1911年。"])
    assert score(one, "港口建于1911年") > 0.6
    assert score(example("multifieldqa_zh", answers=["港口建于1911年。"]), "港口建于1911年") == 1.0
    assert score(example("passage_retrieval_zh", answers=["段落7"]), "段落7") == 1.0
    lsht = example("lsht", answers=["体育"], all_classes=["体育", "文化"])
    assert score(lsht, "体育\n文化") == 1.0


def test_ruler_answers_need_all_texts_or_one() -> None:
    outputs = ["Okafor", "Lind"]
    assert score(example("vt", ruler=True, answers=outputs), "okafor") == 0.5
    assert score(example("qa_1", ruler=True, answers=outputs), "okafor") == 1.0


# Runs and tables.


def measured(llm: dkv.LoadedModel, tmp_path: Path) -> list[dict[str, Any]]:
    lines = [{**LINE, "_id": str(n), "context": DOCUMENT + str(n)} for n in range(3)]
    chinese = {**LINE, "context": "港口建于1911年。" * 40, "answers": ["1911年"]}
    write(tmp_path, qasper=lines, multifieldqa_zh=[chinese], niah_single_1=[RULER])
    protocol = Protocol.official(max_new_tokens=4, max_length=120)
    experiment = LongBenchExperiment(llm, read_tasks(tmp_path), protocol)
    methods = methods_at(["FullKV", "H2O", "SnapKV", "DynamicKV"], [24, 32])
    for _ in run(experiment, methods, Journal(tmp_path / "results" / "r.jsonl")):
        pass
    return rows_of(Journal(tmp_path / "results" / "r.jsonl"), experiment.units())


@pytest.fixture(scope="module")
def rows(llm: dkv.LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("longbench")
    (folder / "results").mkdir()
    return measured(llm, folder)


def test_every_example_is_answered_by_every_method_from_the_cut_prompt(
    llm: dkv.LoadedModel, rows: list[dict[str, Any]]
) -> None:
    assert [row["unit"]["task"] for row in rows] == [
        *["qasper"] * 3,
        "multifieldqa_zh",
        "niah_single_1",
    ]
    for row in rows:
        assert row["truncated"]
        assert row["prompt_tokens"] <= 130
        assert len(row["runs"]) == 7
    prompt = Protocol.official().prompt(
        example(fields={"context": DOCUMENT + "0", "input": LINE["input"]})
    )
    read = dkv.prefill_text(llm, prompt, limit=120)
    trace = dkv.compare(llm, prefill=read, methods=[dkv.DynamicKV(capacity=24)], max_new_tokens=4)
    answers = {(r["method"], r["parameters"].get("capacity")): r["answer"] for r in rows[0]["runs"]}
    assert answers["DynamicKV", 24] == trace.runs[0].answer


def test_the_summary_averages_tasks_not_examples(rows: list[dict[str, Any]]) -> None:
    marked = json.loads(json.dumps(rows))
    for row in marked:
        for one in row["runs"]:
            one["score"] = float(row["unit"]["task"] == "qasper")
    for line in longbench_summary(marked):
        assert line["tasks"]["qasper"] == {"score": 1.0, "interval": [1.0, 1.0], "examples": 3}
        assert line["average"] == pytest.approx(1 / 3)
        assert line["kv_bytes"] > 0


def test_tables_show_the_papers_rows_beside_ours(rows: list[dict[str, Any]]) -> None:
    summary = longbench_summary(rows)
    table = tables.longbench_table(summary)
    blocks = table.split("\n\n")
    assert [block.splitlines()[0].split(":")[0] for block in blocks] == [
        "capacity 24",
        "capacity 32",
        "qasper",
        "the paper",
    ]
    for block in blocks[:2]:
        names = [line.split()[0] for line in block.splitlines()[2:]]
        assert names == ["FullKV", "H2O", "SnapKV", "DynamicKV"]
        assert "qasper" in block.splitlines()[1]
    lengths = [row["prompt_tokens"] for row in rows if row["unit"]["task"] == "qasper"]
    assert f"qasper: prompts of {min(lengths)} to {max(lengths)} tokens" in blocks[2]
    assert "paper: Llama-3-8B-Instruct, 512" in blocks[3]
    assert "40.73" in blocks[3]
    assert "here: 2 tasks, 24" in blocks[3]
    lines = list(csv.DictReader(io.StringIO(tables.longbench_csv(summary))))
    assert len(lines) == 7 * 4
    assert {line["task"] for line in lines} == {
        "qasper",
        "multifieldqa_zh",
        "niah_single_1",
        "average",
    }


def test_rulers_scores_do_not_stand_beside_the_papers() -> None:
    line = {"tasks": {"niah_single_1": {"score": 1.0}}, "method": "FullKV", "capacity": None}
    assert tables.longbench_paper_lines([line]) == []
    mixed = {**line, "tasks": {**line["tasks"], "qasper": {"score": 0.25}}}
    assert tables.longbench_paper_lines([mixed])[-1][:2] == ["here: 1 task, whole cache", "25.00"]


def test_an_answer_longer_than_the_model_is_refused(llm: dkv.LoadedModel) -> None:
    with pytest.raises(ValueError, match="2048 tokens leaves no room"):
        LongBenchExperiment(llm, [example()], Protocol.official(max_new_tokens=2048))
