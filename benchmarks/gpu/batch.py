"""Eight prompts as rows of one batch: the memory held and the time per step, against the full cache
and against one prompt after the other."""

from __future__ import annotations

import torch
from transformers import DynamicCache, StoppingCriteriaList

import dynamickv as dkv
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.generate import Beats
from benchmarks.gpu.models import kv_bytes, prompt
from benchmarks.gpu.timing import free, synchronize

ROWS, STEPS, ROUNDS = 8, 32, 3
SHORTER = 16
"""Tokens by which each row is shorter than the one before, so that all but one are padded."""


@torch.inference_mode()
def batch(bench: Bench, llm: dkv.LoadedModel) -> None:
    """Bytes held and milliseconds per step of eight rows; the rounds take turns."""
    length = max(bench.long // 8, 160)
    ids = list(prompt(llm, length).token_ids)
    rows = [[0] * (SHORTER * row) + ids[SHORTER * row :] for row in range(ROWS)]
    mask = [[0] * (SHORTER * row) + [1] * (length - SHORTER * row) for row in range(ROWS)]
    padded = torch.tensor(rows, device=bench.device)
    seen = torch.tensor(mask, device=bench.device)
    ours, whole, alone, held = [], [], [], 0
    for _ in range(ROUNDS):
        with dkv.compress(llm.model, bench.method) as cache:
            ours.append(1000 * _step(llm, cache, padded, seen))
            held = cache.nbytes
        free()
        whole.append(1000 * _step(llm, DynamicCache(config=llm.model.config), padded, seen))
        free()
        with dkv.compress(llm.model, bench.method) as cache:
            alone.append(1000 * _step(llm, cache, padded[:1], seen[:1]))
        free()
    of = f"{ROWS} prompts of {length} tokens, generate"
    full = ROWS * kv_bytes(llm, length + STEPS)
    bench.add(f"{of}: DynamicKV's KV bytes / DynamicCache's", held / full)
    bench.add(f"{of} with DynamicKV", ours, "ms/step")
    bench.add(f"{of} with DynamicCache", whole, "ms/step")
    bench.add(
        f"{of}: DynamicKV / DynamicCache, per step",
        [own / theirs for own, theirs in zip(ours, whole, strict=True)],
        "x",
    )
    bench.add(
        f"{of}: tokens per second, rows over one by one",
        [ROWS * one / own for own, one in zip(ours, alone, strict=True)],
        "x",
        ">= 2.5",
    )


def _step(llm: dkv.LoadedModel, cache: object, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean seconds of a decoding step, without the prompt's pass."""
    beats = Beats()
    llm.model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([beats]),
    )
    synchronize()
    return beats.marks[-1].since(beats.marks[4]) / (len(beats.marks) - 5)
