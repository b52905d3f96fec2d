"""What watching a comparison costs: python -m benchmarks.film [--length N] [--rounds N]
[--answer N]

The same comparison with and without the film's events, in turn: a whole run of six methods, 4K
tokens, 64 answer tokens. The film may add 2 %.
"""

from __future__ import annotations

import argparse

import dynamickv as dkv
from benchmarks import readme
from benchmarks.prompts import QUESTION, SIX, document_of, endless
from benchmarks.report import machine, measured, paired_seconds, publish, ratios

ANSWER_TOKENS = 64
CAPACITY = 256


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.film")
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--answer", type=int, default=ANSWER_TOKENS, help="tokens (default: 64)")
    options = parser.parse_args()
    where = machine()
    llm = endless(dkv.load_model(dkv.DEFAULT_MODEL, device="cpu"))
    document = document_of(llm, options.length)
    methods = [dkv.build_method(name, capacity=CAPACITY) for name in SIX]

    def run(watch: bool) -> None:
        events = dkv.compare_stream(
            llm,
            document,
            QUESTION,
            methods=methods,
            max_new_tokens=options.answer,
            scores=True,
            watch=watch,
        )
        for _ in events:
            pass

    plain, watched = paired_seconds([lambda: run(False), lambda: run(True)], options.rounds)
    at = f"{round(options.length / 1024)}K, six methods"
    more = [100 * (ratio - 1) for ratio in ratios(watched, plain)]
    rows = [
        measured(f"film: a run nobody watches, {at}", plain, "s"),
        measured(f"film: the same, watched, {at}", watched, "s"),
        measured(f"film: adds, {at}", more, "%", "<= 2"),
    ]
    publish("film", where, rows)
    readme.main()


if __name__ == "__main__":
    main()
