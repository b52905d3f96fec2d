"""RULER's answers in the files of kvpress's evaluation (predictions.csv, metrics.json,
config.yaml), which its leaderboard is made of: written for every method and capacity, and read.

A folder is named as theirs: ruler, data, model, press and ratio, joined by two underscores. The
ratio is what was left out of the cache, in the mean. Scores are kvpress's (0.5): per cent of the
expected texts that the answer has, any one for tasks that begin with qa.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dynamickv.evaluate.datasets import Example
from dynamickv.evaluate.journal import write_whole
from dynamickv.evaluate.metrics import contains_all, contains_any

Row = dict[str, Any]
COLUMNS = ("task", "answer", "predicted_answer", "compression_ratio")
"""Of predictions.csv, in any order; kvpress writes the data's other columns too."""
BETWEEN = re.compile(r"(['\"])\s+(['\"])")
"""Between two texts of a printed array."""
CONTROL = dict.fromkeys(range(32))
"""Characters that kvpress takes out of an answer before it is scored."""


def write_results(
    folder: Path, examples: Sequence[Example], rows: Sequence[Row], model: str, data: str
) -> list[Path]:
    """A folder for every method and capacity that was measured; the folders.

    Args:
        rows: what the journal holds of these examples.
        data: name of the data, such as its length in tokens.

    Raises:
        ValueError: an example that is none of RULER's.
    """
    known = {(example.task, example.id): example for example in examples}
    for example in examples:
        if not example.ruler:
            raise ValueError(
                f"kvpress's files are of RULER, and {example.task!r} is none of its tasks; "
                "leave --kvpress out"
            )
    series: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        example = known[row["unit"]["task"], row["unit"]["id"]]
        for run in row["runs"]:
            line = {
                "task": example.task,
                "answer": example.answers,
                "predicted_answer": run["answer"],
                "compression_ratio": round(1 - run["kept_fraction"], 4),
            }
            series.setdefault((run["method"], run["parameters"].get("capacity")), []).append(line)
    return [
        _write(folder, method, capacity, lines, model, data)
        for (method, capacity), lines in series.items()
    ]


def _write(
    folder: Path, method: str, capacity: int | None, lines: list[Row], model: str, data: str
) -> Path:
    press = "no_press" if capacity is None else f"dynamickv_{method.lower()}_{capacity}"
    ratio = round(mean(line["compression_ratio"] for line in lines), 4)
    name = ["ruler", data, model.replace("/", "--"), press, f"{ratio:.2f}"]
    place = folder / "__".join(name)
    place.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_whole(place / "predictions.csv", text.getvalue())
    write_whole(place / "metrics.json", json.dumps(string_matches(lines), indent=4))
    config = {
        "dataset": "ruler",
        "data_dir": data,
        "model": model,
        "press_name": press,
        "compression_ratio": ratio,
        "fraction": 1.0,
        "compress_questions": True,
    }
    # JSON is YAML.
    write_whole(place / "config.yaml", json.dumps(config, indent=2) + "\n")
    return place


def read_predictions(path: Path) -> list[Row]:
    """The lines of a predictions.csv, kvpress's own or one written here, answers as lists.

    Raises:
        ValueError: a file without the columns that are scored, or answers that are no list.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines: list[Row] = list(csv.DictReader(file))
    for name in ("task", "answer", "predicted_answer"):
        if not lines or name not in lines[0]:
            raise ValueError(f"{path} has no column {name!r}; give kvpress's predictions.csv")
    for number, line in enumerate(lines, start=2):
        try:
            # An array of several texts is printed without commas between them.
            line["answer"] = list(ast.literal_eval(BETWEEN.sub(r"\1, \2", line["answer"])))
        except (SyntaxError, TypeError, ValueError):
            raise ValueError(
                f"{path}, line {number}: {line['answer']!r} is no list of answers; mend it"
            ) from None
    return lines


def string_matches(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Task -> {"string_match": per cent}, as kvpress's metrics.json."""
    tasks: dict[str, list[float]] = {}
    for line in lines:
        said = line["predicted_answer"].strip().translate(CONTROL).strip()
        judge = contains_any if line["task"].partition("_")[0] == "qa" else contains_all
        tasks.setdefault(line["task"], []).append(judge(said, line["answer"]))
    return {
        task: {"string_match": round(100 * sum(scores) / len(scores), 2)}
        for task, scores in sorted(tasks.items())
    }
