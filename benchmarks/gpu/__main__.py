"""python -m benchmarks.gpu [--dry-run] [--sections a,b] [--out DIR] [--gguf FILE]

The engine at 7-8B scale and up to 128K tokens on one GPU: correctness first, then time and memory.
The large models have their published geometry and random weights, because speed and memory do not
depend on the weights; `max_position_embeddings` is raised where 128K needs it. Needs torch,
transformers and dynamickv, no network. Writes gpu.json and gpu.md after every section, so that a
run that is cut short keeps what it measured. --dry-run: tiny sizes, any device.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import dynamickv as dkv
from benchmarks.gpu.backends import backends, fastest
from benchmarks.gpu.bandwidth import bandwidth
from benchmarks.gpu.batch import batch
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.correctness import correctness
from benchmarks.gpu.decoding import decoding
from benchmarks.gpu.largest import largest
from benchmarks.gpu.overhead import overhead
from benchmarks.gpu.reselect import reselect
from benchmarks.gpu.serve import serve_memory
from benchmarks.gpu.smollm2 import smollm2
from benchmarks.gpu.timing import free
from benchmarks.gpu.tune import tune
from benchmarks.report import RESULTS, Row


def with_models(section: Callable[..., None], *names: str) -> Callable[[Bench], None]:
    """A section that runs on one model after the other."""

    def run(bench: Bench) -> None:
        for name in names:
            section(bench, name, bench.model(name))
            free()

    return run


def with_llama(section: Callable[..., None]) -> Callable[[Bench], None]:
    """A section that runs on Llama-3-8B and does not say so in its rows."""
    return with_models(lambda bench, name, llm: section(bench, llm), "Llama-3-8B")


def decode_long(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    decoding(bench, name, llm, bench.long, ">= 2.5")


def decode_longest(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    decoding(bench, name, llm, bench.longest, ">= 4", "<= 1.15")


def overhead_and_decode(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    overhead(bench, name, llm)
    decode_long(bench, name, llm)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "bandwidth": bandwidth,
    "correctness": correctness,
    "smollm2": smollm2,
    "backends": backends,
    "tune": tune,
    "attention": with_models(fastest, "Llama-3-8B"),
    "overhead": with_models(overhead, "Llama-3-8B"),
    "decode32k": with_models(decode_long, "Llama-3-8B"),
    "reselect": with_llama(reselect),
    "decode128k": with_models(decode_longest, "Llama-3-8B"),
    "serve": with_llama(serve_memory),
    "batch": with_llama(batch),
    "largest": with_llama(largest),
    "others": with_models(overhead_and_decode, "Mistral-7B-v0.2", "Qwen2-7B"),
}
APART = ("tune", "attention")
"""Sections that answer a question of their own, and are run when they are named."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, any device")
    parser.add_argument(
        "--sections", help=f"some of {','.join(SECTIONS)}; all but tune and attention by default"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--gguf", type=Path, help="SmolLM2's .gguf file, for the real model")
    parser.add_argument("--append", action="store_true", help="keep the figures that are there")
    parser.add_argument("--limit", type=float, default=540, help="start no section after, seconds")
    options = parser.parse_args()
    out = options.out / "dry-run" if options.dry_run and options.out == RESULTS else options.out
    bench = Bench(options.dry_run, out, options.gguf)
    if options.append and (bench.out / "gpu.json").exists():
        record = json.loads((bench.out / "gpu.json").read_text("utf-8"))
        bench.rows, bench.facts = [Row(**row) for row in record["rows"]], record["facts"]
    chosen = (options.sections or ",".join(s for s in SECTIONS if s not in APART)).split(",")
    if "bandwidth" not in chosen:
        chosen.insert(0, "bandwidth")
    for name in chosen:
        if bench.seconds > options.limit:
            print(f"no time left for {name}")
            continue
        try:
            SECTIONS[name](bench)
        except Exception:  # the other sections' figures are worth having
            traceback.print_exc()
            bench.facts.setdefault("failed", {})[name] = traceback.format_exc()[-2000:]
        free()
    bench.facts["seconds"] = bench.seconds
    bench.save()
    print(bench.page())


if __name__ == "__main__":
    main()
