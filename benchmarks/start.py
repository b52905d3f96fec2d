"""How long a start takes: the model from the cache, and the page until it answers."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.report import Row

ROOT = Path(__file__).parent.parent
LOAD = (
    "import time, dynamickv as d, transformers, torch\n"
    "import transformers.models.llama.modeling_llama\n"
    "start = time.perf_counter(); d.load_model(); print(time.perf_counter() - start)"
)


def measure(runs: int) -> list[Row]:
    """Medians over fresh processes."""
    subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, check=True, capture_output=True)
    loads = [
        float(
            subprocess.run(
                [sys.executable, "-c", LOAD], cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(runs)
    ]
    return [
        Row("load the embedded model from the cache", statistics.median(loads), "s", "< 1"),
        Row(
            "python app.py until the page answers",
            statistics.median(_page_up() for _ in range(runs)),
            "s",
            "<= 6",
        ),
    ]


def _page_up() -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.perf_counter()
    page = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while time.perf_counter() - start < 120:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                return time.perf_counter() - start
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError("the page did not answer within 120 s")
    finally:
        page.terminate()
        page.wait()
