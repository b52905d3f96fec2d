"""The first start with a GGUF file: reading its weights here against reading them through
transformers: python -m benchmarks.convert FILE.gguf [--runs 3]

Each conversion is a fresh process with an empty cache, imports included, the two in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import readme
from benchmarks.report import Row, machine, measured, publish
from benchmarks.server import ROOT

CONVERT = "import sys, dynamickv.models as m; m.converted(m.conversion.Path(sys.argv[1]))"
THROUGH_TRANSFORMERS = (
    "from dynamickv.models import gguf_weights; gguf_weights.READ_HERE.clear(); " + CONVERT
)


def measure(file: Path, runs: int) -> list[Row]:
    """Seconds of both ways, medians over fresh processes."""
    here, theirs = [], []
    for _ in range(runs):
        here.append(conversion_seconds(file, CONVERT))
        theirs.append(conversion_seconds(file, THROUGH_TRANSFORMERS))
    named = f"{file.name}, {file.stat().st_size / 1e6:.0f} MB"
    return [
        measured(f"first conversion ({named})", here, "s", "<= 20"),
        measured(f"the same, weights through transformers' reader ({named})", theirs, "s"),
    ]


def conversion_seconds(file: Path, code: str) -> float:
    """One conversion in a process of its own, start to end."""
    with tempfile.TemporaryDirectory(prefix="dynamickv-") as cache:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code, str(file)],
            cwd=ROOT,
            env={**os.environ, "DYNAMICKV_CACHE": cache},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - start


def main() -> None:
    """Measure, print, write benchmarks/results/convert.json and docs/measured.md's tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert")
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    publish("convert", machine(), measure(options.file.resolve(), options.runs))
    readme.main()


if __name__ == "__main__":
    main()
