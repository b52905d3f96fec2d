"""kill -9 in the middle of a run: no broken cache, no broken record, and the next run works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamickv.conversion import conversion_fault, kept_conversions
from dynamickv.trace import Trace
from tests.engine.tiny import DOCUMENT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.model
def test_a_killed_run_leaves_nothing_broken(tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text(DOCUMENT * 12)
    out = tmp_path / "out"
    out.mkdir()
    command = [
        *(sys.executable, "-m", "dynamickv", "compare", "--question", "Who keeps the light?"),
        *("--document", str(tmp_path / "document.txt"), "--output", str(out / "run.json.gz")),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    long = subprocess.Popen(
        [*command, "--max-new-tokens", "500"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert long.stderr is not None
    seen = ""
    end = time.monotonic() + 240
    while "decode" not in seen:
        assert time.monotonic() < end
        assert long.poll() is None, seen
        seen += long.stderr.read(1)
    long.send_signal(signal.SIGKILL)
    assert long.wait(30) == -signal.SIGKILL
    assert list(out.iterdir()) == []
    assert [conversion_fault(folder) for folder, _ in kept_conversions()].count(None) >= 1
    subprocess.run(
        [*command, "--max-new-tokens", "4"], cwd=ROOT, env=environment, check=True, timeout=240
    )
    assert [run.method for run in Trace.load(out / "run.json.gz").runs] == ["FullKV", "DynamicKV"]
