"""How long a start takes: the model from the cache, and the page until it answers."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.report import Row, measured
from benchmarks.server import ROOT, page, seconds_until_answered

LOAD = (
    "import time, dynamickv as d, transformers, torch\n"
    "import transformers.models.llama.modeling_llama\n"
    "start = time.perf_counter(); d.load_model(); print(time.perf_counter() - start)"
)


def measure(runs: int) -> list[Row]:
    """Medians over fresh processes."""
    _load()
    return [
        measured(
            "load the embedded model from the cache", [_load() for _ in range(runs)], "s", "< 1"
        ),
        measured(
            "python app.py until the page answers", [_page_up() for _ in range(runs)], "s", "<= 6"
        ),
    ]


def _load() -> float:
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


def _page_up() -> float:
    with page() as (server, url):
        return seconds_until_answered(server, url)
