"""Task-awareness, measured: the same documents, several kinds of question, what each layer keeps.
 A budget profile is each layer's share of all kept tokens. Two profiles are compared by the total
variation distance: the share of the budget that would have to move to another layer. If allocation
follows the task, profiles of one kind lie closer together, over documents, than profiles of
different kinds. Kinds that suit few documents, such as completing code, make that comparison one of
documents too; the distance on the same document, and the separation over the kinds that both
documents of a pair meet, are free of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dynamickv.answer import preview, recording_for
from dynamickv.evaluate.data import data_file
from dynamickv.evaluate.experiment import Row, Stop, Unit, of_model, stopper
from dynamickv.evaluate.statistics import RESAMPLES, bootstrap
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import prefill
from dynamickv.record.trace import Retained

QUESTIONS = "questions.json"
"""Beside a folder's texts: document -> kind -> question, for documents with questions of their
own."""


def read_documents(folder: Path) -> dict[str, str]:
    """Name -> text of every .txt file in a folder.

    Raises:
        ValueError: no such folder, or no text in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one with .txt files")
    try:
        texts = {path.stem: path.read_text("utf-8-sig") for path in sorted(folder.glob("*.txt"))}
    except UnicodeDecodeError:
        raise ValueError(f"a text in {folder} is not UTF-8; save it as plain text first") from None
    if not texts:
        raise ValueError(f"the folder {folder} holds no .txt files; put some texts into it")
    return texts


def read_questions(folder: Path, documents: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Document -> kind -> question from the folder's questions.json; empty without one.

    Raises:
        ValueError: no such table, or a document that the folder lacks.
    """
    path = folder / QUESTIONS
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend or remove it") from None
    if not isinstance(table, dict) or not all(map(is_questions, table.values())):
        raise ValueError(f"{path} is no table from document to kind to question; mend or remove it")
    for name in table:
        if name not in documents:
            raise ValueError(
                f"{path} has questions for {name!r}, but there is no {name}.txt; add it"
            )
    return table


def shared_questions() -> dict[str, str]:
    """Kind -> question, for documents without questions of their own."""
    return dict(data_file("task_kinds.json"))


def is_questions(table: Any) -> bool:
    """Whether it is a table from kinds to questions."""
    return (
        isinstance(table, dict)
        and len(table) > 0
        and all(isinstance(text, str) and text.strip() for text in table.values())
    )


class TaskExperiment:
    """Every document with its kinds of question; nothing is decoded."""

    def __init__(
        self,
        llm: LoadedModel,
        documents: Mapping[str, str],
        questions: Mapping[str, str] | None = None,
        own: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """`questions` by the name of their kind; without them those of task_kinds.json, which fit
        any text. `own`: for some documents, questions that they meet instead."""
        self._llm, self._documents = llm, dict(documents)
        shared, own = dict(questions or shared_questions()), own or {}
        self._questions = {name: dict(own.get(name, shared)) for name in self._documents}
        if not self._documents:
            raise ValueError("there is no document; give at least one")
        kinds = {kind for asked in self._questions.values() for kind in asked}
        if len(kinds) < 2:
            raise ValueError(f"tasks need at least 2 questions, got {len(kinds)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on besides document, kind and method."""
        return {
            "experiment": "tasks",
            **of_model(self._llm),
        }

    def units(self) -> list[Unit]:
        """Every document with every question it meets, both also by a hash of their text."""
        return [
            {"document": name, "kind": kind, "prompt": _digest(text + "\0" + question)}
            for name, text in self._documents.items()
            for kind, question in self._questions[name].items()
        ]

    def size(self, unit: Unit) -> float:
        """Characters."""
        return float(len(self._documents[unit["document"]]))

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """Budgets per layer, and which of the document's tokens are kept."""
        read = prefill(
            self._llm,
            self._documents[unit["document"]],
            self._questions[unit["document"]][unit["kind"]],
            truncate=True,
            **recording_for(methods),
            on_layer=stopper(stop),
        )
        # The document's last token may join what follows it, so it is left out.
        end = read.prompt.document_span[1] - 1
        runs = []
        for method in methods:
            seen = preview(method, read)
            runs.append(
                {
                    "method": method.name,
                    "parameters": method.parameters,
                    "budgets": seen.budgets,
                    "kept_fraction": round(seen.kept_fraction, 6),
                    "kv_bytes": seen.kv_bytes,
                    "heads": int(seen.mask.shape[1]),
                    "kept": Retained.pack(seen.mask[:, :, :end]).bits,
                }
            )
        return {"prompt_tokens": read.length, "document_tokens": end, "runs": runs}


def tasks_summary(rows: Sequence[Row], method: str = "DynamicKV") -> Row:
    """What the task does to one method's budgets.

    Returns:
        kinds, documents, `asked` (kind -> number of its documents), `budgets` (kind -> mean tokens
        per layer), `profiles` (kind -> mean share per layer), `distance`, and `moved` (kind -> kind
        -> mean share of the first one's kept document tokens that the second does not keep, where
        a document meets both). `distance` holds the means `within` (same kind, other document),
        `across` (other kind, other document), `same_document` (other kind) with
        `same_document_interval`, and `separation`: across - within over the kinds that both
        documents of a pair meet, with `interval`. Both are 95 % bootstrap intervals over
        documents. `even` tells whether every document meets every kind.

    Raises:
        ValueError: no run of that method.
    """
    runs: dict[str, dict[str, tuple[Row, Row]]] = {}
    for row in rows:
        for run in row["runs"]:
            if run["method"] == method:
                held = runs.setdefault(row["unit"]["document"], {})
                held[row["unit"]["kind"]] = (row, run)
    if not runs:
        raise ValueError(f"no run of {method} was measured; choose another method")
    kinds = list(dict.fromkeys(kind for held in runs.values() for kind in held))
    budgets = {
        kind: np.mean([held[kind][1]["budgets"] for held in runs.values() if kind in held], axis=0)
        for kind in kinds
    }
    profiles = {
        document: {kind: _profile(run["budgets"]) for kind, (_, run) in held.items()}
        for document, held in runs.items()
    }
    return {
        "method": method,
        "kinds": kinds,
        "documents": list(runs),
        "asked": {kind: sum(kind in held for held in runs.values()) for kind in kinds},
        "budgets": {kind: [round(float(b), 3) for b in values] for kind, values in budgets.items()},
        "profiles": {
            kind: np.mean([p[kind] for p in profiles.values() if kind in p], axis=0).tolist()
            for kind in kinds
        },
        "distance": _distances(profiles),
        "moved": _moved(runs, kinds),
    }


def _distances(profiles: Mapping[str, Mapping[str, np.ndarray]]) -> Row:
    documents, kinds = list(profiles), {kind for held in profiles.values() for kind in held}
    within, across = {}, {}
    gains: dict[tuple[str, ...], float] = {}
    for pair in combinations(sorted(profiles), 2):
        one, other = (profiles[name] for name in pair)
        both = [kind for kind in one if kind in other]
        near = _mean([_distance(one[kind], other[kind]) for kind in both])
        within[pair] = near
        across[pair] = _mean([_distance(one[a], other[b]) for a in one for b in other if a != b])
        fair = _mean([_distance(one[a], other[b]) for a in both for b in both if a != b])
        if fair is not None and near is not None:
            gains[pair] = fair - near
    same_document = [
        [_distance(held[a], held[b]) for a, b in combinations(held, 2)]
        for held in profiles.values()
        if len(held) > 1
    ]
    per_document = [float(np.mean(values)) for values in same_document]
    result: Row = {
        "documents": len(documents),
        "even": all(held.keys() == kinds for held in profiles.values()),
        "within": _mean([value for value in within.values() if value is not None]),
        "across": _mean([value for value in across.values() if value is not None]),
        "same_document": _mean(per_document),
        "same_document_interval": None,
        "separation": _mean(list(gains.values())),
        "interval": None,
    }
    if len(per_document) > 1:
        result["same_document_interval"] = list(bootstrap([per_document]))
    if gains:
        result["interval"] = _interval_of_pairs(documents, gains)
    return result


def _interval_of_pairs(
    documents: Sequence[str], values: Mapping[tuple[str, ...], float]
) -> list[float]:
    """95 % bootstrap interval, over documents, of the mean over pairs of them."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = [documents[place] for place in rng.integers(0, len(documents), len(documents))]
        pairs = [tuple(sorted(pair)) for pair in combinations(drawn, 2) if pair[0] != pair[1]]
        held = [values[pair] for pair in pairs if pair in values]
        if held:
            means.append(np.mean(held))
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def _moved(runs: Mapping[str, Mapping[str, tuple[Row, Row]]], kinds: Sequence[str]) -> Row:
    shares: dict[str, dict[str, list[float]]] = {a: {b: [] for b in kinds} for a in kinds}
    for held in runs.values():
        end = min(row["document_tokens"] for row, _ in held.values())
        kept = {
            kind: Retained(heads=run["heads"], bits=run["kept"]).unpack(
                len(run["budgets"]), row["document_tokens"]
            )[:, :, :end]
            for kind, (row, run) in held.items()
        }
        for first, mine in kept.items():
            for second, theirs in kept.items():
                shares[first][second].append(float((mine & ~theirs).sum() / max(mine.sum(), 1)))
    return {a: {b: _mean(values) for b, values in held.items()} for a, held in shares.items()}


def _profile(budgets: Sequence[int]) -> np.ndarray:
    values = np.asarray(budgets, float)
    shares: np.ndarray = values / values.sum()
    return shares


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).sum() / 2)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
