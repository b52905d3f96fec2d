"""Pruned decoding and attention on the device against float32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

import dynamickv as dkv
from benchmarks.gpu.agreement import (
    cpu_twin,
    largest,
    largest_gap,
    logits_of,
    relative,
    same_tokens,
)
from benchmarks.gpu.answers import graph_logits, plain_answer
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import GEOMETRIES, ids_of, prompt
from benchmarks.gpu.timing import free
from dynamickv.cache import prune
from dynamickv.decoding.cuda_graph import DecodeGraph, fastest_ops, graphable
from dynamickv.decoding.decode_step import PlainOps, Slots
from dynamickv.reading.prefill import prefill_prompt

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
}


@torch.inference_mode()
def correctness(bench: Bench) -> None:
    """Every geometry, small, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in GEOMETRIES:
            small: dict[str, Any] = {"num_hidden_layers": 3} if bench.dry else SMALL
            # Small heads leave no room for chance: wide weights make attention sharp.
            llm = bench.build(name, dtype, **small, initializer_range=0.06)
            one_model(bench, name, str(dtype).removeprefix("torch."), llm)
            del llm
    free()


def one_model(bench: Bench, name: str, number: str, llm: dkv.LoadedModel) -> None:
    """The observed prefill, and decoding from a pruned cache by either way."""
    tokens = list(range(5, 5 + (4 if bench.dry else 64)))
    label = f"{name}, small, {number}"
    encoded = prompt(llm, 200 if bench.dry else 1000)
    prefill = prefill_prompt(llm, encoded)
    retention = dkv.DynamicKV(capacity=64).select(prefill.layers)
    whole = llm.model(
        ids_of(llm, encoded), past_key_values=DynamicCache(), logits_to_keep=1
    ).logits[0, -1]
    bench.add(
        f"{label}: observed prefill's logits equal the plain model's",
        float(torch.equal(whole, prefill.logits)),
        note="1: bit for bit",
    )
    plain = plain_answer(llm, prefill, retention, len(tokens), tokens)[1]
    reference = logits_of(cpu_twin(llm), prefill, retention, tokens)
    bench.add(
        f"{label}: plain decode logits, relative error to CPU float32",
        relative(torch.stack(plain), reference),
    )
    if graphable(llm):
        cache = prune(prefill, retention, len(tokens))
        stepped = graph_logits(DecodeGraph(llm, cache, encoded.length, len(tokens)), tokens)
        bench.add(
            f"{label}: graph decode logits, relative error to CPU float32",
            relative(torch.stack(stepped), reference),
            note=f"{type(fastest_ops(llm.device)).__name__}; same next token as the plain path at "
            f"{same_tokens(stepped, plain)} of {len(tokens)} steps, else within "
            f"{largest_gap(stepped, plain):.3f} in logits that reach {largest(plain):.1f}",
        )
    attention_error(bench, f"{name}, {number}", llm, prefill, retention)


def attention_error(
    bench: Bench,
    label: str,
    llm: dkv.LoadedModel,
    prefill: dkv.Prefill,
    retention: dkv.Retention,
) -> None:
    """One attention over pruned keys and values against float32 softmax on the CPU."""
    layer, kept = prefill.layers[-1], retention.indices[-1]
    at = kept.unsqueeze(-1).expand(-1, -1, layer.keys.shape[-1])
    keys, values = layer.keys.gather(1, at), prefill.values[-1].gather(1, at)
    query = layer.queries[:, -1]
    group = query.shape[0] // keys.shape[0]
    wide = [states.float().cpu().repeat_interleave(group, dim=0) for states in (keys, values)]
    weights = (wide[0] @ query.float().cpu().unsqueeze(-1) * layer.scaling).softmax(dim=1)
    expected = (weights * wide[1]).sum(dim=1)
    slot = torch.tensor([kept.shape[1] - 1], device=llm.device)
    for ops in {type(ops): ops for ops in (PlainOps(), fastest_ops(llm.device))}.values():
        slots = Slots(keys.contiguous(), values.contiguous(), slot)
        output = ops.attend(query.contiguous(), slots, layer.scaling)
        bench.add(
            f"{label}: pruned attention, {type(ops).__name__}, relative error to CPU float32",
            relative(output.view_as(expected), expected),
        )
