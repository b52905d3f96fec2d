"""One document, one question, one prefill, every capacity: where does each method leave FullKV?
 Agreement and ROUGE-L compare whole answers; the KL divergence is that of the next-token
distribution while FullKV's answer is fed to every cache (teacher forcing), so that one early
difference does not hide what follows.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dynamickv.answer import recording_for
from dynamickv.decoding.forcing import divergence, forced_logits
from dynamickv.evaluate.experiment import (
    Row,
    Stop,
    Stopped,
    Unit,
    answers,
    entry,
    of_model,
    stopper,
)
from dynamickv.methods import CompressionMethod, FullKV
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import TAIL, prefill
from dynamickv.record.agreement import agreement
from dynamickv.record.trace import Run
from dynamickv.records import Prefill

LEAST = 16
COLUMNS = (
    "method", "capacity", "token_match", "rouge_l", "kl_mean", "kl_max", "kept_fraction",
    "kv_bytes", "kv_bytes_full", "answer",
)  # fmt: skip


def capacities_up_to(length: int, least: int = LEAST) -> list[int]:
    """`least`, its doubles, and `length`, where every method keeps everything."""
    if length <= least:
        return [length]
    steps = [least]
    while steps[-1] * 2 < length:
        steps.append(steps[-1] * 2)
    return [*steps, length]


class SweepExperiment:
    """One unit per capacity. The prefill and FullKV's answer are made with the first and kept."""

    def __init__(
        self,
        llm: LoadedModel,
        document: str,
        question: str,
        capacities: Sequence[int] | None = None,
        max_new_tokens: int = 64,
        truncate: bool = False,
        read: Prefill | None = None,
    ) -> None:
        """Without `capacities`: 16, its doubles, and the prompt's length. `read` is a prefill of
        that document and question, with the attention of all queries if a method reads it."""
        self._llm, self._document, self._question = llm, document, question
        self._max_new_tokens, self._truncate = max_new_tokens, truncate
        self._capacities = None if capacities is None else sorted(set(capacities))
        self._read = read
        self._full: Run | None = None
        self._logits: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on besides capacity and method."""
        return {
            "experiment": "sweep",
            **of_model(self._llm),
            "prompt": prompt_digest(self._document, self._question),
            "max_new_tokens": self._max_new_tokens,
        }

    def prepare(self, mass: bool, tail: int = TAIL, stop: Stop = lambda: False) -> Prefill:
        """Read the prompt, unless that was done."""
        if self._read is None:
            self._read = prefill(
                self._llm, self._document, self._question, truncate=self._truncate,
                tail=max(TAIL, tail), mass=mass, on_layer=stopper(stop),
            )  # fmt: skip
        return self._read

    def units(self) -> list[Unit]:
        """One per capacity; the prompt must have been read where none were given."""
        if self._capacities is None:
            if self._read is None:
                raise ValueError("read the prompt with prepare() first, or give capacities")
            self._capacities = capacities_up_to(self._read.length)
        return [{"capacity": capacity} for capacity in self._capacities]

    def size(self, unit: Unit) -> float:
        """All alike: most of the time is decoding, in one batch."""
        return 1.0

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """Every method at one capacity; FullKV has no capacity and is answered once."""
        read = self.prepare(**recording_for(methods), stop=stop)
        if self._full is None:
            (self._full,) = answers(self._llm, read, [FullKV()], self._max_new_tokens, stop)
            self._logits = forced_logits(self._llm, read, FullKV(), self._full.token_ids)
        sized = [_at(method, unit["capacity"]) for method in methods]
        runs = answers(self._llm, read, sized, self._max_new_tokens, stop)
        rows = []
        for method, asked, run in zip(sized, methods, runs, strict=True):
            if stop():
                raise Stopped
            compared = replace(run, agreement=agreement(run, self._full))
            # The journal knows the method as it was asked for, whatever the unit's capacity.
            rows.append(
                {**entry(compared), **self._divergence(read, method), "asked": asked.parameters}
            )
        return {"prompt_tokens": read.length, "full_answer": self._full.answer, "runs": rows}

    def _divergence(self, read: Prefill, method: CompressionMethod) -> Row:
        assert self._full is not None
        assert self._logits is not None
        forced = forced_logits(self._llm, read, method, self._full.token_ids)
        distances = divergence(self._logits, forced)
        return {"kl_mean": float(distances.mean()), "kl_max": float(distances.max())}


def prompt_digest(document: str, question: str) -> str:
    """A document and a question by a hash of both."""
    text = f"{document}\0{question}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _at(method: CompressionMethod, capacity: int) -> CompressionMethod:
    if not method.capabilities.capacity:
        return method
    return replace(method, capacity=capacity)  # type: ignore[call-arg]


def sweep_summary(rows: Sequence[Row]) -> list[Row]:
    """One entry per method and capacity, by method, then capacity."""
    flat = [
        {
            "method": run["method"],
            "capacity": row["unit"]["capacity"],
            **run["agreement"],
            **{name: run[name] for name in COLUMNS if name in run and name != "method"},
        }
        for row in rows
        for run in row["runs"]
    ]
    order = list(dict.fromkeys(line["method"] for line in flat))
    return sorted(flat, key=lambda line: (order.index(line["method"]), line["capacity"]))


def sweep_csv(lines: Sequence[Row]) -> str:
    """The summary as CSV, KL in nats. An answer that begins like a formula is marked as text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        answer = line["answer"]
        risky = answer.lstrip()[:1] in ("=", "+", "-", "@")
        writer.writerow({**line, "answer": f"'{answer}" if risky else answer})
    return text.getvalue()
