"""The page as a process of its own: `python app.py` on a free port."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent


@contextmanager
def page(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process, which may not answer yet, and its address; ended at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--log-level", "error", *options]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield server, f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


def seconds_until_answered(server: subprocess.Popen[bytes], url: str, limit: float = 300) -> float:
    """Seconds until `url` is answered with 200.

    Raises:
        RuntimeError: the process ended, or did not answer within `limit` seconds.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < limit:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return time.perf_counter() - start
        except httpx.TransportError:
            pass
        if server.poll() is not None:
            raise RuntimeError(f"the page ended with exit code {server.returncode}")
        time.sleep(0.05)
    raise RuntimeError(f"the page did not answer within {limit:.0f} s")
