"""The Learn tab's numbers are computed again here, from the records' bits and with the engine; its
texts are short, its links lead somewhere, and what they claim is in the records.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen2ForCausalLM

import dynamickv as dkv
from app.components.base import STATIC
from app.examples import ASSETS, load_examples
from app.learn import MODELS, Lesson, lesson_routes, load_lessons
from app.learn.lessons import token_span
from app.learn.view_model import (
    fill,
    lesson_payload,
    pair_numbers,
    pair_payload,
    survival,
    told_numbers,
    updates,
)
from app.views.questions import render_questions
from benchmarks.record_lessons import behind
from dynamickv.record.trace import Run, Trace

MOST_WORDS = 80
SECTIONS = ("cache", "grows", "attended", "fixed", "budget", "lost")
LESSONS = load_lessons()
TEMPLATE = (STATIC / "learn.html").read_text(encoding="utf-8")
every_lesson = pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.id)


class Reader(HTMLParser):
    """The template as the tests need it: attributes of all tags, and the words of each section."""

    def __init__(self, numbers: dict[str, str]) -> None:
        super().__init__()
        self.numbers = numbers
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.section = ""
        self.telling = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "section":
            self.section = found.get("id") or ""
        self.telling = self.telling or "data-words" in found
        if self.telling and "data-number" in found:
            self.handle_data(f" {self.numbers[str(found['data-number'])]} ")

    def handle_endtag(self, tag: str) -> None:
        self.telling = self.telling and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.telling:
            self.words.setdefault(self.section, []).append(data)

    def all(self, attribute: str) -> list[str]:
        return [str(found[attribute]) for _, found in self.tags if attribute in found]


def read(numbers: dict[str, str]) -> Reader:
    reader = Reader(numbers)
    reader.feed(TEMPLATE)
    return reader


def kept(run: Run, trace: Trace) -> np.ndarray:
    """Boolean (layers, heads, positions), read from the bits without the engine."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(run.retained.bits), np.uint8))
    shape = (trace.model.num_layers, run.retained.heads, trace.prompt.length)
    return bits[: np.prod(shape)].reshape(shape).astype(bool)


def text_of(trace: Trace, first: int, last: int) -> str:
    """The prompt's text from one token to another."""
    units = trace.prompt.text.encode("utf-16-le")
    start, end = trace.prompt.text_utf16_offsets[first][0], trace.prompt.text_utf16_offsets[last][1]
    return units[2 * start : 2 * end].decode("utf-16-le")


def best_tokens(lesson: Lesson, layer: int, count: int = 42) -> set[int]:
    """The best-scored positions of a layer behind the first tokens."""
    prefix = lesson.trace.prompt.length - lesson.method.window_size
    table = np.frombuffer(base64.b64decode(lesson.behind["log_scores"]), np.uint8)
    row = table.reshape(lesson.trace.model.num_layers, prefix)[layer]
    return set((np.argsort(row[4:], kind="stable")[:count] + 4).tolist())


# ---- texts ----


@every_lesson
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_has_at_most_80_words(section: str, lesson: Lesson) -> None:
    words = " ".join(read(told_numbers(lesson)).words[f"learn-{section}"]).split()
    assert 40 < len(words) <= MOST_WORDS, len(words)


def test_a_section_has_one_figure_and_one_control() -> None:
    parts = dict(re.findall(r'<section class="dkv-lesson[^"]*" id="learn-(\w+)"(.*?)</section>',
                            TEMPLATE, re.DOTALL))  # fmt: skip
    for name in SECTIONS:
        assert parts[name].count("data-figure=") == 1
        assert parts[name].count("dkv-lesson-control") == 1
        assert "<details" in parts[name], "the maths is collapsed"


def test_every_word_asked_for_is_explained_and_every_number_known() -> None:
    numbers = told_numbers(LESSONS["needle"])
    reader = read(numbers)
    assert set(reader.all("data-term")) <= set(reader.all("data-entry"))
    assert set(reader.all("data-number")) <= set(numbers)
    payload = pair_payload()
    assert payload is not None
    assert set(reader.all("data-pair")) <= set(payload["numbers"])


def test_links_lead_somewhere() -> None:
    reader = read(told_numbers(LESSONS["needle"]))
    ids = set(reader.all("id"))
    readme = (ASSETS.parent / "README.md").read_text(encoding="utf-8")
    for href in reader.all("href"):
        if href.startswith("#"):
            assert href[1:] in ids
            continue
        assert href.startswith(("https://arxiv.org/abs/", "?")), href
        assert href == "?" or href in readme
    for lesson in LESSONS.values():
        assert lesson.example in load_examples()
        for point in lesson.notes["point"]:
            assert f"learn-{point['at']}" in ids
    assert {f"learn-{name}" for name in SECTIONS} <= ids
    for labelled in reader.all("aria-labelledby"):
        assert labelled in ids


@every_lesson
def test_teacher_s_notes_are_whole(lesson: Lesson) -> None:
    notes = fill(lesson.notes, told_numbers(lesson))
    assert not re.search(r"\{\w", json.dumps(notes))
    assert len(notes["point"]) >= 3
    assert len(notes["questions"]) >= 4
    assert all(item["ask"].endswith("?") and item["answer"] for item in notes["questions"])


def test_a_note_with_an_unknown_number_is_an_error() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        fill(["{nonsense}"], {"tokens": "1"})


# ---- numbers ----


@every_lesson
def test_updates_are_what_the_engine_did(lesson: Lesson) -> None:
    run = lesson.trace.run("DynamicKV")
    steps = updates(lesson)
    assert [step["budgets"] for step in steps] == run.budget_history
    mean, layers = lesson.method.mean_budget, lesson.trace.model.num_layers
    for step in steps:
        seen = len(step["counts"])
        assert sum(step["counts"]) == mean * run.retained.heads * seen
        assert sum(step["budgets"]) == mean * layers
        assert step["excess"] == sum(step["claims"]) / (mean * layers)
    # A cut is final: a layer ends with the least it was ever allowed.
    prefix = lesson.trace.prompt.length - lesson.method.window_size
    first = min(int(lesson.method.r_max * mean), prefix)
    for layer in range(layers):
        least = min([first, *(row[layer] for row in run.budget_history if layer < len(row))])
        assert run.budgets[layer] == least + lesson.method.window_size


@every_lesson
def test_evidence_is_found_and_its_survival_counted(lesson: Lesson) -> None:
    trace = lesson.trace
    for passage, (first, last) in zip(lesson.evidence, lesson.spans, strict=True):
        assert passage in text_of(trace, first, last)
        assert passage not in text_of(trace, first + 1, last)
        assert passage not in text_of(trace, first, last - 1)
    numbers = told_numbers(lesson)
    for run in trace.runs:
        mask = kept(run, trace)
        inside = np.concatenate([mask[:, :, a : b + 1] for a, b in lesson.spans], axis=2)
        expected = [float(layer.sum() / layer.size) for layer in inside]
        assert survival(run, trace, lesson.spans) == pytest.approx(expected)
        assert numbers[f"survives_{run.method.lower()}"] == str(int(inside.any(axis=(1, 2)).sum()))


def test_a_passage_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in the recorded document"):
        token_span(LESSONS["needle"].trace, "no such passage")


@every_lesson
def test_told_numbers_follow_from_the_record(lesson: Lesson) -> None:
    trace, numbers = lesson.trace, told_numbers(lesson)
    ours, full = trace.run("DynamicKV"), trace.run("FullKV")
    mask = kept(ours, trace)
    counts = mask[:, 0].sum(axis=1)
    assert numbers["tokens"] == f"{trace.prompt.length:,}"
    assert ours.budgets == counts.tolist()
    assert numbers["most"] == f"{counts.max():,}"
    assert numbers["most_layer"] == str(counts.argmax())
    assert numbers["least"] == f"{counts.min():,}"
    assert numbers["least_layer"] == str(counts.argmin())
    assert numbers["kept"] == f"{100 * mask.mean():.1f} %" if mask.mean() < 0.2 else True
    per_token = 2 * 30 * 3 * 64 * 4  # keys and values, layers, KV heads, head size, float32
    assert full.kv_bytes == per_token * trace.prompt.length
    assert numbers["per_token"] == f"{per_token / 1024:.1f} KiB"
    assert numbers["total"] == f"{(lesson.method.capacity - 8) * 30:,}"
    first, window, tenth = np.array(lesson.behind["attention"]).mean(axis=0)
    assert numbers["to_first"] == f"{100 * first:.0f} %"
    assert numbers["to_tenth"] == f"{100 * tenth:.0f} %"
    assert 0 < 1 - first - window - tenth < 1


@every_lesson
def test_fine_scores_are_those_of_the_record(lesson: Lesson) -> None:
    trace = lesson.trace
    scores = trace.run("DynamicKV").scores
    assert scores is not None
    prefix = trace.prompt.length - lesson.method.window_size
    recorded = scores.unpack(30, trace.prompt.length)[:, :prefix].astype(float)
    fine = np.frombuffer(base64.b64decode(lesson.behind["log_scores"]), np.uint8)
    restored = 255 * 2.0 ** (-fine.reshape(30, prefix).astype(float) / 8)
    # An eighth of a halving and a 255th of the highest: both records round.
    assert np.all(np.abs(restored - recorded) <= 0.05 * recorded + 0.51)


@every_lesson
def test_a_lesson_keeps_what_the_example_s_own_run_keeps(lesson: Lesson) -> None:
    """So that "Show it in Explore" shows the same."""
    example = load_examples()[lesson.example].trace
    assert example is not None
    assert lesson.trace.prompt == example.prompt
    for run in example.runs:
        ours = lesson.trace.run(run.method)
        assert ours.answer == run.answer
        assert ours.retained == run.retained
        # Settings that are newer than the example's record have their defaults.
        assert run.parameters.items() <= ours.parameters.items()


def test_two_questions_share_the_document_and_the_settings() -> None:
    plan = json.loads((ASSETS / "lessons" / "records.json").read_text())["question"]
    first = Trace.load(ASSETS / "runs" / f"{plan['example']}.json.gz")
    second = Trace.load(ASSETS / "lessons" / "question.json.gz")
    assert second.prompt.question == plan["question"] != first.prompt.question
    assert second.prompt.document_span == first.prompt.document_span
    one, other = first.run("DynamicKV"), second.run("DynamicKV")
    assert one.parameters.items() <= other.parameters.items()
    start, end = first.prompt.document_span
    a, b = kept(one, first)[:, :, start:end], kept(other, second)[:, :, start:end]
    numbers = pair_numbers(first, second)
    assert numbers["both"] == f"{100 * (a & b).sum() / (a | b).sum():.0f} %"
    gained = sum(max(0, y - x) for x, y in zip(one.budgets, other.budgets, strict=True))
    lost = sum(max(0, x - y) for x, y in zip(one.budgets, other.budgets, strict=True))
    assert numbers["moved"] == f"{(gained + lost) // 2:,}"
    figure = render_questions(first, second).to_json()
    assert [bar["x"] for bar in figure["data"]] == [one.budgets, other.budgets]


# ---- claims that the texts make ----


def test_what_the_lessons_say_is_in_their_records() -> None:
    needle, summary, code = (LESSONS[name] for name in ("needle", "summary", "code"))
    holds = {
        run.method: sum(survival(run, needle.trace, needle.spans)) for run in needle.trace.runs
    }
    assert holds.pop("StreamingLLM") == 0
    assert min(holds.values()) > 0
    for method in ("PyramidKV", "DynamicKV"):
        answer = needle.trace.run(method).answer
        assert "painting" in answer
        assert "goose" not in answer
    assert "goose" in needle.trace.run("SnapKV").answer
    evidence = set(range(needle.spans[0][0], needle.spans[0][1] + 1))
    assert not evidence & best_tokens(needle, 5)
    words = [
        text_of(needle.trace, token, token) for token in sorted(evidence & best_tokens(needle, 15))
    ]
    assert "is hidden behind the painting" in "".join(words)
    assert told_numbers(summary)["evidence_streamingllm"] == "100 %"
    assert [
        code.trace.run(m).answer.endswith(" 60.") for m in ("FullKV", "SnapKV", "PyramidKV")
    ] == [
        True,
        True,
        False,
    ]
    best = best_tokens(code, 21)
    first, last = code.trace.prompt.question_span
    assert len(best & set(range(first, last))) > 4
    assert not best & set(range(code.spans[0][0], code.spans[0][1] + 1))


def test_snapkv_stays_closer_to_fullkv_in_all_three() -> None:
    for lesson in LESSONS.values():
        snap, ours = (lesson.trace.run(name).agreement for name in ("SnapKV", "DynamicKV"))
        assert snap is not None
        assert ours is not None
        assert snap.rouge_l > ours.rouge_l


def test_much_of_the_shape_belongs_to_the_model() -> None:
    budgets = [lesson.trace.run("DynamicKV").budgets for lesson in LESSONS.values()]
    assert np.corrcoef(budgets).min() > 0.8


# ---- the calculator ----


def test_the_calculator_agrees_with_measured_bytes() -> None:
    ours = next(model for model in MODELS if model.name.startswith("SmolLM2"))
    for lesson in LESSONS.values():
        info, full = lesson.trace.model, lesson.trace.run("FullKV")
        assert (ours.num_layers, ours.num_kv_heads, ours.head_dim, ours.num_query_heads) == (
            info.num_layers,
            info.num_kv_heads,
            info.head_dim,
            info.num_query_heads,
        )
        assert ours.cache_bytes(lesson.trace.prompt.length, 4) == full.kv_bytes_full
    llama = MODELS[0]
    assert llama.cache_bytes(8192, 2, 16) > 2 * llama.parameters, "as the needle's notes say"
    assert ours.max_positions == LESSONS["needle"].trace.model.max_positions


SIZES: dict[str, tuple[type, dict[str, Any]]] = {
    "Llama-3-8B-Instruct": (LlamaConfig, {"vocab_size": 128256, "intermediate_size": 14336}),
    "Mistral-7B-Instruct-v0.2": (MistralConfig, {"vocab_size": 32000, "intermediate_size": 14336}),
    "Qwen2-7B-Instruct": (Qwen2Config, {"vocab_size": 152064, "intermediate_size": 18944}),
    "InternLM2.5-7B-Chat-1M": (LlamaConfig, {"vocab_size": 92544, "intermediate_size": 14336}),
    "SmolLM2-135M-Instruct": (
        LlamaConfig,
        {"vocab_size": 49152, "intermediate_size": 1536, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_of_these_sizes_has_as_many_parameters(model: Any) -> None:
    config_class, rest = SIZES[model.name]
    config = config_class(
        num_hidden_layers=model.num_layers,
        hidden_size=model.num_query_heads * model.head_dim,
        num_attention_heads=model.num_query_heads,
        num_key_value_heads=model.num_kv_heads,
        **rest,
    )
    # Mistral has Llama's parameters; Qwen2 adds biases.
    build = Qwen2ForCausalLM if config_class is Qwen2Config else LlamaForCausalLM
    if config_class is MistralConfig:
        config = LlamaConfig(**config.to_dict() | {"model_type": "llama"})
    with torch.device("meta"):
        built = build(config)
    assert sum(weight.numel() for weight in built.parameters()) == model.parameters


# ---- what is served ----


def test_lessons_are_served_and_unknown_names_are_not() -> None:
    client = TestClient(Starlette(routes=lesson_routes()))
    index = client.get("/gradio_api/explorer/learn/index.json").json()
    assert [item["id"] for item in index["lessons"]] == ["needle", "summary", "code"]
    assert [item["name"] for item in index["models"]] == [model.name for model in MODELS]
    for item in index["lessons"]:
        served = client.get(f"/gradio_api/explorer/learn/{item['id']}.json").json()
        assert served == json.loads(json.dumps(lesson_payload(LESSONS[item["id"]])))
    assert client.get("/gradio_api/explorer/learn/pair.json").status_code == 200
    for name in ("nothing", "..%2Frecords", "question"):
        assert client.get(f"/gradio_api/explorer/learn/{name}.json").status_code == 404


def test_a_broken_lesson_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "lessons"
    folder.mkdir()
    (folder / "records.json").write_text('{"gone": {"example": "needle-3k"}}')
    assert load_lessons(tmp_path) == {}
    assert pair_payload(tmp_path) is None


@pytest.mark.slow
@pytest.mark.model
def test_the_model_gives_what_was_recorded_behind_a_lesson() -> None:
    lesson = LESSONS["summary"]
    example = load_examples()[lesson.example]
    llm = dkv.load_model(dkv.DEFAULT_MODEL, device="cpu", precision="exact")
    prefill = dkv.prefill(llm, example.document, example.question)
    found = behind(lesson.method, prefill.layers)
    np.testing.assert_allclose(found["attention"], lesson.behind["attention"], atol=1e-3)
    for again, recorded in zip(found["counts"], lesson.behind["counts"], strict=True):
        # Another processor rounds otherwise, and a score at the cut may change sides.
        np.testing.assert_allclose(again, recorded, atol=4)
    tables = [
        np.frombuffer(base64.b64decode(item["log_scores"]), np.uint8).astype(int)
        for item in (found, lesson.behind)
    ]
    assert np.abs(tables[0] - tables[1]).max() <= 1


def test_behind_files_are_small() -> None:
    for path in (ASSETS / "lessons").iterdir():
        assert path.stat().st_size < 160 * 1024, path.name
        if path.name.endswith(".behind.json.gz"):
            assert set(json.loads(gzip.decompress(path.read_bytes()))) == {
                "attention",
                "log_scores",
                "counts",
            }
