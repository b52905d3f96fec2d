"""Measured rows -> tables: plain JSON-ready data, which the command line prints and the page draws.
 Knows neither models nor files. Scores are shares from 0 to 1 here; LongBench's tables show
percents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median
from typing import Any

from dynamickv.evaluate.statistics import bootstrap, wilson

Row = dict[str, Any]
Series = dict[tuple[str, int | None], list[tuple[Row, Row]]]
"""(method, capacity) -> (unit's row, that method's run) in the units' order."""

YARDSTICK = "SnapKV"
"""The method whose difference at equal capacity is shown: it shares the budget evenly."""


def series(rows: Iterable[Row]) -> Series:
    """Runs by method and capacity; FullKV's capacity is None."""
    found: Series = {}
    for row in rows:
        for run in row["runs"]:
            place = (run["method"], run["parameters"].get("capacity"))
            found.setdefault(place, []).append((row, run))
    return found


def needle_summary(rows: Sequence[Row]) -> list[Row]:
    """Per method and capacity: mean exact score with Wilson's interval over all hidden values,
    fuzzy score, cost, difference to SnapKV, and the cells of its heatmap, each with the first
    `sample` of its lowest score."""
    found = series(rows)
    lines = []
    for (method, capacity), pairs in found.items():
        cells: dict[tuple[int, float], list[tuple[Row, Row]]] = {}
        for row, run in pairs:
            place = (row["unit"]["length"], row["unit"]["depth"])
            cells.setdefault(place, []).append((row, run))
        hits = sum(run["exact"] * len(row["expected"]) for row, run in pairs)
        trials = sum(len(row["expected"]) for row, _ in pairs)
        lines.append(
            {
                **_head(method, capacity, pairs),
                "trials": trials,
                "exact": hits / trials,
                "interval": list(wilson(hits, trials)),
                "fuzzy": mean(run["fuzzy"] for _, run in pairs),
                "over_snapkv": _difference(found, method, capacity, lambda run: run["exact"]),
                "cells": [
                    {
                        "length": length,
                        "depth": depth,
                        "exact": mean(run["exact"] for _, run in held),
                        "fuzzy": mean(run["fuzzy"] for _, run in held),
                        "samples": len(held),
                        "sample": _worst(held, "exact")["unit"]["sample"],
                    }
                    for (length, depth), held in cells.items()
                ],
            }
        )
    return lines


def longbench_summary(rows: Sequence[Row]) -> list[Row]:
    """Per method and capacity: every task's mean score with a bootstrap interval, the mean over
    tasks with its own, cost, difference to SnapKV, the example of its lowest score (`worst`), and
    what the scores do not show: how much of the answers is repetition, and on how many the official
    scorer gave up."""
    found = series(rows)
    lines = []
    for (method, capacity), pairs in found.items():
        tasks: dict[str, list[float]] = {}
        for row, run in pairs:
            tasks.setdefault(row["unit"]["task"], []).append(run["score"])
        lines.append(
            {
                **_head(method, capacity, pairs),
                "tasks": {
                    task: {
                        "score": mean(scores),
                        "interval": list(bootstrap([scores])),
                        "examples": len(scores),
                    }
                    for task, scores in tasks.items()
                },
                "repetition": mean(repeated) if (repeated := _told(pairs, "repetition")) else None,
                "gave_up": sum(_told(pairs, "gave_up")),
                "prompts": {task: _spread(pairs, task) for task in tasks},
                "average": mean(mean(scores) for scores in tasks.values()),
                "interval": list(bootstrap(list(tasks.values()))),
                "worst": str(_worst(pairs, "score")["unit"].get("id")),
                "over_snapkv": _difference(found, method, capacity, lambda run: run["score"]),
            }
        )
    return lines


def _worst(pairs: Sequence[tuple[Row, Row]], field: str) -> Row:
    """The first row of the lowest score."""
    return min(pairs, key=lambda pair: pair[1][field])[0]


def _spread(pairs: Sequence[tuple[Row, Row]], task: str) -> list[float]:
    """Least, median and most prompt tokens of a task."""
    tokens = [row["prompt_tokens"] for row, _ in pairs if row["unit"]["task"] == task]
    return [min(tokens), median(tokens), max(tokens)]


def _told(pairs: Sequence[tuple[Row, Row]], name: str) -> list[float]:
    """What the runs say that say it; earlier journals do not."""
    return [float(run[name]) for _, run in pairs if name in run]


def _head(method: str, capacity: int | None, pairs: Sequence[tuple[Row, Row]]) -> Row:
    runs = [run for _, run in pairs]
    matches = [run["agreement"]["token_match"] for run in runs if "agreement" in run]
    return {
        "method": method,
        "capacity": capacity,
        "kept_fraction": mean(run["kept_fraction"] for run in runs),
        "kv_bytes": mean(run["kv_bytes"] for run in runs),
        "token_match": mean(matches) if matches else None,
    }


def _difference(
    found: Series, method: str, capacity: int | None, score: Callable[[Row], float]
) -> Row | None:
    """Mean score above SnapKV's on the same units at the same capacity, with a bootstrap interval
    over the paired differences and how many there are; None where there is none."""
    theirs = {str(row["unit"]): score(run) for row, run in found.get((YARDSTICK, capacity), [])}
    gains: dict[str, list[float]] = {}
    for row, run in found[method, capacity]:
        if str(row["unit"]) in theirs:
            task = str(row["unit"].get("task"))
            gains.setdefault(task, []).append(score(run) - theirs[str(row["unit"])])
    if not gains or method == YARDSTICK:
        return None
    groups = list(gains.values())
    return {
        "mean": mean(mean(group) for group in groups),
        "interval": list(bootstrap(groups)),
        "pairs": sum(map(len, groups)),
    }
