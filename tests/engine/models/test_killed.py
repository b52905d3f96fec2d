"""kill -9 in the middle of a run: no broken cache, no broken record, and the next run works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamickv.cli import main
from dynamickv.models.conversion import conversion_fault, kept_conversions
from dynamickv.record.trace import Trace
from tests.engine.tiny import DOCUMENT, tiny_llm

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_broken(tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text(DOCUMENT * 2)
    llm = tiny_llm()
    llm.model.save_pretrained(tmp_path / "model")
    llm.tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [
        *("compare", "--question", "Who keeps the light?"),
        *("--document", str(tmp_path / "document.txt"), "--output", str(out / "run.json.gz")),
        *("--model", str(tmp_path / "model"), "--capacity", "40"),
    ]
    long = subprocess.Popen(
        [sys.executable, "-m", "dynamickv", *arguments, "--max-new-tokens", "1500"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
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
    assert all(conversion_fault(folder) is None for folder, _ in kept_conversions())
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    assert [run.method for run in Trace.load(out / "run.json.gz").runs] == ["FullKV", "DynamicKV"]
