"""Needle in a haystack: is a fact still found when it lies at any depth of a text of any length?
 One prefill per cell serves every method and capacity. Scores: `exact`, the share of the hidden
values that the answer contains, and `fuzzy`, how much of each value its best place holds.

Source: G. Kamradt's test; several needles as in his later version, the first at the depth and the
others evenly spread to the end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamickv.answer import recording_for
from dynamickv.evaluate.experiment import Row, Stop, Unit, answers, entry, key, of_model, stopper
from dynamickv.evaluate.haystack import Haystack, Hidden, hide, invent
from dynamickv.evaluate.metrics import contains_all, fuzzy
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import prefill
from dynamickv.reading.prompt import encode_prompt


@dataclass(frozen=True, kw_only=True)
class NeedleGrid:
    """Which cells to measure."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Most tokens of the whole prompt, question and template included; a few less are used."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """0 is the text's start, 1 its end."""
    samples: int = 1
    """Trials per cell, each with a text and facts of its own."""
    needles: int = 1
    haystack: str | None = None
    """Folder of .txt files; None makes sentences up."""
    custom: Hidden | None = None
    """Facts of your own instead of invented codes."""
    max_new_tokens: int = 32
    chat_template: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "needles", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lengths or not self.depths:
            raise ValueError("a grid needs at least one length and one depth, such as 1024 and 0.5")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths run from 0 (start) to 1 (end), got {depth}")


def even_depths(number: int) -> tuple[float, ...]:
    """`number` depths from the start to the end."""
    if number < 1:
        raise ValueError(f"depths must be at least 1, got {number}")
    return tuple(round(place / max(number - 1, 1), 4) for place in range(number))


class NeedleExperiment:
    """A grid on a model."""

    def __init__(self, llm: LoadedModel, grid: NeedleGrid) -> None:
        self._llm, self._grid = llm, grid
        self._haystack = Haystack(grid.haystack)
        most = llm.geometry.max_positions - grid.max_new_tokens
        for length in grid.lengths:
            if length > most:
                raise ValueError(
                    f"a prompt of {length:,} tokens and an answer of {grid.max_new_tokens} are "
                    f"more than this model reads ({llm.geometry.max_positions:,}); "
                    f"lower the length to {most:,}"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What a cell's result depends on besides the cell and the method."""
        llm, grid = self._llm, self._grid
        custom = grid.custom and [list(grid.custom.facts), grid.custom.question]
        return {
            "experiment": "needle",
            "texts": "one per trial",
            **of_model(llm),
            "haystack": self._haystack.name,
            "needles": grid.needles,
            "custom": custom,
            "max_new_tokens": grid.max_new_tokens,
            "chat_template": grid.chat_template,
            "seed": grid.seed,
        }

    def units(self) -> list[Unit]:
        """Every cell, as often as there are samples."""
        return [
            {"length": length, "depth": depth, "sample": sample}
            for length in self._grid.lengths
            for sample in range(self._grid.samples)
            for depth in self._grid.depths
        ]

    def size(self, unit: Unit) -> float:
        """Attention grows with the square of a length, the rest with the length."""
        return float(unit["length"] * (1 + unit["length"] / 16384))

    def document(self, unit: Unit) -> tuple[str, Hidden]:
        """A trial's text and what is hidden in it; intervals assume that no other shares them."""
        grid = self._grid
        rng = random.Random(key([grid.seed, unit["length"], unit["depth"], unit["sample"]]))
        hidden = grid.custom or invent(grid.needles, rng)

        def count(text: str) -> int:
            return len(self._llm.tokenizer(text, add_special_tokens=False)["input_ids"])

        around = self._prompt_length(" ".join(hidden.facts), hidden.question)
        sentences = self._haystack.sentences(rng, unit["length"] - around, count)
        while sentences:
            document = hide(sentences, hidden.facts, unit["depth"], count)
            over = self._prompt_length(document, hidden.question) - unit["length"]
            if over <= 0:
                return document, hidden
            sentences = sentences[: -max(1, over // 16)]
        raise ValueError(
            f"a prompt of {unit['length']} tokens has no room for a text around the needle, which "
            f"takes {around} with its question; choose a longer one"
        )

    def _prompt_length(self, document: str, question: str) -> int:
        template = self._grid.chat_template
        limit = self._llm.geometry.max_positions * 2
        return encode_prompt(
            self._llm.tokenizer, document, question, limit=limit, chat_template=template
        ).length

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """One cell."""
        document, hidden = self.document(unit)
        read = prefill(
            self._llm,
            document,
            hidden.question,
            chat_template=self._grid.chat_template,
            **recording_for(methods),
            on_layer=stopper(stop),
        )
        runs = answers(self._llm, read, methods, self._grid.max_new_tokens, stop)
        return {
            "prompt_tokens": read.length,
            "expected": list(hidden.expected),
            "prefill_seconds": round(read.seconds + read.mass_seconds, 3),
            "runs": [
                {
                    **entry(run),
                    "exact": contains_all(run.answer, hidden.expected),
                    "fuzzy": round(fuzzy(run.answer, hidden.expected), 6),
                }
                for run in runs
            ],
        }
