"""Six methods here against kvpress's one after another, on one document, in turn on one machine.

python -m benchmarks.kvpress PYTHON_WITH_KVPRESS   (make kvpress passes its own)
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dynamickv as dkv
from benchmarks.prompts import QUESTION, SIX, document_of, endless, safetensors_folder
from benchmarks.report import Row, machine, measured, publish

LENGTH, CAPACITY, NEW_TOKENS, ROUNDS = 3584, 128, 24, 2
HEAVY = ("H2O", "ObservedAttention")


def main() -> None:
    """Time both, in turn; the models are loaded before the clocks start."""
    where, folder = machine(), safetensors_folder()
    llm = dkv.load_model()
    document = document_of(llm, LENGTH)
    ours: list[float] = []
    light: list[float] = []
    theirs: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        theirs.append(_kvpress(sys.argv[1], folder, document))
        ours.append(_ours(llm, document, SIX))
        light.append(_ours(llm, document, tuple(name for name in SIX if name not in HEAVY)))
    medians = {name: statistics.median(run[name] for run in theirs) for name in theirs[0]}
    without = sum(seconds for name, seconds in medians.items() if name not in HEAVY)
    rows = [
        *(
            measured(f"kvpress, {name}, 3.5K tokens", [run[name] for run in theirs], "s")
            for name in medians
        ),
        measured("here, six methods together", ours, "s"),
        measured("here, five methods without H2O", light, "s"),
        Row("kvpress / here, all", sum(medians.values()) / statistics.median(ours), "x", ">= 5"),
        Row(
            "kvpress / here, without the two H2O-like",
            without / statistics.median(light),
            "x",
            ">= 3.5",
        ),
    ]
    publish("kvpress", where, rows)


def _ours(llm: dkv.LoadedModel, document: str, names: tuple[str, ...]) -> float:
    methods = dkv.build_methods(names, capacity=CAPACITY)
    llm = endless(llm)
    start = time.perf_counter()
    dkv.compare(llm, document, QUESTION, methods=methods, max_new_tokens=NEW_TOKENS)
    return time.perf_counter() - start


def _kvpress(python: str, folder: Path, document: str) -> dict[str, float]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(document)
        file.flush()
        ratio = 1 - CAPACITY / LENGTH
        command = [python, "-m", "benchmarks.kvpress_run", str(folder), file.name, QUESTION]
        command += [str(NEW_TOKENS), str(ratio)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    print(result.stderr[-2000:], file=sys.stderr)
    seconds: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return seconds


if __name__ == "__main__":
    main()
