"""The page's process tells OpenMP's threads to yield, which they hear only before torch loads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPINS = "10000" if Path("/proc/self/schedstat").exists() else "1000"
ASK = "import sys, os, app.threads; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, f"False {SPINS}"),
        ({"GOMP_SPINCOUNT": "7"}, "False 7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "False None"),
    ],
)
def test_threads_yield_unless_the_user_said_how_they_wait(
    settings: dict[str, str], expected: str
) -> None:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    told = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=ROOT,
        env=inherited | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == expected


def test_the_page_says_so_before_it_imports_anything_of_ours() -> None:
    tree = ast.parse((ROOT / "app.py").read_text("utf-8"))
    imported = [
        node.names[0].name if isinstance(node, ast.Import) else str(node.module)
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    ours = [name for name in imported if name.split(".")[0] in ("app", "dynamickv")]
    assert ours[0] == "app.threads"
