"""Ways to call `generate` on models whose layers are of several kinds, share keys, or mix heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynamickv as dkv
from benchmarks.coverage.tiny import tiny_model, tiny_prompt
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


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text", "diffllama", "falcon_h1"])
def test_rows_of_unlike_length_answer_as_each_alone(name: str) -> None:
    rows = [tiny_prompt(length, seed=length) for length in (61, 20, 3)]
    together = logits(name, dkv.SnapKV(capacity=24), left_padded(rows))
    for number, row in enumerate(rows):
        alone = logits(name, dkv.SnapKV(capacity=24), plain(row))
        torch.testing.assert_close(together[:, number], alone[:, 0], rtol=1e-3, atol=1e-4)
