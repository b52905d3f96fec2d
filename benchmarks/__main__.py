"""python -m benchmarks [--lengths 1024,2048,4096,8160] [--runs 5]"""

from __future__ import annotations

import argparse

import dynamickv as dkv
from benchmarks import engine, plot, readme, start
from benchmarks.report import machine, publish


def main() -> None:
    """Measure, print, write benchmarks/results/*.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument(
        # The embedded model reads 8,192 positions, and the answer needs some of them.
        "--lengths",
        default="1024,2048,4096,8160",
        help="prompt lengths in tokens",
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip-start", action="store_true", help="leave out load and page times")
    options = parser.parse_args()
    where = machine()
    if not options.skip_start:
        publish("start", where, start.measure(options.runs))
    # Its figures compare with the plain model; what "fast" gains is benchmarks.cpu's.
    llm = dkv.load_model(precision="exact")
    rows = []
    for length in map(int, options.lengths.split(",")):
        rows += engine.measure(llm, length, options.runs)
    publish("engine", where, rows)
    plot.growth()
    readme.main()


if __name__ == "__main__":
    main()
