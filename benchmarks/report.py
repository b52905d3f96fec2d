"""How every benchmark reports: figures with the range of their rounds, the machine, a table, JSON.

A figure that was taken several times is the median of its rounds, with the minimum and the maximum
beside it: a median alone does not say whether the machine was quiet.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import dynamickv as dkv

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure."""

    measure: str
    value: float
    unit: str = ""
    target: str = ""
    note: str = ""
    minimum: float | None = None
    """Of the rounds whose median `value` is; nothing where it was taken once."""
    maximum: float | None = None

    @property
    def range(self) -> str:
        """ "(minimum to maximum)", or nothing."""
        if self.minimum is None or self.maximum is None:
            return ""
        return f"({self.minimum:.4g} to {self.maximum:.4g})"

    def line(self) -> str:
        """The row as text."""
        value = f"{self.value:.4f}" if abs(self.value) < 1e6 else f"{self.value:.3e}"
        target = f"(target {self.target})" if self.target else ""
        words = [f"{value:>10}", self.unit, self.range, target, self.note]
        return f"{self.measure:<66} {' '.join(filter(None, words))}"

    def record(self) -> dict[str, Any]:
        """The row as JSON, without a range where there is none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measured(
    measure: str, found: float | Sequence[float], unit: str = "", target: str = "", note: str = ""
) -> Row:
    """The row of one value, or of several rounds: their median, and from where to where they lie.

    Raises:
        statistics.StatisticsError: no rounds at all.
    """
    if not isinstance(found, Sequence):
        return Row(measure, found, unit, target, note)
    return Row(measure, statistics.median(found), unit, target, note, min(found), max(found))


def machine() -> dict[str, str]:
    """Where and when, with which versions, and how busy it was (mean number of waiting processes
    of the last minute). Ask before anything is measured: a benchmark is a load, too."""
    names = [
        line.split(":", 1)[1].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        **({"gpus": ", ".join(gpus)} if gpus else {}),
        **circumstances(),
    }


def circumstances() -> dict[str, str]:
    """What `machine` says besides the machine: date, versions and load."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "dynamickv": dkv.__version__,
        "load": f"{os.getloadavg()[0]:.2f}",
    }


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.exists() else []


def paired_seconds(actions: Sequence[Callable[[], object]], runs: int) -> list[list[float]]:
    """Wall times of actions taken in turn after a warm-up, so that a drifting machine hits all
    alike: `runs` rounds for each."""
    for action in actions:
        action()
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(runs):
        for taken, action in zip(seconds, actions, strict=True):
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
    return seconds


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """One ratio per round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def scaled(values: Sequence[float], factor: float) -> list[float]:
    """Rounds in another unit."""
    return [factor * value for value in values]


def publish(name: str, where: dict[str, str], rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Print the table and write NAME.json into the folder of results."""
    busy = f"load {where['load']} when it began"
    print(f"\n{name}: {where['processor']}, {where['cores']} cores, {where['date']}, {busy}")
    for row in rows:
        print(f"  {row.line()}")
    write(folder / f"{name}.json", {"machine": where, "rows": [row.record() for row in rows]})


def write(path: Path, record: dict[str, Any]) -> None:
    """A record as a JSON file, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first line is its head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
