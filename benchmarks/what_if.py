"""What-if on a prompt that was read: choosing again without the model: python -m benchmarks.what_if

From a slider to the repainted page shall take 100 ms; half of it is for choosing (tests/browser has
the whole way). The page sums up the attention in pieces once a prompt was read, while nobody waits;
the first choice with another window takes that of the queries of no whole piece, every other choice
is recalled.
"""

from __future__ import annotations

import time
from dataclasses import replace

import dynamickv as dkv
from benchmarks import readme
from benchmarks.prompts import prompt_of
from benchmarks.report import Row, machine, measured, publish
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import Prefill

LENGTHS = (4096, 8160)
ROUNDS = 5
WINDOWS = (16, 44, 47, 64)
"""Two whole numbers of pieces, and one with as many queries besides as there can be."""
CAPACITIES = (64, 96, 128, 192, 256, 384, 512, 768, 1024)


def measure(llm: dkv.LoadedModel, length: int) -> list[Row]:
    """Milliseconds of one choice by every method, at one prompt length: the median over
    capacities."""
    prefill = prefill_prompt(llm, prompt_of(llm, length), mass=True)
    at = f"{round(length / 1024)}K"
    print(f"{at}: read in {prefill.seconds:.0f} s", flush=True)
    rows = []
    for name in dkv.METHODS:
        if name in ("FullKV", "Manual"):
            continue
        methods = [dkv.build_method(name, capacity=capacity) for capacity in CAPACITIES]
        choices_ms(prefill, methods[:1])
        again = choices_ms(prefill, methods)
        rows.append(measured(f"what-if: choosing again, {name}, {at}", again, "ms", "<= 50"))
    prepared: list[float] = []
    firsts: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for _ in range(ROUNDS):
        anew = replace(prefill)  # recalls nothing yet
        start = time.perf_counter()
        for layer in anew.recalling:
            layer.prepare()
        prepared.append(1000 * (time.perf_counter() - start))
        for window, found in firsts.items():
            found += choices_ms(anew, [dkv.SnapKV(capacity=128, window_size=window)])
    rows.append(
        measured(f"what-if: preparing every window, in the background, {at}", prepared, "ms")
    )
    for window, found in firsts.items():
        measure = f"what-if: first choice with a window of {window}, SnapKV, {at}"
        rows.append(measured(measure, found, "ms", "<= 60"))
    return rows


def choices_ms(prefill: Prefill, methods: list[dkv.CompressionMethod]) -> list[float]:
    """Milliseconds of each choice, bits packed as the page gets them."""
    taken = []
    for method in methods:
        start = time.perf_counter()
        dkv.Retained.pack(dkv.preview(method, prefill).mask)
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def main() -> None:
    """Measure, print, write benchmarks/results/what-if.json and README's tables."""
    where = machine()
    llm = dkv.load_model()
    publish("what-if", where, [row for length in LENGTHS for row in measure(llm, length)])
    readme.main()


if __name__ == "__main__":
    main()
