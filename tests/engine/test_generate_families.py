"""Ways to call `generate` on models whose layers are of several kinds, share keys, or mix heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynamickv as dkv
from benchmarks.coverage.check import letters
from benchmarks.coverage.tiny import tiny_model, tiny_prompt
from tests.engine.models.test_coverage import EXACT as KINDS
from tests.engine.models.test_coverage import known
from tests.engine.test_generate_modes import ANSWER, left_padded, plain


@torch.inference_mode()
def logits(name: str, method: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the answer's tokens, (tokens, rows, vocabulary)."""
    model = tiny_model(name)
    with dkv.compress(model, method) as cache:
        output = model.generate(
            **inputs,
            past_key_values=cache,
            output_logits=True,
            return_dict_in_generate=True,
            **ANSWER,
        )
    return torch.stack(output.logits)


IN_ROWS = [
    *KINDS.values(),
    "diffllama",
    "gemma4_unified",
    "inkling_text",
    "inkling2_text",
    "kimi_linear",
    "zamba2",
]
"""One model of every kind of layer, and what else differs by row."""
READING = {"SnapKV": dkv.SnapKV(capacity=24), "H2O": dkv.H2O(capacity=24)}
"""One method that reads the last queries, one that reads all."""


@pytest.mark.parametrize("method", READING.values(), ids=READING)
@pytest.mark.parametrize("name", IN_ROWS)
def test_rows_of_unlike_length_answer_as_each_alone(
    name: str, method: dkv.CompressionMethod
) -> None:
    rows = [tiny_prompt(length, seed=length) for length in (61, 20, 3)]
    together = logits(known(name), method, left_padded(rows))
    for number, row in enumerate(rows):
        alone = logits(name, method, plain(row))
        torch.testing.assert_close(together[:, number], alone[:, 0], rtol=1e-3, atol=1e-4)


def test_a_state_that_starts_anew_is_fed_one_token_at_a_time_or_refused() -> None:
    model, row = tiny_model("jamba"), tiny_prompt(61)
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="leave out prefill_chunk_size"),
    ):
        model.generate(**plain(row), past_key_values=cache, prefill_chunk_size=17, **ANSWER)


def test_a_question_after_the_document_reaches_a_state_that_starts_anew() -> None:
    llm = dkv.LoadedModel.wrap(tiny_model("jamba"), letters(), "jamba", "tiny")
    document, question = "The harbour was built in 1911 and painted green.", "When?"
    runs = [
        dkv.compare(
            llm, document, question, methods=[dkv.FullKV()], max_new_tokens=8, question_aware=aware
        ).runs[0]
        for aware in (True, False)
    ]
    assert runs[0].token_ids == runs[1].token_ids
    torch.testing.assert_close(torch.tensor(runs[0].logprobs), torch.tensor(runs[1].logprobs))


REFUSED = {
    "falcon_h1": {"head_budgets": "adaptive"},
    "zamba2": {"head_budgets": "adaptive"},
    "deepseek_v3": {"granularity": "query_head"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_choice_that_a_cache_cannot_hold_is_refused_everywhere(name: str) -> None:
    method = dkv.SnapKV(capacity=24, **REFUSED[name])
    (parameter,) = REFUSED[name]
    llm = dkv.LoadedModel.wrap(tiny_model(name), letters(), name, "tiny")
    with pytest.raises(ValueError, match=f"^{parameter}="), dkv.compress(llm.model, method):
        pass
    with pytest.raises(ValueError, match=f"^{parameter}="):
        dkv.compare(llm, "The harbour was built in 1911.", "When?", methods=[method])
    prefill = dkv.prefill(llm, "The harbour was built in 1911.", "When?")
    with pytest.raises(ValueError, match=f"^{parameter}="):
        dkv.preview(method, prefill)
    with pytest.raises(ValueError, match=f"^{parameter}="):
        dkv.Conversation(llm, prefill, method)


def test_text_attention_outside_of_the_registry_is_refused_before_any_work() -> None:
    with (
        pytest.raises(ValueError, match=r"in code of its own, .*; choose another model"),
        dkv.compress(tiny_model("git"), dkv.SnapKV(capacity=24)),
    ):
        pytest.fail("the block was entered")
