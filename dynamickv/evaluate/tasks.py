"""Task-awareness, measured: the same documents, several kinds of question, what each layer keeps.
 A budget profile is each layer's share of all kept tokens. Two profiles are compared by the total
variation distance: the share of the budget that would have to move to another layer. If allocation
follows the task, profiles of one kind lie closer together, over documents, than profiles of
different kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dynamickv.answer import preview
from dynamickv.evaluate.data import data_file
from dynamickv.evaluate.experiment import Row, Stop, Unit, stopper
from dynamickv.evaluate.statistics import RESAMPLES
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel
from dynamickv.prefill import TAIL, prefill
from dynamickv.trace import Retained

LEAST_DOCUMENTS = 5
"""Fewer documents give no distance within a kind worth showing."""


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


class TaskExperiment:
    """Every document with every kind of question; nothing is decoded."""

    def __init__(
        self,
        llm: LoadedModel,
        documents: Mapping[str, str],
        questions: Mapping[str, str] | None = None,
    ) -> None:
        """`questions` by the name of their kind; without them those of task_kinds.json, which fit
        any text."""
        self._llm, self._documents = llm, dict(documents)
        self._questions = dict(questions or data_file("task_kinds.json"))
        if not self._documents:
            raise ValueError("there is no document; give at least one")
        if len(self._questions) < 2:
            raise ValueError(f"tasks need at least 2 questions, got {len(self._questions)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on besides document, kind and method."""
        return {
            "experiment": "tasks",
            "model": self._llm.name,
            "revision": self._llm.revision,
            "dtype": self._llm.dtype,
        }

    def units(self) -> list[Unit]:
        """Every document with every question, both also by a hash of their text."""
        return [
            {"document": name, "kind": kind, "prompt": _digest(text + "\0" + question)}
            for name, text in self._documents.items()
            for kind, question in self._questions.items()
        ]

    def size(self, unit: Unit) -> float:
        """Characters."""
        return float(len(self._documents[unit["document"]]))

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """Budgets per layer, and which of the document's tokens are kept."""
        read = prefill(
            self._llm,
            self._documents[unit["document"]],
            self._questions[unit["kind"]],
            truncate=True,
            tail=max(TAIL, *(method.tail for method in methods)),
            mass=any(method.needs_mass for method in methods),
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
        kinds, documents, `budgets` (kind -> mean tokens per layer), `profiles` (kind -> mean share
        per layer), `distance` {within, across, same_document, separation, interval} where
        separation is across - within with a 95 % bootstrap interval over documents, and `moved`
        (kind -> kind -> mean share of the first one's kept document tokens that the second does not
        keep).

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
        "budgets": {kind: [round(float(b), 3) for b in values] for kind, values in budgets.items()},
        "profiles": {
            kind: np.mean([p[kind] for p in profiles.values() if kind in p], axis=0).tolist()
            for kind in kinds
        },
        "distance": _distances(profiles),
        "moved": _moved(runs, kinds),
    }


def _distances(profiles: Mapping[str, Mapping[str, np.ndarray]]) -> Row:
    documents = list(profiles)
    within, across = _by_pair(profiles, same=True), _by_pair(profiles, same=False)
    same_document = [
        _distance(held[a], held[b]) for held in profiles.values() for a, b in combinations(held, 2)
    ]
    result: Row = {
        "documents": len(documents),
        "within": _mean(list(within.values())),
        "across": _mean(list(across.values())),
        "same_document": float(np.mean(same_document)) if same_document else None,
        "separation": None,
        "interval": None,
    }
    if len(documents) < 2:
        return result
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(RESAMPLES):
        drawn = [documents[place] for place in rng.integers(0, len(documents), len(documents))]
        pairs = [tuple(sorted(pair)) for pair in combinations(drawn, 2) if pair[0] != pair[1]]
        if pairs:
            gains.append(
                np.mean([across[pair] for pair in pairs])
                - np.mean([within[pair] for pair in pairs])
            )
    result["separation"] = result["across"] - result["within"]
    result["interval"] = [float(bound) for bound in np.percentile(gains, [2.5, 97.5])]
    return result


def _by_pair(
    profiles: Mapping[str, Mapping[str, np.ndarray]], same: bool
) -> dict[tuple[str, ...], float]:
    """Mean distance per pair of documents, over their profiles of the same or of different
    kinds."""
    return {
        (first, second): float(
            np.mean(
                [
                    _distance(profiles[first][a], profiles[second][b])
                    for a in profiles[first]
                    for b in profiles[second]
                    if (a == b) == same
                ]
            )
        )
        for first, second in combinations(sorted(profiles), 2)
    }


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
