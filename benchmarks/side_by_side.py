"""Several measuring processes on one machine: start them, say every few seconds that they live."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

BEAT = 10
"""Seconds between two lines."""
CONVERT = "import sys, pathlib; from dynamickv.models.conversion import converted as c; "
CONVERT += "print(c(pathlib.Path(sys.argv[1])))"


def environment(model: Path) -> dict[str, str]:
    """What a process that loads a .gguf file needs: each file has a cache of its own beside it, so
    that several are converted at once."""
    return {
        **os.environ,
        "DYNAMICKV_CACHE": str(model.parent / f"cache-{model.stem}"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


def convert(models: Sequence[Path], logs: Path) -> None:
    """Convert .gguf files that are not converted yet, all at once."""
    commands = {
        f"convert-{model.stem}": ([sys.executable, "-c", CONVERT, str(model)], environment(model))
        for model in models
    }
    failed = run(commands, logs)
    if failed:
        raise SystemExit(f"could not convert: {', '.join(failed)}; see {logs}")


def run(
    commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]],
    logs: Path,
    say: Callable[[], str] = lambda: "",
) -> list[str]:
    """Run commands, name -> (arguments, environment), side by side, each with a log of its own; the
    names of those that failed."""
    logs.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    running = {}
    for name, (arguments, variables) in commands.items():
        log = (logs / f"{name}.log").open("a")
        running[name] = subprocess.Popen(
            arguments, env=dict(variables), stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
    beaten = 0.0
    while any(process.poll() is None for process in running.values()):
        time.sleep(0.5)
        now = time.perf_counter() - began
        if now - beaten >= BEAT:
            beaten = now
            alive = [name for name, process in running.items() if process.poll() is None]
            print(f"{now:4.0f} s, {len(alive)} running: {', '.join(alive)} {say()}", flush=True)
    failed = [name for name, process in running.items() if process.returncode]
    for name in failed:
        last = (logs / f"{name}.log").read_text("utf-8", "replace")[-1500:]
        print(f"{name} failed:\n{last}", flush=True)
    return failed
