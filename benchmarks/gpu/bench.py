"""What a section is given: sizes, the device, the large model, and a place for its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dynamickv as dkv
from benchmarks.gpu import models, timing
from benchmarks.report import Row, circumstances, markdown, measured, write


def machine() -> dict[str, str]:
    """Where and when."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "none (dry run)",
        "cuda": str(torch.version.cuda),
        **circumstances(),
    }


@dataclass
class Bench:
    """Sizes, the device, and what was measured so far."""

    dry: bool
    out: Path
    gguf: Path | None
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=machine)
    started: float = field(default_factory=time.perf_counter)
    built: tuple[str, dkv.LoadedModel] | None = None
    """The large model that is on the device: at most one fits."""

    def model(self, name: str) -> dkv.LoadedModel:
        """A model of that geometry, built unless it is the one that is there."""
        if self.built is None or self.built[0] != name:
            self.built = None
            timing.free()
            self.built = name, self.build(name)
        return self.built[1]

    def build(self, name: str, dtype: torch.dtype | None = None, **changes: Any) -> dkv.LoadedModel:
        """A model of that geometry, of its own."""
        return models.build(name, self.device, dtype or self.dtype, self.dry, **changes)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def long(self) -> int:
        return 256 if self.dry else 32768

    @property
    def longest(self) -> int:
        return 512 if self.dry else models.LONGEST

    @property
    def method(self) -> dkv.DynamicKV:
        return dkv.DynamicKV(capacity=32 if self.dry else 512)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def add(
        self,
        measure: str,
        found: float | Sequence[float],
        unit: str = "",
        target: str = "",
        note: str = "",
    ) -> None:
        """Note a figure, or the rounds it was taken in, and save all figures so far."""
        row = measured(measure, found, unit, target, note)
        self.rows = [*(other for other in self.rows if other.measure != measure), row]
        print(f"[{self.seconds:5.0f} s] {row.line()}", flush=True)
        self.save()

    def save(self) -> None:
        """Write gpu.json and gpu.md."""
        rows = [row.record() for row in self.rows]
        write(self.out / "gpu.json", {"machine": self.machine, "facts": self.facts, "rows": rows})
        (self.out / "gpu.md").write_text(self.page(), "utf-8")

    def page(self) -> str:
        """gpu.json as a page: the machine, the figures, and `facts.remarks`."""
        cells = [["measure", "value", "unit", "target", "note"]]
        for row in self.rows:
            whole = float(row.value).is_integer()
            shown = f"{row.value:.0f}" if whole else f"{row.value:.4g}"
            value = f"{shown} {row.range}".rstrip()
            cells.append([row.measure, value, row.unit, row.target, row.note])
        where = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        remarks = "\n".join(f"- {remark}" for remark in self.facts.get("remarks", []))
        parts = ["# Measured on a GPU", where, markdown(cells), remarks]
        return "\n\n".join(filter(None, parts)) + "\n"

    def profile(self, name: str, action: Callable[[], object], runs: int) -> None:
        """Where the time goes, by kernel, into profile-NAME.txt."""
        timing.profile(self.out / f"profile-{name}.txt", action, runs)
