"""Precision "fast" on this CPU against "exact", transformers in bfloat16, llama.cpp and OpenVINO
GenAI: what a user waits for, beside busy neighbours too, and what rounding changes.

python -m benchmarks.cpu [--length 4096] [--rounds 5]

`make llamacpp` and `make openvino` bring the two peers, each in a folder of its own.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import dynamickv as dkv
from benchmarks import peers
from benchmarks.prompts import endless, example_text, prompt_of, step_seconds
from benchmarks.report import Row, machine, measured, paired_seconds, publish, ratios, scaled
from dynamickv.answer import select
from dynamickv.cache import prune
from dynamickv.decoding.decode import feeder
from dynamickv.reading.prefill import prefill_prompt, prefill_text
from dynamickv.records import EncodedPrompt, Prefill

CAPACITY = 128
ANSWER = 64
DOCUMENTS, WORDS, FORCED = 20, 768, 160
"""Documents whose next tokens are compared; tokens that are read of each, and fed one by one."""
PLACED = 12
"""Decodings timed beside busy neighbours."""
SIX = ("FullKV", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "DynamicKV")


def main() -> None:
    """Measure, print, write benchmarks/results/cpu.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    where = machine()
    exact = dkv.load_model(device="cpu", precision="exact")
    fast = dkv.load_model(device="cpu", precision="fast")
    if fast.precision != "fast":
        raise SystemExit("this CPU has no bfloat16 instructions, so everything is exact here")
    prompt = prompt_of(exact, options.length)
    rows = [*prefills(exact, fast, prompt, options.rounds), *agreement(exact, fast)]
    read = prefill_prompt(fast, prompt)
    rows += decoding(exact, fast, prompt, read, options.rounds)
    rows += six_methods(exact, fast, prompt, options.rounds)
    rows += beside_neighbours(fast, prompt, read, options.rounds)
    rows += peers.llamacpp(fast, prompt, read, options.rounds)
    rows += peers.openvino(fast, prompt_of(fast, peers.LONG), options.rounds)
    publish("cpu", where, rows)


def prefills(
    exact: dkv.LoadedModel, fast: dkv.LoadedModel, prompt: EncodedPrompt, rounds: int
) -> list[Row]:
    """Seconds until the first token, and the ratios that are promised."""
    plain = AutoModelForCausalLM.from_pretrained(
        exact.model.config._name_or_path, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    ids = torch.tensor([prompt.token_ids])

    @torch.inference_mode()
    def theirs() -> None:
        cache = DynamicCache(config=plain.config)
        plain(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    before, now, half, exact_mass, fast_mass = paired_seconds(
        [
            lambda: prefill_prompt(exact, prompt),
            lambda: prefill_prompt(fast, prompt),
            theirs,
            lambda: prefill_prompt(exact, prompt, mass=True),
            lambda: prefill_prompt(fast, prompt, mass=True),
        ],
        rounds,
    )
    at = f"{prompt.length:,} tokens"
    return [
        measured(f"prefill, exact, {at}", before, "s"),
        measured(f"prefill, fast, {at}", now, "s"),
        measured(f"prefill, transformers in bfloat16, {at}", half, "s"),
        measured("prefill, fast / exact", ratios(now, before), "x", "<= 0.35"),
        measured("prefill, fast / transformers in bfloat16", ratios(now, half), "x", "<= 0.6"),
        measured("prefill with H2O's attention, fast / exact", ratios(fast_mass, exact_mass), "x"),
    ]


def decoding(
    exact: dkv.LoadedModel,
    fast: dkv.LoadedModel,
    prompt: EncodedPrompt,
    read: Prefill,
    rounds: int,
) -> list[Row]:
    """Milliseconds per token, exact and fast in turn, each from its own prefill."""
    rows = []
    exact_read = prefill_prompt(exact, prompt)
    methods = {"FullKV": dkv.FullKV(), f"DynamicKV({CAPACITY})": dkv.DynamicKV(capacity=CAPACITY)}
    for name, method in methods.items():
        before, now = [], []
        for _ in range(rounds):
            before.append(step_seconds(exact, method, exact_read))
            now.append(step_seconds(fast, method, read))
        rows += [
            measured(f"decode, {name}, exact", scaled(before, 1000), "ms/token"),
            measured(f"decode, {name}, fast", scaled(now, 1000), "ms/token"),
            measured(f"decode, {name}, fast / exact", ratios(now, before), "x", "<= 0.45"),
        ]
    return rows


def six_methods(
    exact: dkv.LoadedModel, fast: dkv.LoadedModel, prompt: EncodedPrompt, rounds: int
) -> list[Row]:
    """The whole comparison that a user of the page asks for."""
    methods = [
        dkv.FullKV() if name == "FullKV" else dkv.build_method(name, capacity=CAPACITY)
        for name in SIX
    ]

    def compare(llm: dkv.LoadedModel) -> Callable[[], object]:
        return lambda: dkv.compare(
            endless(llm),
            prefill=prefill_prompt(llm, prompt, mass=True),
            methods=methods,
            max_new_tokens=ANSWER,
        )

    before, now = paired_seconds([compare(exact), compare(fast)], rounds)
    what = f"six methods with H2O, {ANSWER} tokens"
    return [
        measured(f"{what}, exact", before, "s"),
        measured(f"{what}, fast", now, "s"),
        measured(f"{what}, fast / exact", ratios(now, before), "x", "<= 0.4"),
    ]


@torch.inference_mode()
def agreement(exact: dkv.LoadedModel, fast: dkv.LoadedModel) -> list[Row]:
    """What rounding changes: the next token, fed the document's own, and the positions kept."""
    ids = exact.tokenizer(example_text())["input_ids"]
    most = WORDS + FORCED
    stride = max((len(ids) - most) // (DOCUMENTS - 1), 1)
    equal = 0
    shared: dict[str, list[float]] = {"SnapKV": [], "DynamicKV": []}
    for number in range(DOCUMENTS):
        own = ids[number * stride : number * stride + most]
        text = str(exact.tokenizer.decode(own[:WORDS]))
        reads = [prefill_text(llm, text) for llm in (exact, fast)]
        said = [
            following(llm, read, own[-FORCED:])
            for llm, read in zip((exact, fast), reads, strict=True)
        ]
        equal += sum(a == b for a, b in zip(*said, strict=True))
        for name, found in shared.items():
            method = dkv.build_method(name, capacity=CAPACITY)
            found.append(share(*(select(method, read).indices for read in reads)))
    tokens = DOCUMENTS * (FORCED + 1)
    return [
        Row(f"next token equal, {DOCUMENTS} documents", equal / tokens, "", ">= 0.99"),
        *(
            measured(f"kept positions shared, {name}({CAPACITY})", found, "", ">= 0.97")
            for name, found in shared.items()
        ),
    ]


def following(llm: dkv.LoadedModel, read: Prefill, forced: Sequence[int]) -> list[int]:
    """The most likely token after the prompt and after each of the tokens fed."""
    cache = prune(read, dkv.FullKV().select(read.layers), len(forced))
    feed = feeder(llm, cache.plain)
    said = [int(read.logits.argmax())]
    for place, token in enumerate(forced, read.length):
        said.append(int(feed([cache], [token], [place])[0].argmax()))
    return said


def share(
    first: Sequence[Sequence[torch.Tensor]], second: Sequence[Sequence[torch.Tensor]]
) -> float:
    """Positions that both keep, of those that the one keeps that keeps more."""
    kept = [
        [set(head.tolist()) for head in itertools.chain.from_iterable(layers)]
        for layers in (first, second)
    ]
    both = sum(len(a & b) for a, b in zip(*kept, strict=True))
    return both / max(sum(map(len, heads)) for heads in kept)


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Processes beside this one that never rest."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def beside_neighbours(
    llm: dkv.LoadedModel, prompt: EncodedPrompt, read: Prefill, rounds: int
) -> list[Row]:
    """The same work alone and beside as many spinning processes as there are cores here: two."""

    def work() -> tuple[list[float], list[float]]:
        full = dkv.FullKV()
        # Many short ones: beside others a step takes the one or the other of two times, by where
        # the system has put the threads, for a second or more.
        steps = [step_seconds(llm, full, read) for _ in range(PLACED)]
        return steps, paired_seconds([lambda: prefill_prompt(llm, prompt)], rounds)[0]

    steps, reading = work()
    with spinning(2):
        busy_steps, busy_reading = work()
    beside = "beside two spinning processes / alone"
    return [
        measured(f"decode {beside}", ratios(busy_steps, steps), "x", "<= 2.2"),
        measured(f"prefill {beside}", ratios(busy_reading, reading), "x", "<= 2.5"),
    ]


if __name__ == "__main__":
    main()
