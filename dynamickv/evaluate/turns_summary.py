"""Answers to several questions -> a table: how much the cache of the first question loses on the
next ones, and what choosing anew gives back.

Knows neither models nor files. Differences are between answers to the same question; intervals are
95 % bootstrap intervals over documents, whose questions go together, and over questions where there
is one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from dynamickv.evaluate.statistics import bootstrap
from dynamickv.evaluate.summary import Row, series
from dynamickv.evaluate.tables import Lines, aligned

NAMES = {"first": "of the first question", "blind": "without a question", "anew": "chosen anew"}
WAYS = tuple(NAMES)
"""Where the cache that answers comes from."""
SCORES = ("found", "token_match", "rouge_l")
By = dict[str, list[float]]
"""Values of the questions, by document."""


def turns_summary(rows: Sequence[Row]) -> list[Row]:
    """Per method, capacity and way: bytes held, and over the questions after the first the mean of
    every score, its interval, and the mean difference to the first question's cache with its own;
    `first_question` has the means of the question that cache was compressed for.

    `found` is over the questions whose answer is known; None where there is none.
    """
    lines = []
    for (method, capacity), pairs in series(rows).items():
        later = [(row, run) for row, run in pairs if row["unit"]["turn"] > 0]
        begun = [(row, run) for row, run in pairs if row["unit"]["turn"] == 0]
        for way in WAYS:
            line: Row = {
                "method": method,
                "capacity": capacity,
                "way": way,
                "documents": len({row["unit"]["document"] for row, _ in pairs}),
                "questions": len(later),
                "kv_bytes": mean(run[way]["kv_bytes"] for _, run in pairs),
                "kept_fraction": mean(run[way]["kept_fraction"] for _, run in pairs),
            }
            for score in SCORES:
                gains = None if way == "first" else _told(_by_document(later, way, score, "first"))
                line[score] = _told(_by_document(later, way, score))
                line[f"{score}_over_first"] = gains
            line["first_question"] = {
                score: _mean(_by_document(begun, way, score)) for score in SCORES
            }
            lines.append(line)
    return lines


def _by_document(
    pairs: Sequence[tuple[Row, Row]], way: str, score: str, less: str | None = None
) -> By:
    """A score of every question that has it, less that of the same question in another way."""
    found: By = {}
    for row, run in pairs:
        if score in run[way]:
            value = run[way][score] - (0 if less is None else run[less][score])
            found.setdefault(row["unit"]["document"], []).append(float(value))
    return found


def _mean(found: By) -> float | None:
    values = [value for values in found.values() for value in values]
    return mean(values) if values else None


def _told(found: By) -> Row | None:
    """The mean over documents of their means, its interval, and how much it rests on."""
    if not found:
        return None
    values = [mean(values) for values in found.values()]
    drawn = values if len(values) > 1 else next(iter(found.values()))
    return {
        "mean": mean(values),
        "interval": list(bootstrap([drawn])),
        "questions": sum(map(len, found.values())),
        "documents": len(values),
    }


def turns_lines(summary: Sequence[Row]) -> Lines:
    """Method, capacity, cache and bytes; what was found, of the first question and of the later
    ones; how close the later answers are to FullKV's; gains over the first question's cache."""
    head = ["method", "capacity", "cache", "KV MiB", "first found", "later found", "95 % interval"]
    head += ["over first", "later ROUGE-L", "over first"]
    return [head] + [
        [
            line["method"],
            "all" if line["capacity"] is None else str(line["capacity"]),
            NAMES[line["way"]] if line["capacity"] is not None else "any",
            f"{line['kv_bytes'] / 2**20:.2f}",
            _percent(line["first_question"]["found"]),
            _percent(line["found"] and line["found"]["mean"]),
            _interval(line["found"]),
            _signed(line["found_over_first"]),
            _percent(line["rouge_l"] and line["rouge_l"]["mean"], ""),
            _signed(line["rouge_l_over_first"]),
        ]
        for line in shown(summary)
    ]


def shown(summary: Sequence[Row]) -> list[Row]:
    """What keeps everything is the same on all three caches and shown once."""
    return [line for line in summary if line["capacity"] is not None or line["way"] == "anew"]


def turns_table(summary: Sequence[Row]) -> str:
    """All of it as text."""
    if not summary:
        return "nothing was measured"
    counts = summary[0]
    known = max((line["found"] or {"questions": 0})["questions"] for line in summary)
    said = (
        f"{counts['documents']} document{_s(counts['documents'])}, {counts['questions']} "
        f"question{_s(counts['questions'])} after the first"
    )
    return (
        f"{said}, {known} with a known answer; ROUGE-L to FullKV's answers, in percent\n\n"
        f"{aligned(turns_lines(summary))}"
    )


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _percent(share: float | None, unit: str = " %") -> str:
    return "-" if share is None else f"{100 * share:.1f}{unit}"


def _interval(told: Row | None) -> str:
    if told is None:
        return "-"
    low, high = told["interval"]
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _signed(told: dict[str, Any] | None) -> str:
    if told is None:
        return "-"
    low, high = told["interval"]
    return f"{100 * told['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
