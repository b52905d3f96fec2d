"""Long answers with compression that goes on, and the second question about a document:
python -m benchmarks.decoding [--new-tokens 4096] [--runs 3]

One prompt of 2K tokens, an answer of the same length on every path: transformers' own generate with
its DynamicCache, the same generate with our cache, and the engine's decoding. The paths take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

import dynamickv as dkv
from benchmarks import readme
from benchmarks.prompts import document_of, endless, prompt_of
from benchmarks.report import Row, machine, measured, paired_seconds, publish, ratios, scaled
from dynamickv.answer import select
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode import decode
from dynamickv.decoding.forgetting import forgetting_of
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt

BUDGET, BUFFER = 512, 128
PROMPT = 2048
DOCUMENT = 4096


def answering(
    llm: dkv.LoadedModel, method: dkv.CompressionMethod, new_tokens: int, runs: int
) -> list[Row]:
    """Peak of keys and values, time per token and the part that choosing takes."""
    prompt = prompt_of(llm, PROMPT)
    decoding = dkv.Decoding(budget=BUDGET, buffer=BUFFER)
    theirs, served, own, choosing = [], [], [], []
    full = peak = 0
    for _ in range(runs):
        seconds, full = plain_generate(llm, prompt, new_tokens)
        theirs.append(seconds / new_tokens)
        seconds, peak = our_generate(llm, prompt, method, decoding, new_tokens)
        served.append(seconds / new_tokens)
        seconds, spent, held = engine(llm, prompt, method, decoding, new_tokens)
        own.append(seconds / new_tokens)
        choosing.append(spent / seconds)
        peak = max(peak, held)
        print(f"  {theirs[-1]:.4f} {served[-1]:.4f} {own[-1]:.4f} s/token", flush=True)
    at = f"{method.name}({BUDGET}), buffer {BUFFER}, {new_tokens:,} tokens after {PROMPT:,}"
    whole = new_tokens == 4096

    def target(words: str) -> str:
        return words if whole else ""

    return [
        measured(f"peak KV / DynamicCache, {at}", peak / full, "x", target("<= 0.13")),
        measured(f"transformers' generate, {at}", scaled(theirs, 1000), "ms/token"),
        measured(f"generate with our cache, {at}", scaled(served, 1000), "ms/token"),
        measured(f"the engine's decoding, {at}", scaled(own, 1000), "ms/token"),
        measured(f"engine / generate, {at}", ratios(own, theirs), "x", target("<= 0.5")),
        measured(f"generate with our cache / generate, {at}", ratios(served, theirs), "x"),
        measured(f"all choices / decode time, {at}", scaled(choosing, 100), "%", target("<= 3")),
    ]


def plain_generate(
    llm: dkv.LoadedModel, prompt: EncodedPrompt, new_tokens: int
) -> tuple[float, int]:
    """Seconds of generate without the prefill, and bytes of its cache in the end."""
    cache = DynamicCache(config=llm.model.config)
    seconds = generate(llm, prompt, cache, new_tokens)
    held = [(layer.keys, layer.values) for layer in cache.layers]
    return seconds, sum(t.numel() * t.element_size() for pair in held for t in pair)


def our_generate(
    llm: dkv.LoadedModel,
    prompt: EncodedPrompt,
    method: dkv.CompressionMethod,
    decoding: dkv.Decoding,
    new_tokens: int,
) -> tuple[float, int]:
    """The same with a cache that goes on compressing, and the most bytes that it took."""
    with dkv.compress(llm.model, method, decoding=decoding) as cache:
        seconds = generate(llm, prompt, cache, new_tokens)
        return seconds, cache.peak_bytes


@torch.inference_mode()
def generate(llm: dkv.LoadedModel, prompt: EncodedPrompt, cache: Any, new_tokens: int) -> float:
    """Seconds from the first answer token on."""
    ids = torch.tensor([prompt.token_ids], device=llm.device)
    begun: list[float] = []

    def first(*_: Any) -> None:
        if not begun:
            llm.synchronize()
            begun.append(time.perf_counter())

    handle = llm.model.register_forward_hook(first)
    try:
        llm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        llm.synchronize()
        return time.perf_counter() - begun[0]
    finally:
        handle.remove()


def engine(
    llm: dkv.LoadedModel,
    prompt: EncodedPrompt,
    method: dkv.CompressionMethod,
    decoding: dkv.Decoding,
    new_tokens: int,
) -> tuple[float, float, int]:
    """Seconds of decoding, seconds of all choices among them, and the most bytes that keys and
    values took, counted from their storage."""
    read = prefill_prompt(llm, prompt, mass=method.needs_mass)
    chosen = decoding.of_prompt(method)
    cache = prune(read, select(chosen, read), 0)
    forgetting = forgetting_of(method, decoding, read, cache)
    assert forgetting is not None
    held = 0
    start = time.perf_counter()
    for step in decode(
        endless(llm), cache, read.logits, read.length, new_tokens, forgetting=forgetting
    ):
        if step.last is None:
            forgetting.make_room(1)
        held = max(held, reserved(cache))
    seconds = time.perf_counter() - start
    forgetting.end()
    return seconds, sum(choice.seconds for choice in forgetting.choices), held


def reserved(cache: KVCache) -> int:
    """Bytes that the layers' buffers take."""
    return sum(layer.reserved_bytes for layer in cache.whole_layers())


def asking(llm: dkv.LoadedModel, method: dkv.CompressionMethod, runs: int) -> list[Row]:
    """A second question from a stored prefill, against reading the document again."""
    document = document_of(llm, DOCUMENT - 64)
    stored = dkv.prefill(llm, document, mass=method.needs_mass)
    question = "Which number is named first?"

    def ready(read: Callable[[], dkv.Prefill]) -> Callable[[], object]:
        def work() -> None:
            prefill = read()
            prune(prefill, select(method, prefill), 64)
            llm.synchronize()

        return work

    again, anew = paired_seconds(
        [
            ready(lambda: dkv.prefill(llm, document, question, mass=method.needs_mass)),
            ready(lambda: dkv.with_question(llm, stored, question)),
        ],
        runs,
    )
    at = f"{method.name}({BUDGET}), {stored.length:,} tokens"
    return [
        measured(f"second question, document read again, {at}", scaled(again, 1000), "ms"),
        measured(f"second question from the stored prefill, {at}", scaled(anew, 1000), "ms"),
        measured(
            f"second question, stored prefill / reading again, {at}",
            ratios(anew, again),
            "x",
            "<= 0.05",
        ),
    ]


def main() -> None:
    """Measure, print, write benchmarks/results/decoding.json and README's tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    parser.add_argument("--new-tokens", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="print only; write nothing")
    options = parser.parse_args()
    where = machine()
    llm = dkv.load_model(precision="exact")
    method = dkv.DynamicKV(capacity=BUDGET)
    rows = [*asking(llm, method, options.runs)]
    rows += answering(llm, method, options.new_tokens, options.runs)
    if options.keep:
        print("\n".join(row.line() for row in rows))
        return
    publish("decoding", where, rows)
    readme.main()


if __name__ == "__main__":
    main()
