"""Several questions about one document: what does a cache that was compressed for the first one say
to the next, and what would choosing anew have cost?

Every question stands by itself behind the document, so the words that a model reads are the same on
three caches, which differ in what they hold of the document:

- `first`: compressed for the document's first question, all its places spent on the document;
- `blind`: compressed before any question was known;
- `anew`: chosen for this question from the stored prefill of the document.

The document is read once; a question costs a pass over its own tokens. FullKV answers once.
Source: SCBench's multi-request mode (Li et al. 2024, arXiv:2412.10319).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dynamickv.answer import recording_for
from dynamickv.decoding.asking import with_question
from dynamickv.evaluate.experiment import (
    Row,
    Stop,
    Unit,
    answers,
    key,
    of_model,
    stopper,
)
from dynamickv.evaluate.metrics import contains_any
from dynamickv.evaluate.turns_data import Asked, Documents
from dynamickv.evaluate.turns_summary import WAYS
from dynamickv.methods import CompressionMethod, FullKV
from dynamickv.methods.base import EvictingMethod
from dynamickv.methods.selection import FixedSelection, Selection
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import prefill
from dynamickv.record.agreement import agreement
from dynamickv.record.trace import Run
from dynamickv.records import LayerObservation, Prefill, Retention


@dataclass(frozen=True, kw_only=True)
class Reused(CompressionMethod):
    """What a method chose for another question."""

    name: ClassVar[str] = "Reused"
    chosen: Retention

    @property
    def parameters(self) -> dict[str, Any]:
        """None of its own."""
        return {}

    def fits(self, prompt_length: int) -> bool:
        """It is a choice, whatever was asked."""
        return False

    def start(self, num_layers: int) -> Selection:
        """Each layer keeps what was chosen for it."""
        left = iter(self.chosen.indices)
        return FixedSelection(lambda _: next(left))

    def select(self, observations: Sequence[LayerObservation]) -> Retention:
        """The choice."""
        return self.chosen


class TurnsExperiment:
    """Every question of every document. What one document left is kept for its questions."""

    def __init__(
        self,
        llm: LoadedModel,
        documents: Mapping[str, tuple[str, Sequence[Asked]]],
        max_new_tokens: int = 32,
        truncate: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._llm, self._documents = llm, dict(documents)
        self._max_new_tokens, self._truncate = max_new_tokens, truncate
        self._read: tuple[str, str, Prefill] | None = None
        self._first: Prefill | None = None
        """The document with its first question."""
        self._chosen: dict[str, Retention] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on besides the question and the method."""
        return {
            "experiment": "turns",
            **of_model(self._llm),
            "max_new_tokens": self._max_new_tokens,
            "truncate": self._truncate,
        }

    def units(self) -> list[Unit]:
        """Every question, by its document and its place, and by a hash of what is read for it."""
        return [
            {
                "document": name,
                "turn": turn,
                "prompt": _digest("\0".join((text, asked[0].question, one.question))),
            }
            for name, (text, asked) in self._documents.items()
            for turn, one in enumerate(asked)
        ]

    def size(self, unit: Unit) -> float:
        """Characters of the document, which is read with its first question."""
        text, _ = self._documents[unit["document"]]
        return float(len(text)) * (1.0 if unit["turn"] == 0 else 0.1)

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """One question, with every method, on all three caches."""
        text, listed = self._documents[unit["document"]]
        asked = listed[unit["turn"]]
        read = self._document(unit["document"], text, methods, stop)
        anew = with_question(self._llm, read, asked.question, stopper(stop))
        most = self._max_new_tokens
        compressing = [method for method in methods if method.capabilities.capacity]
        reused = [
            Reused(chosen=self._for_first(method, read, listed[0].question, stop))
            for method in compressing
        ]
        runs: dict[str, list[Run]] = {}
        full, *runs["anew"] = answers(self._llm, anew, [FullKV(), *compressing], most, stop)
        if compressing:
            without = [*reused, *compressing]
            both = answers(self._llm, read, without, most, stop, asked.question)
            runs["first"], runs["blind"] = both[: len(reused)], both[len(reused) :]
        places = {id(method): place for place, method in enumerate(compressing)}
        return {
            "document_tokens": read.length,
            "prompt_tokens": anew.length,
            "question": asked.question,
            "expected": list(asked.answers),
            "document_seconds": round(read.seconds + read.mass_seconds, 3),
            "question_seconds": round(anew.seconds, 4),
            "full": said(full, full, asked),
            "runs": [
                {
                    "method": method.name,
                    "parameters": method.parameters,
                    **{
                        way: said(
                            runs[way][places[id(method)]] if id(method) in places else full,
                            full,
                            asked,
                        )
                        for way in WAYS
                    },
                }
                for method in methods
            ],
        }

    def _document(
        self, name: str, text: str, methods: Sequence[CompressionMethod], stop: Stop
    ) -> Prefill:
        """What a document left, read once for all its questions."""
        recording = recording_for(methods)
        wanted = key([name, recording])
        if self._read is None or self._read[:2] != (name, wanted):
            self._read, self._first, self._chosen = None, None, {}
            longest = max(
                (one.question for one in self._documents[name][1]),
                key=lambda question: len(self._llm.tokenizer(question)["input_ids"]),
            )
            read = prefill(
                self._llm,
                text,
                longest,
                question_aware=False,
                truncate=self._truncate,
                answer_tokens=self._max_new_tokens,
                **recording,
                on_layer=stopper(stop),
            )
            self._read = (name, wanted, read)
        return self._read[2]

    def _for_first(
        self, method: CompressionMethod, read: Prefill, question: str, stop: Stop
    ) -> Retention:
        """The places of the document that a method keeps for the first question."""
        name = key([method.name, method.parameters])
        if name not in self._chosen:
            if self._first is None:
                self._first = with_question(self._llm, read, question, stopper(stop))
            self._chosen[name] = chosen_for(method, self._first, read.length)
        return self._chosen[name]


@torch.inference_mode()
def chosen_for(method: CompressionMethod, first: Prefill, length: int) -> Retention:
    """What a method keeps of a document's `length` tokens for the question behind it: the question
    votes and is not kept, so its places go to the document."""
    assert isinstance(method, EvictingMethod)
    behind = ((length, first.length),)
    chosen = replace(method, evicted=behind).select(first.layers)
    return replace(chosen, prompt_length=length)


def said(run: Run, full: Run, asked: Asked) -> Row:
    """What a journal keeps of one answer; `found` where it is known what it should hold."""
    agreed = agreement(run, full)
    row: Row = {
        "answer": run.answer,
        "tokens": len(run.token_ids),
        "token_match": round(agreed.token_match, 6),
        "rouge_l": round(agreed.rouge_l, 6),
        "kv_bytes": run.kv_bytes,
        "kept_fraction": round(run.kept_fraction, 6),
    }
    if asked.answers:
        row["found"] = contains_any(run.answer, asked.answers)
    return row


def require_documents(documents: Documents) -> None:
    """Raise ValueError where there is nothing to ask."""
    for name, (text, asked) in documents.items():
        if not text.strip():
            raise ValueError(f"the document {name} is empty; enter some text")
        if len(asked) < 2:
            raise ValueError(f"the document {name} needs at least 2 questions; add some")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
