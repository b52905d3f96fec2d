"""What six methods cost more than FullKV alone: python -m benchmarks.evaluate [--runs N]

One example, the whole way as the LongBench command goes it: prefill, choosing, decoding, scoring
left out. The prefill is shared and all caches are decoded in one pass. Every answer has the same
length: nothing ends it early.
"""

from __future__ import annotations

import argparse

import dynamickv as dkv
from benchmarks.prompts import SIX, endless, prompt_of
from benchmarks.report import Row, machine, measured, paired_seconds, publish, ratios
from dynamickv.evaluate.experiment import answers
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt

CAPACITY = 128


def measure(llm: dkv.LoadedModel, length: int, new_tokens: int, runs: int) -> list[Row]:
    """Seconds for FullKV alone and for six methods at one prompt length, in turn."""
    prompt = prompt_of(llm, length)
    llm = endless(llm)
    full = dkv.evaluate.methods_at(["FullKV"], [CAPACITY])
    six = dkv.evaluate.methods_at(SIX, [CAPACITY])
    alone, all_six = paired_seconds(
        [
            lambda: example(llm, prompt, full, new_tokens),
            lambda: example(llm, prompt, six, new_tokens),
        ],
        runs,
    )
    at = f"{round(length / 1024)}K tokens, {new_tokens} new, capacity {CAPACITY}"
    return [
        measured(f"one example, FullKV, {at}", alone, "s"),
        measured(f"one example, six methods, {at}", all_six, "s"),
        measured(f"six methods / FullKV, {at}", ratios(all_six, alone), "x", "<= 1.6"),
    ]


def example(
    llm: dkv.LoadedModel,
    prompt: EncodedPrompt,
    methods: list[dkv.CompressionMethod],
    new_tokens: int,
) -> None:
    """What an experiment does with one example."""
    read = prefill_prompt(llm, prompt, mass=any(method.needs_mass for method in methods))
    answers(llm, read, methods, new_tokens)


def main() -> None:
    """Measure, print, write benchmarks/results/evaluate.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate")
    parser.add_argument(
        "--examples",
        default="2048:512,4096:64",
        help="prompt and answer tokens; 512 is LongBench's length for summaries, 64 for questions",
    )
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    where = machine()
    llm = dkv.load_model()
    rows: list[Row] = []
    for sizes in options.examples.split(","):
        length, new_tokens = map(int, sizes.split(":"))
        rows += measure(llm, length, new_tokens, options.runs)
    publish("evaluate", where, rows)


if __name__ == "__main__":
    main()
