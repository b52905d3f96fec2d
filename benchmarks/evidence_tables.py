"""Journals of `benchmarks.evidence_run` -> assets/evidence/models.json -> tables.

A cell is one task, or one length of needles, on one model. Cells in which FullKV finds less than
half are not counted. Differences are between answers to the same prompt, at equal capacity; their
95 % intervals are bootstrapped over prompts.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.evidence_run import MODELS, OURS, PARTS, RIVALS
from benchmarks.report import markdown
from dynamickv.evaluate.statistics import bootstrap
from dynamickv.evaluate.summary import needle_summary

Row = dict[str, Any]
Scores = dict[str, list[float | None]]
NAMES = {
    "qwen": "Qwen2.5-Coder-0.5B",
    "gemma": "Gemma-3-270M",
    "smollm2": "SmolLM2-135M",
}
HEADS = {"qwen": 24 * 2, "gemma": 18 * 1, "smollm2": 30 * 3}
"""KV heads of all layers."""
LEAST = 0.5
"""FullKV's share below which a cell is not counted."""
FEWEST = 10
"""Prompts of cells that are not counted, below which they get no table: resampling some few that
agree gives an interval that says nothing."""
GRADED = ("multi_news", "passage_retrieval_zh")
"""Parts whose scores are not found or not found: all their cells count."""
TITLES = {
    "needle": "Needles in news articles, found",
    "needle-plain": "The same without a chat template",
    "multikey": "RULER's niah_multikey_3, 4K tokens, found",
    "multikey-chat": "The same in the chat template",
    "ruler": "RULER's other needle tasks, 4K tokens, found",
    "multi_news": "LongBench's multi_news, ROUGE-L",
    "multi_news-chat": "The same in the chat template",
    "passage_retrieval_zh": "LongBench's passage_retrieval_zh",
    "passage_retrieval_zh-chat": "The same in the chat template",
}


def read_journals(folder: Path) -> dict[tuple[str, str], list[Row]]:
    """(model, part) -> every prompt once, its runs joined."""
    found: dict[tuple[str, str], list[Row]] = {}
    for model in MODELS:
        for name in dict.fromkeys(part for _, part, _ in PARTS):
            rows: dict[str, Row] = {}
            for row in _lines(folder / model, name):
                if "unit" not in row:
                    continue
                place = json.dumps(row["unit"], sort_keys=True)
                known = rows.setdefault(place, {**row, "runs": []})
                held = [(run["method"], run["parameters"]) for run in known["runs"]]
                known["runs"] += [
                    run for run in row["runs"] if (run["method"], run["parameters"]) not in held
                ]
            if rows:
                found[model, name] = list(rows.values())
    return found


def _lines(folder: Path, part: str) -> Iterable[Row]:
    """Of all processes that measured something of a part."""
    for path in sorted(folder.glob(f"{part}*.jsonl")):
        if path.name.split(".")[0] != part:
            continue
        for line in path.read_text("utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # the last line of a process that was stopped


def collect(packed: Path, folder: Path) -> Row:
    """All that tables are made of: scores per prompt, without the answers."""
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    journals = folder / "journals"
    about = {
        path.parent.name: {
            **json.loads(path.read_text("utf-8")),
            "model": SHORT[path.parent.name],
        }
        for path in sorted(journals.glob("*/about.json"))
    }
    parts = [
        {"model": model, "part": part, "cells": _turns(rows) if part == "turns" else _cells(rows)}
        for (model, part), rows in read_journals(journals).items()
    ]
    return {"circumstances": about, "parts": parts}


def _cells(rows: Sequence[Row]) -> list[Row]:
    """Scores by cell, method and capacity, prompts in one order."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(str(row["unit"].get("length") or row["unit"].get("task")), []).append(row)
    found = []
    for name, held in cells.items():
        held = sorted(held, key=lambda row: json.dumps(row["unit"], sort_keys=True))
        series: dict[tuple[str, int | None, str], list[tuple[int, Row]]] = {}
        for place, row in enumerate(held):
            for run in row["runs"]:
                at = run["parameters"]
                key = run["method"], at.get("capacity"), at.get("granularity", "kv_head")
                series.setdefault(key, []).append((place, run))
        runs = [
            {
                "method": method,
                "capacity": capacity,
                "granularity": granularity,
                "scores": _placed(len(held), pairs),
                "kv_bytes": round(mean(run["kv_bytes"] for _, run in pairs)),
            }
            for (method, capacity, granularity), pairs in series.items()
        ]
        found.append({"cell": name, "prompts": len(held), "runs": runs})
    return sorted(found, key=lambda cell: (len(cell["cell"]), cell["cell"]))


def _placed(count: int, pairs: Sequence[tuple[int, Row]]) -> list[float | None]:
    scores: list[float | None] = [None] * count
    for place, run in pairs:
        value = run["exact"] if "exact" in run else run["score"]
        scores[place] = round(float(value), 4)
    return scores


def _turns(rows: Sequence[Row]) -> list[Row]:
    """What was found after the first question, by cache, as cells."""
    found = []
    later = sorted(
        (row for row in rows if row["unit"]["turn"] > 0),
        key=lambda row: json.dumps(row["unit"], sort_keys=True),
    )
    for way in ("first", "blind", "anew"):
        runs: dict[tuple[str, int | None], Row] = {}
        for place, row in enumerate(later):
            for run in row["runs"]:
                if "found" not in run[way]:
                    continue
                key = run["method"], run["parameters"].get("capacity")
                line = runs.setdefault(
                    key,
                    {
                        "method": key[0],
                        "capacity": key[1],
                        "granularity": "kv_head",
                        "scores": [None] * len(later),
                        "kv_bytes": run[way]["kv_bytes"],
                    },
                )
                line["scores"][place] = float(run[way]["found"])
        found.append(
            {
                "cell": way,
                "prompts": len(later),
                "documents": [row["unit"]["document"] for row in later],
                "runs": list(runs.values()),
            }
        )
    return found


def counted(part: Row) -> list[Row]:
    """The cells of a part that the model can do."""
    if part["part"].removesuffix("-chat") in GRADED:
        return list(part["cells"])
    return [cell for cell in part["cells"] if (ceiling(cell) or 0.0) >= LEAST]


def ceiling(cell: Row) -> float | None:
    """FullKV's mean."""
    return _mean(_scores([cell], "FullKV", None))


def _scores(
    cells: Sequence[Row], method: str, capacity: int | None, granularity: str = "kv_head"
) -> list[float | None]:
    """Of all prompts of some cells, in their order."""
    found: list[float | None] = []
    for cell in cells:
        run = _run(cell, method, capacity, granularity)
        found += [None] * cell["prompts"] if run is None else run["scores"]
    return found


def _run(cell: Row, method: str, capacity: int | None, granularity: str) -> Row | None:
    asked = method, capacity, granularity
    for run in cell["runs"]:
        if (run["method"], run["capacity"], run["granularity"]) == asked:
            found: Row = run
            return found
    return None


def _by_document(cell: Row, scores: Sequence[float | None]) -> list[float | None]:
    """Means over the questions of each document, which go together."""
    held: dict[str, list[float | None]] = {}
    for name, score in zip(cell["documents"], scores, strict=True):
        held.setdefault(name, []).append(score)
    return [_mean(found) for found in held.values()]


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return mean(known) if known else None


def difference(
    mine: Sequence[float | None], theirs: Sequence[float | None]
) -> tuple[float, float, float, int] | None:
    """Mean, its interval, and how many prompts have both."""
    gains = [a - b for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    return None if not gains else (mean(gains), *bootstrap([gains]), len(gains))


def best_rival(cells: Sequence[Row], capacity: int) -> str | None:
    """The paper's method with the highest mean."""
    means = {name: _mean(_scores(cells, name, capacity)) for name in RIVALS}
    known = {name: value for name, value in means.items() if value is not None}
    return max(known, key=lambda name: known[name]) if known else None


def answered(part: Row) -> list[Row]:
    """Of the cells that do not count, the prompts that FullKV answers."""
    kept = counted(part)
    cells = []
    for cell in part["cells"]:
        full = _scores([cell], "FullKV", None)
        places = [place for place, score in enumerate(full) if score == 1]
        if cell not in kept and places:
            runs = [
                {**run, "scores": [run["scores"][place] for place in places]}
                for run in cell["runs"]
            ]
            cells.append({"cell": cell["cell"], "prompts": len(places), "runs": runs})
    return cells


def part_lines(part: Row, cells: Sequence[Row]) -> list[list[str]]:
    """Per capacity: every method's mean over these cells, and how ours stand to the best rival."""
    capacities = sorted({r["capacity"] for c in cells for r in c["runs"] if r["capacity"]})
    methods = [
        name
        for name in (*RIVALS, *OURS)
        if any(run["method"] == name for cell in cells for run in cell["runs"])
    ]
    ours = [name for name in OURS if name in methods]
    head = ["model", "capacity", "KiB", "FullKV", *methods, "best rival"]
    head += [f"{name} over it" for name in ours]
    lines = [head]
    for capacity in capacities:
        rival = best_rival(cells, capacity)
        told = [
            _told(difference(_scores(cells, name, capacity), _scores(cells, rival, capacity)))
            if rival
            else "-"
            for name in ours
        ]
        lines.append(
            [
                NAMES[part["model"]],
                str(capacity),
                _bytes_told(part, cells, capacity),
                _percent(_mean(_scores(cells, "FullKV", None))),
                *(_percent(_mean(_scores(cells, name, capacity))) for name in methods),
                rival or "-",
                *told,
            ]
        )
    return lines


def _bytes_told(part: Row, cells: Sequence[Row], capacity: int) -> str:
    """Fewest and most that a method holds per KV head, KiB."""
    held: dict[str, list[int]] = {}
    for run in (run for cell in cells for run in cell["runs"]):
        if run["capacity"] == capacity and run["granularity"] == "kv_head":
            held.setdefault(run["method"], []).append(run["kv_bytes"])
    if not held:
        return "-"
    means = [mean(of_cells) for of_cells in held.values()]
    ends = (f"{end / HEADS[part['model']] / 1024:.1f}" for end in (min(means), max(means)))
    return " to ".join(dict.fromkeys(ends))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _told(found: tuple[float, float, float, int] | None) -> str:
    if found is None:
        return "-"
    gain, low, high, _ = found
    return f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def section(record: Row) -> list[str]:
    """All tables, as Markdown."""
    texts = []
    for name, title in TITLES.items():
        parts = [part for part in record["parts"] if part["part"] == name]
        tables = [part_lines(part, cells) for part in parts if (cells := counted(part))]
        if parts:
            told = "; ".join(filter(None, map(_cells_told, parts)))
            texts.append(f"{title}, per cent. {told}.")
        if tables:
            texts.append(markdown(_joined(tables)))
        for part in parts:
            cells = answered(part)
            number = sum(cell["prompts"] for cell in cells)
            if number >= FEWEST:
                told = f"the {number} of {NAMES[part['model']]}'s prompts that FullKV answers there"
                texts += [f"Of cells that are not counted, {told}:",
                          markdown(part_lines(part, cells))]  # fmt: skip
    both = protocol_lines(record["parts"])
    if len(both) > 1:
        texts += [
            "FullKV in both protocols, the same tasks, per cent.",
            markdown(both),
        ]
    heads = [part for part in record["parts"] if part["part"] == "heads"]
    if heads:
        texts += [
            "One choice per query head stores every query head. Needles of 2K and 4K tokens, "
            "found, per cent; differences are those to one choice per KV head at the same capacity "
            f"and at the same bytes. {'; '.join(map(_cells_told, heads))}.",
            markdown(_joined([heads_lines(part) for part in heads if counted(part)])),
        ]
    turns = [part for part in record["parts"] if part["part"] == "turns"]
    if turns:
        texts += [
            "Several questions about each text of assets/tasks: found after the first question, "
            "per cent, from the cache of the first question, from one chosen before any question, "
            "and from one chosen anew. Means of the texts' means, and intervals over texts, as the "
            f"questions of a text go together. {'; '.join(map(_turns_told, turns))}.",
            markdown(_joined([turns_lines(part) for part in turns if counted(part)])),
        ]
    return texts


PLAIN = {"needle-plain": "needle"}
"""Parts without the template whose other one has no suffix."""


def protocol_lines(parts: Sequence[Row]) -> list[list[str]]:
    """FullKV with and without the chat template, over the cells that both have."""
    held = {(part["model"], part["part"]): part for part in parts}
    lines = [["model", "task", "prompts", "without template", "in the chat template"]]
    for model, name in held:
        if name in PLAIN:
            plain, chat = held[model, name], held.get((model, PLAIN[name]))
        elif name.endswith("-chat"):
            plain, chat = held.get((model, name.removesuffix("-chat"))), held[model, name]
        else:
            continue
        if plain is None or chat is None:
            continue
        shared = {c["cell"] for c in plain["cells"]} & {c["cell"] for c in chat["cells"]}
        scores = [
            _scores([c for c in part["cells"] if c["cell"] in shared], "FullKV", None)
            for part in (plain, chat)
        ]
        counts = dict.fromkeys(str(len(side)) for side in scores)
        task = PLAIN.get(name, name.removesuffix("-chat"))
        lines.append(
            [NAMES[model], task, " and ".join(counts), *(_percent(_mean(side)) for side in scores)]
        )
    return lines


def _turns_told(part: Row) -> str:
    """How many questions, or why they are not counted."""
    cell = part["cells"][-1]
    texts = len(set(cell["documents"]))
    about = f"{texts} text{'' if texts == 1 else 's'}"
    told = f"{NAMES[part['model']]}: {cell['prompts']} questions about {about}"
    return told if counted(part) else f"{told}, not counted (FullKV {_percent(ceiling(cell))})"


def _joined(tables: Sequence[list[list[str]]]) -> list[list[str]]:
    """One table of several; columns that one lacks are "-"."""
    head = list(dict.fromkeys(name for table in tables for name in table[0]))
    lines = [head]
    for table in tables:
        for line in table[1:]:
            held = dict(zip(table[0], line, strict=True))
            lines.append([held.get(name, "-") for name in head])
    return lines


def _cells_told(part: Row) -> str:
    """How many prompts, of which cells, and which are not counted."""
    kept = counted(part)
    names = ", ".join(_cell_name(cell) for cell in kept)
    prompts = sum(cell["prompts"] for cell in kept)
    left = [cell for cell in part["cells"] if cell not in kept]
    without = ", ".join(f"{_cell_name(c)} (FullKV {_percent(ceiling(c))})" for c in left)
    told = f"{NAMES[part['model']]}: {prompts} prompts" + (f" ({names})" if names else "")
    return told + (f", not counted: {without}" if without else "")


def _cell_name(cell: Row) -> str:
    name = str(cell["cell"])
    return f"{int(name):,} tokens" if name.isdigit() else name


def heads_lines(part: Row) -> list[list[str]]:
    """Per method: one choice per query head beside one per KV head."""
    cells = counted(part)
    runs = [run for cell in cells for run in cell["runs"] if run["granularity"] == "kv_head"]
    capacities = sorted({run["capacity"] for run in runs if run["capacity"]})
    head = ["model", "method", "query heads, 64", "KV heads, 64", "query heads over it"]
    head += ["KV heads, same bytes", "query heads over that"]
    lines = [head]
    if len(capacities) < 2:
        return lines
    nominal, equal = capacities[0], capacities[-1]
    for name in ("SnapKV", "PyramidKV", "DynamicKV", *OURS):
        each = _scores(cells, name, nominal, "query_head")
        if _mean(each) is None:
            continue
        same, wide = _scores(cells, name, nominal), _scores(cells, name, equal)
        lines.append(
            [
                NAMES[part["model"]],
                name,
                _percent(_mean(each)),
                _percent(_mean(same)),
                _told(difference(each, same)),
                f"{_percent(_mean(wide))} at {equal}",
                _told(difference(each, wide)),
            ]
        )
    return lines


def turns_lines(part: Row) -> list[list[str]]:
    """Per method and capacity, the three caches."""
    cells = {cell["cell"]: cell for cell in part["cells"]}
    head = ["model", "method", "capacity", "first question's", "before any", "anew"]
    lines = [[*head, "anew over the first's", "anew over SnapKV's"]]
    for run in cells["anew"]["runs"]:
        key = run["method"], run["capacity"]
        first, blind, anew = (
            _by_document(cells[way], _scores([cells[way]], *key))
            for way in ("first", "blind", "anew")
        )
        rival = _by_document(cells["anew"], _scores([cells["anew"]], "SnapKV", key[1]))
        shares = [_percent(_mean(scores)) for scores in (first, blind, anew)]
        gains = [_told(difference(anew, other)) if key[1] else "-" for other in (first, rival)]
        lines.append([NAMES[part["model"]], key[0], str(key[1] or "all"), *shares, *gains])
    return lines


SHORT = {"qwen": "qwen2.5-coder-0.5b", "gemma": "gemma-3-270m", "smollm2": "smollm2-135m"}
PICTURED = ("FullKV", "StreamingLLM", "SnapKV", "PyramidKV", "DynamicKV", *OURS)
"""Methods and capacities of the needle picture."""
SIZES = (None, 64, 128, 256)


def write(packed: Path, folder: Path, target: Path) -> None:
    """assets/evidence/models.json, and the needle picture of the first model; SmolLM2's, which was
    there before, gets a name of its own."""
    record = collect(packed, folder)
    (target / "models.json").write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
    first = MODELS[0]
    journals = folder / "journals"
    rows = read_journals(journals).get((first, "needle"))
    if not rows:
        return
    picture, before = target / "needle.json", target / "needle-smollm2.json"
    if picture.is_file() and not before.is_file():
        picture.rename(before)
    for row in rows:
        row["runs"] = [
            run
            for run in row["runs"]
            if run["method"] in PICTURED and run["parameters"].get("capacity") in SIZES
        ]
    rows.sort(key=lambda row: json.dumps(row["unit"], sort_keys=True))
    told = (row["settings"] for row in _lines(journals / first, "needle") if "settings" in row)
    settings = next(told, None)
    if settings is None:
        raise ValueError(
            f"no {first}/needle.jsonl in {packed} says its settings; measure that part again"
        )
    known = {"settings": {**settings, "model": SHORT[first]}, "summary": needle_summary(rows)}
    # Journals from before the number was written down are of eight.
    shown = {"circumstances": {"processes": "8", **record["circumstances"][first]}, **known}
    picture.write_text(json.dumps(shown, ensure_ascii=False, indent=1) + "\n", "utf-8")
