"""Several prompts as rows of one batch against one by one: python -m benchmarks.batch

Both compress while they read and answer with transformers' own generate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import dynamickv as dkv
from benchmarks import readme
from benchmarks.prompts import prompt_of
from benchmarks.report import Row, machine, measured, publish

ROWS, LONGEST, NEW, CAPACITY = 8, 2048, 64, 128
ROUNDS = 3
SHORTER = 16
"""Tokens by which each row is shorter than the one before, so that all but one are padded."""


def measure(llm: dkv.LoadedModel) -> list[Row]:
    """Decoded tokens per second, rows together over one by one, in rounds."""
    ids = prompt_of(llm, LONGEST).token_ids
    prompts = [ids[SHORTER * row :] for row in range(ROWS)]
    padded = torch.tensor([[0] * (LONGEST - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (LONGEST - len(row)) + [1] * len(row) for row in prompts])
    together, apart = [], []
    for _ in range(ROUNDS):
        together.append(decode_seconds(llm, padded, mask))
        apart.append(sum(decode_seconds(llm, torch.tensor([row])) for row in prompts))
    ratios = [alone / joint for alone, joint in zip(apart, together, strict=True)]
    of = f"{ROWS} prompts of {LONGEST // 1024}K, DynamicKV({CAPACITY})"
    rates = [ROWS * (NEW - 1) / seconds for seconds in together]
    return [
        measured(f"tokens per second, rows over one by one, {of}", ratios, "", ">= 2.5"),
        measured(f"tokens per second as rows, {of}", rates, "tokens/s"),
    ]


@torch.inference_mode()
def decode_seconds(
    llm: dkv.LoadedModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> float:
    """Seconds of decoding, without the prompt's pass."""
    mask = torch.ones_like(ids) if mask is None else mask

    def timed(tokens: int) -> float:
        settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with dkv.compress(llm.model, dkv.DynamicKV(capacity=CAPACITY)) as cache:
            clock = Clock()
            llm.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[clock],
                **settings,
            )
        return clock.since_first()

    return timed(NEW)


class Clock:
    """A logits processor that changes nothing and looks at the clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(self._now())
        return scores

    def since_first(self) -> float:
        """Seconds from the first token's choice to the last one's."""
        return self.times[-1] - self.times[0]


def main() -> None:
    """Measure, print, write benchmarks/results/batch.json and the tables of docs/measured.md."""
    where = machine()
    publish("batch", where, measure(dkv.load_model()))
    readme.main()


if __name__ == "__main__":
    main()
