"""The engine on one prompt: what observing costs, what choosing costs, what decoding gains."""

from __future__ import annotations

import statistics

import torch
from transformers import DynamicCache

import dynamickv as dkv
from benchmarks.prompts import SIX, endless, prompt_of
from benchmarks.report import Row, measured, paired_seconds, ratios, scaled
from dynamickv.answer import select
from dynamickv.cache import prune
from dynamickv.decoding.decode import decode
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt, Prefill

CAPACITY = 128
NEW_TOKENS = 24


def measure(llm: dkv.LoadedModel, length: int, runs: int) -> list[Row]:
    """All engine figures at one prompt length."""
    prompt = prompt_of(llm, length)
    at = f"{round(length / 1024)}K"
    rows = [*_observing(llm, prompt, at, runs)]
    prefill = prefill_prompt(llm, prompt, mass=True)
    share = prefill.mass_seconds / prefill.seconds
    rows.append(Row(f"H2O's attention of all queries / prefill, {at}", share, "x", "<= 1"))
    rows += _choosing(llm, prefill, at)
    rows += _decoding(llm, prompt, prefill, at, runs)
    rows.append(_serving(llm, prompt, prefill, at))
    return rows


def _observing(llm: dkv.LoadedModel, prompt: EncodedPrompt, at: str, runs: int) -> list[Row]:
    ids = torch.tensor([prompt.token_ids], device=llm.device)

    @torch.inference_mode()
    def plain() -> None:
        cache = DynamicCache(config=llm.model.config)
        llm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        llm.synchronize()

    def observing() -> None:
        prefill_prompt(llm, prompt)

    def serving() -> None:
        prefill = prefill_prompt(llm, prompt)
        prune(prefill, select(dkv.DynamicKV(capacity=CAPACITY), prefill), NEW_TOKENS)
        llm.synchronize()

    alone, observed, served = paired_seconds([plain, observing, serving], runs)
    return [
        measured(f"plain prefill, {at}", alone, "s"),
        measured(
            f"prefill with observing / plain prefill, {at}", ratios(observed, alone), "x", "<= 1.01"
        ),
        measured(
            f"prefill, observing, scoring, pruning / plain prefill, {at}",
            ratios(served, alone),
            "x",
            "<= 1.01",
        ),
    ]


def _choosing(llm: dkv.LoadedModel, prefill: Prefill, at: str) -> list[Row]:
    rows, total = [], 0.0
    for name in dkv.METHODS:
        if name in ("FullKV", "Manual"):
            continue
        method = dkv.build_method(name, capacity=CAPACITY)

        def choose(method: dkv.CompressionMethod = method) -> None:
            prune(prefill, select(method, prefill), NEW_TOKENS)
            llm.synchronize()

        (seconds,) = paired_seconds([choose], 5)
        if name in SIX:
            total += statistics.median(seconds)
        measure = f"score + prune, {name}({CAPACITY}), {at}"
        rows.append(measured(measure, scaled(seconds, 1000), "ms"))
    measure = f"score + prune, the five compressing methods of the papers, {at}"
    rows.append(Row(measure, total, "s", "<= 0.3" if at == "4K" else ""))
    return rows


def _serving(llm: dkv.LoadedModel, prompt: EncodedPrompt, prefill: Prefill, at: str) -> Row:
    """Most bytes of keys and values that pruning while prefilling ever holds."""
    ids = torch.tensor([prompt.token_ids], device=llm.device)
    with dkv.compress(llm.model, dkv.DynamicKV(capacity=CAPACITY)) as cache:
        llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1
        )
    target = "<= 0.10" if at == "8K" else ""
    share = cache.peak_bytes / prefill.kv_bytes
    return Row(f"serve-mode peak KV bytes, DynamicKV({CAPACITY}) / full, {at}", share, "x", target)


def _decoding(
    llm: dkv.LoadedModel, prompt: EncodedPrompt, prefill: Prefill, at: str, runs: int
) -> list[Row]:
    """Milliseconds per token, the prefill left out on both sides, in turn."""
    plain_cache = DynamicCache(config=llm.model.config)
    ids = torch.tensor([prompt.token_ids], device=llm.device)
    with torch.inference_mode():
        llm.model(ids, past_key_values=plain_cache, use_cache=True, logits_to_keep=1)
    held = prompt.length

    @torch.inference_mode()
    def generate() -> None:
        plain_cache.crop(-(plain_cache.get_seq_length() - held + 1))
        llm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=plain_cache,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        llm.synchronize()

    short = prefill_prompt(llm, prompt_of(llm, CAPACITY))

    def ours(method: dkv.CompressionMethod, prefill: Prefill = prefill) -> float:
        cache = prune(prefill, select(method, prefill), NEW_TOKENS)
        steps = list(decode(endless(llm), cache, prefill.logits, prefill.length, NEW_TOKENS))
        return statistics.mean(step.seconds for step in steps[1:])

    theirs, full, compressed, small = [], [], [], []
    for _ in range(runs + 1):
        theirs.append(paired_seconds([generate], 1)[0][0] / NEW_TOKENS)
        full.append(ours(dkv.FullKV()))
        compressed.append(ours(dkv.DynamicKV(capacity=CAPACITY)))
        small.append(ours(dkv.FullKV(), short))
    theirs, full, compressed, small = theirs[1:], full[1:], compressed[1:], small[1:]
    targets = {"4K": ">= 1.6", "8K": ">= 2.2"}
    milliseconds = {
        "transformers' generate": theirs,
        "FullKV": full,
        f"DynamicKV({CAPACITY})": compressed,
    }
    quotients = [
        ("generate / FullKV", theirs, full, ">= 1.0"),
        (f"generate / DynamicKV({CAPACITY})", theirs, compressed, targets.get(at, "")),
        (
            f"DynamicKV({CAPACITY}) / FullKV on {short.length} tokens",
            compressed,
            small,
            "<= 1.05",
        ),
    ]
    return [
        *(
            measured(f"decode, {what}, {at}", scaled(seconds, 1000), "ms/token")
            for what, seconds in milliseconds.items()
        ),
        *(
            measured(f"decode, {what}, {at}", ratios(slow, fast), "x", target)
            for what, slow, fast, target in quotients
        ),
    ]
