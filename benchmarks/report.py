"""What every benchmark shares: the machine, medians, a table and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

import dynamickv as dkv

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure."""

    measure: str
    value: float
    unit: str
    target: str = ""
    note: str = ""


def machine() -> dict[str, str]:
    """Where and when the figures were taken."""
    names = [
        line.split(":", 1)[1].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        **({"gpus": ", ".join(gpus)} if gpus else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dynamickv": dkv.__version__,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.exists() else []


def median_seconds(action: Callable[[], object], runs: int) -> float:
    """Median wall time of `action` over `runs`, after one warm-up."""
    return statistics.median(paired_seconds([action], runs)[0])


def paired_seconds(actions: list[Callable[[], object]], runs: int) -> list[list[float]]:
    """Wall times of several actions taken in turn, so that a drifting machine hits all alike."""
    for action in actions:
        action()
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(runs):
        for index, action in enumerate(actions):
            start = time.perf_counter()
            action()
            seconds[index].append(time.perf_counter() - start)
    return seconds


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the pairwise ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def publish(name: str, rows: list[Row]) -> None:
    """Print the table and write benchmarks/results/NAME.json."""
    where = machine()
    print(f"\n{name}: {where['processor']}, {where['cores']} cores, {where['date']}")
    for row in rows:
        target = f"  (target {row.target})" if row.target else ""
        print(f"  {row.measure:<58} {row.value:>9.3f} {row.unit}{target} {row.note}")
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": where, "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
