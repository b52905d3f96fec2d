"""How fast does a cache of fixed size forget? A real text is read up to a place and then fed to
every method's cache, which goes on compressing; nothing is generated.

Two curves over the fed text, against the full cache: `agreement`, how often the likeliest next
token is the same, and `surviving`, the mean part of every word's probability that is left (as in
`record.aligned`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from dynamickv.answer import recording_for
from dynamickv.decoding.forcing import forced
from dynamickv.decoding.forgetting import Choice
from dynamickv.evaluate.experiment import Row, Stop, Stopped, Unit, of_model, stopper
from dynamickv.evaluate.statistics import bootstrap
from dynamickv.evaluate.summary import series
from dynamickv.evaluate.tables import Lines, aligned
from dynamickv.methods import CompressionMethod, FullKV
from dynamickv.methods.decoding import Decoding, require_decodable
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import prefill_text
from dynamickv.reading.prompt import encode_text
from dynamickv.record.aligned import Forced, surviving, word_tokens

PARTS = 8
"""Points of a curve."""


class ForgettingExperiment:
    """Every text with every method, each with its capacity for the budget while answering."""

    def __init__(
        self,
        llm: LoadedModel,
        texts: Mapping[str, str],
        prompt_tokens: int = 512,
        answer_tokens: int = 1024,
        buffer: int = 64,
    ) -> None:
        for name, number, least in (
            ("prompt_tokens", prompt_tokens, 64),
            ("answer_tokens", answer_tokens, PARTS),
            ("buffer", buffer, 1),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        self._llm, self._texts = llm, dict(texts)
        self._prompt_tokens, self._answer_tokens = prompt_tokens, answer_tokens
        self._buffer = buffer
        most = llm.geometry.max_positions
        if prompt_tokens + answer_tokens > most:
            raise ValueError(
                f"{prompt_tokens:,} tokens to read and {answer_tokens:,} to feed are more than "
                f"this model reads ({most:,}); lower one of them"
            )
        for name, text in self._texts.items():
            length = encode_text(llm.tokenizer, text).length
            if length < prompt_tokens + answer_tokens:
                raise ValueError(
                    f"{name} has {length:,} tokens and {prompt_tokens + answer_tokens:,} are "
                    "wanted; give a longer text, or lower the number of tokens"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on besides the text and the method."""
        return {
            "experiment": "forgetting",
            **of_model(self._llm),
            "prompt_tokens": self._prompt_tokens,
            "answer_tokens": self._answer_tokens,
            "buffer": self._buffer,
        }

    def units(self) -> list[Unit]:
        """The texts, also by a hash of what is in them."""
        return [
            {"text": name, "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}
            for name, text in self._texts.items()
        ]

    def size(self, unit: Unit) -> float:
        """All alike."""
        return 1.0

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """One text with every method."""
        prompt, answer = self.parts(self._texts[unit["text"]])
        read = prefill_text(self._llm, prompt, **recording_for(methods), on_layer=stopper(stop))
        pieces = [str(self._llm.tokenizer.decode([token])) for token in answer]
        full = forced(self._llm, read, FullKV(), answer)
        runs = []
        for method in methods:
            if stop():
                raise Stopped
            choices: list[Choice] = []
            own, seconds = full, 0.0
            if method.capabilities.capacity:
                decoding = Decoding(budget=method.parameters["capacity"], buffer=self._buffer)
                start = time.perf_counter()
                own = forced(self._llm, read, method, answer, decoding, choices.append)
                seconds = time.perf_counter() - start
            runs.append(
                {
                    "method": method.name,
                    "parameters": method.parameters,
                    **curves(full, own, pieces),
                    "choices": len(choices),
                    "choosing_seconds": round(sum(choice.seconds for choice in choices), 4),
                    "seconds": round(seconds, 3),
                }
            )
        return {"prompt_tokens": read.length, "answer_tokens": len(answer), "runs": runs}

    def parts(self, text: str) -> tuple[str, list[int]]:
        """What is read, and the tokens that are fed behind it.

        Raises:
            ValueError: no place near the wanted one at which the text can be cut without other
                tokens before it.
        """
        tokenizer = self._llm.tokenizer
        whole = encode_text(tokenizer, text)
        for cut in range(self._prompt_tokens, self._prompt_tokens // 2, -1):
            end = whole.offsets[cut][0]
            if encode_text(tokenizer, text[:end]).token_ids == whole.token_ids[:cut]:
                return text[:end], whole.token_ids[cut : cut + self._answer_tokens]
        raise ValueError("this text cannot be cut between two tokens; give another one")


def curves(full: Forced, own: Forced, pieces: Sequence[str]) -> Row:
    """Both measures, of all that was fed and of each of its PARTS equal parts.

    Args:
        pieces: the text of every token that was fed.
    """
    same = [a == b for a, b in zip(full.likeliest, own.likeliest, strict=True)]
    spans = word_tokens(pieces)
    kept = surviving(
        [math.prod(own.probabilities[a:b]) for a, b in spans],
        [math.prod(full.probabilities[a:b]) for a, b in spans],
    )
    size = len(same) / PARTS
    words: list[list[float]] = [[] for _ in range(PARTS)]
    for (first, _), share in zip(spans, kept, strict=True):
        words[min(int(first / size), PARTS - 1)].append(share)
    edges = [round(part * size) for part in range(PARTS + 1)]
    loss = [math.log(max(p, torch.finfo(torch.float32).tiny)) for p in own.probabilities]
    return {
        "agreement": mean(same),
        "surviving": mean(kept),
        "nats": -mean(loss),
        "agreement_curve": [round(mean(same[a:b]), 6) for a, b in itertools.pairwise(edges)],
        "surviving_curve": [round(mean(part), 6) if part else None for part in words],
    }


def require_forgetting(methods: Sequence[CompressionMethod], buffer: int) -> None:
    """Raise ValueError, in one sentence, where a method cannot go on while answering."""
    for method in methods:
        if method.capabilities.capacity:
            budget = method.parameters["capacity"]
            require_decodable(Decoding(budget=budget, buffer=buffer), method)


def forgetting_summary(rows: Sequence[Row]) -> list[Row]:
    """Per method and budget: both measures over all texts with 95 % bootstrap intervals over the
    texts' eighths, the mean curves, nats per token, and the part of the time that choosing took."""
    lines = []
    for (method, budget), pairs in series(rows).items():
        runs = [run for _, run in pairs]
        line: Row = {
            "method": method,
            "budget": budget,
            "texts": len(runs),
            "prompt_tokens": mean(row["prompt_tokens"] for row, _ in pairs),
            "answer_tokens": mean(row["answer_tokens"] for row, _ in pairs),
        }
        for name in ("agreement", "surviving"):
            values = [run[name] for run in runs]
            line[name] = mean(values)
            # Eighths of all texts: few texts alone would give no interval.
            parts = [v for run in runs for v in run[f"{name}_curve"] if v is not None]
            line[f"{name}_interval"] = list(bootstrap([parts]))
            curve = zip(*(run[f"{name}_curve"] for run in runs), strict=True)
            line[f"{name}_curve"] = [
                round(mean(known), 6) if (known := [v for v in at if v is not None]) else None
                for at in curve
            ]
        line["nats"] = mean(run["nats"] for run in runs)
        line["choices"] = mean(run["choices"] for run in runs)
        lines.append(line)
    return lines


def forgetting_lines(summary: Sequence[Row]) -> Lines:
    """Method, budget, both measures with intervals, nats, and the curve of what survives."""
    head = ["method", "budget", "same next token", "95 % interval", "survives", "95 % interval"]
    head += ["nats/token", *(f"{part}/{PARTS}" for part in range(1, PARTS + 1))]
    return [head] + [
        [
            line["method"],
            "all" if line["budget"] is None else str(line["budget"]),
            *(
                cell
                for name in ("agreement", "surviving")
                for low, high in [line[f"{name}_interval"]]
                for cell in (f"{100 * line[name]:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %")
            ),
            f"{line['nats']:.3f}",
            *("-" if v is None else f"{100 * v:.0f}" for v in line["surviving_curve"]),
        ]
        for line in summary
    ]


def forgetting_table(summary: Sequence[Row]) -> str:
    """All of it as text."""
    texts = max((line["texts"] for line in summary), default=0)
    said = f"{texts} text{'' if texts == 1 else 's'}; what survives also in {PARTS} equal parts, %"
    return f"{said}\n\n{aligned(forgetting_lines(summary))}"


def forgetting_csv(summary: Sequence[Row]) -> str:
    """A line per method, budget and part of the text; shares from 0 to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "budget", "part", "agreement", "surviving"])
    for line in summary:
        curve = zip(line["agreement_curve"], line["surviving_curve"], strict=True)
        for part, (same, kept) in enumerate(curve, start=1):
            writer.writerow([line["method"], line["budget"] or "all", part, same, kept])
    return text.getvalue()
