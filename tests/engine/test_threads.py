"""The command line tells OpenMP's threads to yield before torch loads; the library leaves them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPINS = "10000" if Path("/proc/self/schedstat").exists() else "1000"
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPY = """
import os, sys

class Spy:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch", os.environ.get("GOMP_SPINCOUNT"), file=sys.stderr, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Spy())
"""
"""What Python runs before anything else: says what torch would find, and ends there."""


@pytest.mark.parametrize(
    ("program", "settings", "found"),
    [
        (["-m", "dynamickv", "models"], {}, SPINS),
        (["-mdynamickv", "models"], {}, SPINS),
        (["-m", "dynamickv", "models"], {"GOMP_SPINCOUNT": "7"}, "7"),
        (["-m", "dynamickv", "models"], {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        (["-c", "import dynamickv"], {}, "None"),
    ],
)
def test_the_command_line_lets_threads_yield_unless_the_user_said_how_they_wait(
    program: list[str], settings: dict[str, str], found: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPY, "utf-8")
    told = subprocess.run(
        [sys.executable, *program],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name not in NAMES},
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            **settings,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stderr.splitlines()[0] == f"torch {found}"
