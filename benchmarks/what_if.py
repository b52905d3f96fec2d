"""What-if on a prompt that was read: choosing again without the model: python -m benchmarks.what_if

From a slider to the repainted page shall take 100 ms; half of it is for choosing (tests/browser has
the whole way). The first choice with another window takes the attention anew, every other is
recalled.
"""

from __future__ import annotations

import time

import dynamickv as dkv
from benchmarks import readme
from benchmarks.prompts import prompt_of
from benchmarks.report import Row, machine, measured, publish
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import Prefill

LENGTHS = (4096, 8160)
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
    for window_size in (16, 64):
        moved = dkv.SnapKV(capacity=128, window_size=window_size)
        (first,) = choices_ms(prefill, [moved])
        measure = f"what-if: first choice with a window of {window_size}, SnapKV, {at}"
        rows.append(Row(measure, first, "ms"))
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
