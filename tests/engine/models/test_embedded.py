"""The embedded model, for real: SmolLM2-135M, 30 layers, 9 query heads, 3 KV heads."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import dynamickv as dkv
from dynamickv.reading.prompt import encode_prompt
from tests.engine.reading.test_prompt import SPELLED, TEXTS, touching, true_spans
from tests.engine.tiny import DOCUMENT, QUESTION

pytestmark = pytest.mark.model

REPORT = """The island of Skarholm lies an hour off the coast. About ninety people live there all
year, most of them on the south side, where the wind is kinder. The ferry leaves the mainland at
6:40 every morning except Sunday. Tickets cost 14 crowns and are sold by Ingrid Dahl in the blue
kiosk beside the fish market. The school has eleven pupils and one teacher, Tomas Berg, who also
runs the library. The shop closes at five. In winter the bay freezes for a few weeks, and the post
comes by sled."""
ASKED = "Who sells the tickets for the ferry?"


@pytest.fixture(scope="module")
def embedded() -> dkv.LoadedModel:
    return dkv.load_model(device="cpu", precision="exact")


@pytest.fixture(scope="module")
def read(embedded: dkv.LoadedModel) -> dkv.Prefill:
    return dkv.prefill(embedded, REPORT, ASKED)


def test_its_geometry_is_smollm2s(embedded: dkv.LoadedModel) -> None:
    assert embedded.geometry == dkv.Geometry(
        num_layers=30, num_query_heads=9, num_kv_heads=3, head_dim=64, max_positions=8192
    )
    assert embedded.name == "smollm2-135m"
    assert (embedded.dtype, embedded.attention) == ("float32", "sdpa")
    assert embedded.tokenizer.convert_ids_to_tokens(sorted(embedded.stop_ids)) == ["<|im_end|>"]


@pytest.mark.slow
def test_full_kv_decodes_exactly_like_generate(
    embedded: dkv.LoadedModel, read: dkv.Prefill
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        embedded.model.config._name_or_path, dtype=torch.float32, attn_implementation="sdpa"
    )
    prompt = torch.tensor([read.prompt.token_ids])
    with torch.inference_mode():
        logits = plain(prompt, use_cache=True, logits_to_keep=1).logits[0, -1]
        expected = plain.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )[0, prompt.shape[1] :]
    assert torch.equal(read.logits, logits)
    methods = [dkv.FullKV(), dkv.DynamicKV(capacity=read.length), dkv.SnapKV(capacity=8192)]
    for run in dkv.compare(embedded, prefill=read, methods=methods, max_new_tokens=12).runs:
        assert run.token_ids == expected.tolist()
        assert "".join(run.pieces) == run.answer


def test_dynamickv_gives_layers_different_budgets_within_the_capacity(
    embedded: dkv.LoadedModel, read: dkv.Prefill
) -> None:
    trace = dkv.compare(
        embedded, prefill=read, methods=[dkv.DynamicKV(capacity=48)], max_new_tokens=1
    )
    (run,) = trace.runs
    assert [len(update) for update in run.budget_history] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert sum(run.budgets) <= 48 * 30
    assert max(run.budgets) > 2 * min(run.budgets)
    assert run.kv_bytes == sum(run.budgets) * 3 * 64 * 2 * 4


@pytest.mark.slow
def test_serving_keeps_what_exploring_keeps(embedded: dkv.LoadedModel, read: dkv.Prefill) -> None:
    method = dkv.DynamicKV(capacity=48)
    explored = dkv.compare(embedded, prefill=read, methods=[method], max_new_tokens=8).runs[0]
    prompt = torch.tensor([read.prompt.token_ids])
    with dkv.compress(embedded.model, method) as cache, torch.inference_mode():
        output = embedded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
        )
    assert output[0, prompt.shape[1] :].tolist() == explored.token_ids
    assert cache.retention().budgets == explored.budgets


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_its_tokens_are_located_exactly(embedded: dkv.LoadedModel, text: str) -> None:
    prompt = encode_prompt(embedded.tokenizer, text, QUESTION, limit=8192)
    spans = true_spans(embedded.tokenizer, prompt)
    assert prompt.offsets == spans
    start = prompt.text.index(text)
    assert prompt.document_span == touching(spans, start, start + len(text))


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("a\n\n1. item", [81, 1116, 33, 30, 5033]),
        ("line\n    42", [1311, 2367, 36, 34]),
    ],
)
def test_white_space_before_digits_is_one_token(
    embedded: dkv.LoadedModel, text: str, token_ids: list[int]
) -> None:
    """GPT-2's rule gives 198 198 and 472 216 in its place."""
    assert embedded.tokenizer(text)["input_ids"] == token_ids


@pytest.mark.parametrize("text", SPELLED)
def test_special_tokens_spelled_by_the_user_are_plain_text(
    embedded: dkv.LoadedModel, text: str
) -> None:
    prompt = encode_prompt(embedded.tokenizer, DOCUMENT + text, text, limit=8192)
    users = prompt.token_ids[prompt.document_span[0] : prompt.question_span[1]]
    assert not set(users) & set(embedded.tokenizer.all_special_ids)
    assert f"{DOCUMENT}{text}\n\n{text}" in prompt.text


def test_its_prompt_is_its_chat_template(embedded: dkv.LoadedModel) -> None:
    prompt = encode_prompt(embedded.tokenizer, DOCUMENT, QUESTION, limit=8192)
    assert prompt.token_ids == embedded.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}],
        add_generation_prompt=True,
        return_dict=False,
    )
