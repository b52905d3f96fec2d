"""One model of every kind of layer, by the checks of `python -m benchmarks.coverage`; and that
these checks see what is wrong."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import dynamickv as dkv
from benchmarks.coverage import page
from benchmarks.coverage.__main__ import RECORD, entries
from benchmarks.coverage.check import (
    CAPACITY,
    CHECKED,
    PROMPT,
    WINDOW,
    distance,
    examine,
    generate,
    reference_run,
)
from benchmarks.coverage.families import APART, POPULAR, WRAPPERS
from benchmarks.coverage.pool import work
from benchmarks.coverage.tiny import NAMES, tiny_model, tiny_prompt

EXACT = {
    "full attention": "llama",
    "sliding windows": "gemma3_text",
    "chunked attention": "llama4_text",
    "linear attention": "qwen3_next",
    "convolutions": "lfm2",
    "state spaces": "jamba",
    "attention beside a state": "falcon_h1",
    "layers without attention": "nemotron_h",
    "shared keys and values": "gemma3n_text",
    "sizes by layer": "gemma4_text",
    "a latent": "deepseek_v3",
    "learned sinks": "gpt_oss",
    "capped logits": "gemma2",
    "a class without the flag": "stablelm",
}
REFUSED = {
    "indexed attention": "deepseek_v32",
    "a cache class of its own": "minimax",
    "images in some layers": "mllama",
    "no attention": "mamba",
    "attention that is not registered": "bloom",
}


def recorded() -> dict[str, Any]:
    """The last full run."""
    record: dict[str, Any] = json.loads(RECORD.read_text("utf-8"))
    return record


def known(name: str) -> str:
    """The name; skips where this transformers does not know it."""
    if name not in CONFIG_MAPPING or name not in NAMES:
        pytest.skip(f"this transformers has no {name}")
    return name


@pytest.mark.parametrize("name", EXACT.values(), ids=EXACT)
def test_a_model_with(name: str) -> None:
    verdict = examine(known(name))
    assert (verdict.verdict, verdict.reason, verdict.note) == ("exact", "", "")


@pytest.mark.parametrize("name", REFUSED.values(), ids=REFUSED)
def test_one_sentence_refuses_a_model_with(name: str) -> None:
    verdict = examine(known(name))
    assert verdict.verdict == "refused", verdict.reason
    assert verdict.reason.count("\n") == 0


def test_a_method_that_does_not_follow_attention_is_found_out() -> None:
    recent = dkv.StreamingLLM(capacity=CAPACITY)
    verdict = examine("llama", {CHECKED: recent})
    assert verdict.verdict == "wrong"
    assert "of what attention asks for" in verdict.reason


def test_a_method_that_keeps_everything_is_found_out() -> None:
    verdict = examine("llama", {CHECKED: dkv.SnapKV(capacity=2 * PROMPT, window_size=WINDOW)})
    assert verdict.verdict == "wrong"
    assert "nothing was compressed" in verdict.reason


@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "deepseek_v3", "gpt_oss"])
def test_the_reference_is_the_model_until_it_hides_something(name: str) -> None:
    ids = tiny_prompt(PROMPT)
    own = generate(tiny_model(known(name)), ids)
    same = reference_run(name, ids, own.sequences, {})
    assert distance(same.logits, own.logits) < 1e-5
    seen = same.reference.weights
    hidden = torch.zeros(1, PROMPT, dtype=torch.bool)
    hidden[:, : PROMPT // 2] = True
    masked = reference_run(name, ids, own.sequences, dict.fromkeys(seen, hidden))
    assert distance(masked.logits[:1], own.logits[:1]) < 1e-5
    assert distance(masked.logits[1:], own.logits[1:]) > 1e-3


def test_recorded_weights_are_those_that_the_model_returns() -> None:
    ids = tiny_prompt(PROMPT)
    run = reference_run("llama", ids, ids, {}, new=1)
    eager = tiny_model("llama", attention="eager")
    with torch.no_grad():
        weights = eager(ids, output_attentions=True).attentions
    for place, rows in run.reference.weights.items():
        torch.testing.assert_close(rows, weights[place][0, :, -WINDOW:])


def test_weights_of_a_model_with_sinks_leave_their_share_out() -> None:
    ids = tiny_prompt(PROMPT)
    run = reference_run(known("gpt_oss"), ids, ids, {}, new=1)
    shares = torch.stack([rows.sum(dim=-1) for rows in run.reference.weights.values()])
    assert shares.min() < 0.5
    assert shares.max() < 1.0001


def test_a_crash_or_a_hang_costs_one_name() -> None:
    script = (
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    name = line.strip()\n"
        "    if name == 'crash': os.abort()\n"
        "    if name == 'hang': time.sleep(600)\n"
        "    print(json.dumps({'name': name}), flush=True)\n"
    )
    answers: dict[str, Any] = {}
    names = ["one", "crash", "two", "hang", "three"]
    work([sys.executable, "-c", script], names, answers.__setitem__, workers=1, limit=8)
    assert answers["crash"]["crash"] == "the process ended with SIGABRT"
    assert answers["hang"]["crash"] == "no answer within the time limit"
    assert [answers[name] for name in ("one", "two", "three")] == [
        {"name": name} for name in ("one", "two", "three")
    ]


def test_the_tables_name_entries_of_the_mapping() -> None:
    assert set(APART).isdisjoint(WRAPPERS)
    assert {*POPULAR, *WRAPPERS.values()}.isdisjoint({*APART, *WRAPPERS})
    assert len(set(POPULAR)) == len(POPULAR) == 62
    if version("transformers") == recorded()["machine"]["transformers"]:  # others lack some
        assert {*APART, *WRAPPERS, *WRAPPERS.values(), *POPULAR} <= set(NAMES)


def test_every_entry_is_in_the_record() -> None:
    record = recorded()
    if version("transformers") != record["machine"]["transformers"]:
        pytest.skip("the record is of another transformers")
    assert set(record["here"]) == {*entries(), *WRAPPERS}


def test_the_page_is_what_the_record_says() -> None:
    record = recorded()
    assert page.PAGE.read_text("utf-8") == page.text(record)
    verdicts = {answer["verdict"] for answer in record["here"].values()}
    assert verdicts.isdisjoint({"wrong", "error", "crash"})


def test_tiny_models_are_tiny_and_the_same_every_time() -> None:
    one, other = tiny_model("qwen3_next"), tiny_model("qwen3_next")
    assert sum(parameter.numel() for parameter in one.parameters()) < 1e6
    for name, parameter in one.state_dict().items():
        assert torch.equal(parameter, other.state_dict()[name]), name
