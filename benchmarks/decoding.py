"""Long answers with compression that goes on, and the second question about a document:
python -m benchmarks.decoding [--new-tokens 4096] [--timed 64] [--device cuda] [--precision fast]

A prompt of 2K tokens and an answer of 4,096 on both paths, same weights and number format:
transformers' own greedy generate with its DynamicCache (on a GPU without cuDNN's attention, which
builds a plan for every new length), and the engine's decoding, which holds budget + buffer at most.
The answer is taken in equal parts, and the paths take turns, so that a busy machine hits both
alike. The engine decodes and times every token. Of generate the first `--timed` tokens of every
part are decoded and timed, and the rest is fed in one pass that is not, so that every part begins
at its true length. A path's figure is the mean over the parts; its range is from the least part to
the greatest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache

import dynamickv as dkv
from benchmarks import readme
from benchmarks.gpu.decoding import WITHOUT_CUDNN
from benchmarks.prompts import document_of, endless, prompt_of
from benchmarks.report import Row, machine, measured, paired_seconds, publish, ratios, scaled
from dynamickv.answer import select
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode import decode
from dynamickv.decoding.forgetting import forgetting_of
from dynamickv.reading.observe import cache_argument
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt

BUDGET, BUFFER = 512, 128
PROMPT = 2048
DOCUMENT = 4096
PARTS = 16
"""Turns that an answer is taken in."""
SERVED = 4
"""Of them, those that generate with our cache takes: its cache does not grow any more."""


class Generating:
    """transformers' own generate, part by part, with one cache."""

    def __init__(self, llm: dkv.LoadedModel, prompt: EncodedPrompt, cache: Any) -> None:
        """Read the prompt."""
        self._llm, self._cache = llm, cache
        self._ids = self._generate(torch.tensor([prompt.token_ids], device=llm.device), 1)

    def decode(self, tokens: int) -> float:
        """Seconds of so many tokens."""
        self._llm.synchronize()
        start = time.perf_counter()
        self._ids = self._generate(self._ids, tokens)
        self._llm.synchronize()
        return time.perf_counter() - start

    def feed(self, tokens: int) -> None:
        """Make the answer longer by so many tokens in one pass; any tokens take the same time."""
        if tokens:
            given = torch.cat([self._ids, self._ids[:, : tokens - 1]], dim=1)
            self._ids = self._generate(given, 1)

    @torch.inference_mode()
    def _generate(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        model: Any = self._llm.model
        with sdpa_kernel(WITHOUT_CUDNN):
            made: torch.Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(model, self._cache),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
        return made


class Engine:
    """The engine's own decoding, part by part."""

    def __init__(
        self,
        llm: dkv.LoadedModel,
        prompt: EncodedPrompt,
        method: dkv.CompressionMethod,
        decoding: dkv.Decoding,
        tokens: int,
    ) -> None:
        """Read the prompt and choose for it."""
        read = prefill_prompt(llm, prompt, mass=method.needs_mass)
        self._llm = llm
        self._cache = prune(read, select(decoding.of_prompt(method), read), 0)
        forgetting = forgetting_of(method, decoding, read, self._cache)
        assert forgetting is not None
        self._forgetting = forgetting
        self.peak = reserved(self._cache)
        """Most bytes that keys and values took, counted from their storage."""
        self._steps: Iterator[Any] = decode(
            endless(llm),
            self._cache,
            read.logits,
            read.length,
            tokens + 1,
            forgetting=self._forgetting,
        )
        next(self._steps)

    def decode(self, tokens: int) -> float:
        """Seconds of so many tokens, choices and whatever is prepared among them."""
        start = time.perf_counter()
        for _ in range(tokens):
            self._forgetting.make_room(1)
            next(self._steps)
            self.peak = max(self.peak, reserved(self._cache))
        self._llm.synchronize()
        return time.perf_counter() - start

    @property
    def choosing(self) -> float:
        """Seconds of all choices so far."""
        return sum(choice.seconds for choice in self._forgetting.choices)

    def end(self) -> None:
        """No more tokens come."""
        self._steps.close()
        self._forgetting.end()


def answering(
    llm: dkv.LoadedModel, method: dkv.CompressionMethod, new_tokens: int, timed: int
) -> list[Row]:
    """Peak of keys and values, time per token and the part of it that choosing takes."""
    prompt = prompt_of(llm, PROMPT)
    decoding = dkv.Decoding(budget=BUDGET, buffer=BUFFER)
    size = new_tokens // PARTS
    timed = min(timed, size)
    # What is compiled, packed or looked up once is in no figure.
    Engine(llm, prompt, method, decoding, size).decode(size)
    Generating(llm, prompt, DynamicCache(config=llm.model.config)).decode(8)
    cache = DynamicCache(config=llm.model.config)
    plain = Generating(llm, prompt, cache)
    engine = Engine(llm, prompt, method, decoding, size * PARTS)
    theirs, own, choosing = [], [], []
    for part in range(1, PARTS + 1):
        before = engine.choosing
        own.append(engine.decode(size) / size)
        choosing.append((engine.choosing - before) / size)
        theirs.append(plain.decode(timed) / timed)
        plain.feed(size - timed)
        print(f"  part {part}: {theirs[-1]:.4f}, {own[-1]:.4f} s/token", flush=True)
    engine.end()
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    full = sum(tensor.nbytes for tensor in held)
    del plain, cache, held
    with dkv.compress(llm.model, method, decoding=decoding) as ours:
        serving = Generating(llm, prompt, ours)
        served = [serving.decode(timed) / timed for _ in range(SERVED)]
        read = ours.peak_bytes
    at = f"{method.name}({BUDGET}), buffer {BUFFER}, {size * PARTS:,} tokens after {PROMPT:,}"
    limit = "<= 0.25" if llm.device.type == "cuda" else "<= 0.5"
    rows = [
        measured(f"peak KV / DynamicCache, {at}", engine.peak / full, "x", "<= 0.13"),
        measured(f"the same in generate, the prompt read and pruned in it, {at}", read / full, "x"),
        figure(f"transformers' generate, {at}", scaled(theirs, 1e3), "ms/token"),
        figure(f"generate with our cache, {at}", scaled(served, 1e3), "ms/token"),
        figure(f"the engine's decoding, {at}", scaled(own, 1e3), "ms/token"),
        replace(
            figure(f"engine / generate, {at}", ratios(own, theirs), "x", limit),
            value=mean(own) / mean(theirs),
        ),
        replace(
            figure(f"all choices / decode time, {at}", ratios(choosing, own), "x", "<= 0.03"),
            value=mean(choosing) / mean(own),
        ),
    ]
    return rows if size * PARTS == 4096 else [replace(row, target="") for row in rows]


def figure(measure: str, parts: Sequence[float], unit: str, target: str = "") -> Row:
    """The row of a mean over the parts of an answer, with the least part and the greatest."""
    return Row(measure, mean(parts), unit, target, "", min(parts), max(parts))


def reserved(cache: KVCache) -> int:
    """Bytes that the layers' buffers take."""
    return sum(layer.reserved_bytes for layer in cache.whole_layers())


def asking(llm: dkv.LoadedModel, method: dkv.CompressionMethod, runs: int) -> list[Row]:
    """A second question from a stored prefill, against reading the document again: each until the
    cache is chosen and its answer may begin."""
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
    """Measure, print, write benchmarks/results/decoding.json and the tables made of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    parser.add_argument("--model", default=dkv.DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu", help="cpu in float32, cuda in bfloat16")
    parser.add_argument("--precision", default="exact", help="of the engine; generate is exact")
    parser.add_argument("--new-tokens", type=int, default=4096)
    parser.add_argument("--timed", type=int, default=64, help="of generate's, in each of 16 parts")
    parser.add_argument("--runs", type=int, default=3, help="second questions")
    parser.add_argument("--output", help="a name in benchmarks/results, or a path without .json")
    options = parser.parse_args()
    where = machine()
    llm = dkv.load_model(options.model, device=options.device, precision=options.precision)
    where["numbers"] = f"{llm.model.dtype}, {options.precision}".removeprefix("torch.")
    method = dkv.DynamicKV(capacity=BUDGET)
    start = time.perf_counter()
    rows = asking(llm, method, options.runs)
    rows += answering(llm, method, options.new_tokens, options.timed)
    print(f"  {time.perf_counter() - start:.0f} s")
    publish(options.output or "decoding", where, rows)
    if not options.output:
        readme.main()


if __name__ == "__main__":
    main()
