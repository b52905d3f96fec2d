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
from benchmarks.prompts import QUESTION, document_of
from benchmarks.report import Row, publish
from dynamickv.models import KNOWN_MODELS, embedded_file
from dynamickv.models.conversion import converted

LENGTH, CAPACITY, NEW_TOKENS, ROUNDS = 3584, 128, 24, 2
METHODS = ("FullKV", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "DynamicKV")
HEAVY = ("H2O", "ObservedAttention")


def main() -> None:
    """Time both, in turn; the models are loaded before the clocks start."""
    file = embedded_file(KNOWN_MODELS[dkv.DEFAULT_MODEL])
    if file is None:
        raise SystemExit("the embedded model is not installed; run make setup")
    llm = dkv.load_model()
    document = document_of(llm, LENGTH)
    ours: list[float] = []
    light: list[float] = []
    theirs: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        theirs.append(_kvpress(sys.argv[1], converted(file), document))
        ours.append(_ours(llm, document, METHODS))
        light.append(_ours(llm, document, tuple(name for name in METHODS if name not in HEAVY)))
    medians = {name: statistics.median(run[name] for run in theirs) for name in theirs[0]}
    without = sum(seconds for name, seconds in medians.items() if name not in HEAVY)
    rows = [Row(f"kvpress, {name}, 3.5K tokens", value, "s") for name, value in medians.items()]
    rows += [
        Row("here, six methods together", statistics.median(ours), "s"),
        Row("here, five methods without H2O", statistics.median(light), "s"),
        Row("kvpress / here, all", sum(medians.values()) / statistics.median(ours), "x", ">= 5"),
        Row(
            "kvpress / here, without the two H2O-like",
            without / statistics.median(light),
            "x",
            ">= 3.5",
        ),
    ]
    publish("kvpress", rows)


def _ours(llm: dkv.LoadedModel, document: str, names: tuple[str, ...]) -> float:
    endless = dkv.LoadedModel(
        name=llm.name,
        revision=llm.revision,
        model=llm.model,
        tokenizer=llm.tokenizer,
        geometry=llm.geometry,
    )
    methods = [dkv.build_method(name, capacity=CAPACITY) for name in names]
    start = time.perf_counter()
    dkv.compare(endless, document, QUESTION, methods=methods, max_new_tokens=NEW_TOKENS)
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
