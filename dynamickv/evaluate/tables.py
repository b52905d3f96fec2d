"""Summaries as text: what the command line prints and writes, the paper's figures beside ours."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from dynamickv.evaluate.data import data_file

Row = dict[str, Any]


def needle_table(summary: Sequence[Row]) -> str:
    """Method, capacity, exact score with its interval, fuzzy score, kept share, difference to
    SnapKV; then the paper's row."""
    lines = [
        ["method", "capacity", "exact", "95 % interval", "fuzzy", "kept", "KV MiB", "over SnapKV"]
    ]
    lines += [
        [
            row["method"],
            _capacity(row),
            _percent(row["exact"]),
            _range(row["interval"]),
            _percent(row["fuzzy"]),
            _percent(row["kept_fraction"]),
            f"{row['kv_bytes'] / 2**20:.2f}",
            _gain(row["over_snapkv"]),
        ]
        for row in summary
    ]
    paper = data_file("paper.json")["needle"]
    figures = ", ".join(f"{method} {value} %" for method, value in paper["percent"].items())
    return f"{aligned(lines)}\n\nThe paper ({paper['title']}): {figures}"


def longbench_table(summary: Sequence[Row]) -> str:
    """One block per capacity in the paper's layout: a row a method, a column a task, percents; then
    the paper's rows at its capacity."""
    tasks = list(dict.fromkeys(task for row in summary for task in row["tasks"]))
    blocks = []
    for capacity, rows in blocks_by_capacity(summary):
        lines = [["method", *tasks, "average", "95 % interval", "kept", "over SnapKV"]]
        lines += [
            [
                row["method"],
                *(_score(row["tasks"].get(task)) for task in tasks),
                _percent(row["average"], ""),
                _range(row["interval"], ""),
                _percent(row["kept_fraction"]),
                _gain(row["over_snapkv"], ""),
            ]
            for row in rows
        ]
        title = "whole cache" if capacity is None else f"capacity {capacity}"
        blocks.append(f"{title}\n{aligned(lines)}")
    paper = data_file("paper.json")["longbench"]
    methods = list(next(iter(paper["rows"].values())))
    lines = [["model", *methods]]
    lines += [
        [model, *(f"{row[method]:.2f}" for method in methods)]
        for model, row in paper["rows"].items()
    ]
    blocks.append(f"the paper: {paper['title']}\n{aligned(lines)}")
    return "\n\n".join(blocks)


def longbench_csv(summary: Sequence[Row]) -> str:
    """A line per method, capacity and task, and one for the average; percents."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "method",
            "capacity",
            "task",
            "examples",
            "score",
            "low",
            "high",
            "kept_fraction",
            "kv_bytes",
        ]
    )
    for row in summary:
        cells = [
            *row["tasks"].items(),
            (
                "average",
                {
                    "examples": sum(cell["examples"] for cell in row["tasks"].values()),
                    "score": row["average"],
                    "interval": row["interval"],
                },
            ),
        ]
        for task, cell in cells:
            figures = [f"{100 * value:.4f}" for value in (cell["score"], *cell["interval"])]
            writer.writerow(
                [row["method"], _capacity(row), task, cell["examples"], *figures,
                 f"{row['kept_fraction']:.6f}", f"{row['kv_bytes']:.0f}"]
            )  # fmt: skip
    return text.getvalue()


def sweep_table(lines: Sequence[Row]) -> str:
    """Method, capacity, agreement with FullKV, KL and bytes."""
    table = [["method", "capacity", "same tokens", "ROUGE-L", "KL nats", "kept", "KV MiB"]]
    table += [
        [
            row["method"],
            str(row["capacity"]),
            _percent(row["token_match"]),
            f"{row['rouge_l']:.3f}",
            f"{row['kl_mean']:.4f}",
            _percent(row["kept_fraction"]),
            f"{row['kv_bytes'] / 2**20:.2f}",
        ]
        for row in lines
    ]
    return aligned(table)


def tasks_table(summary: Mapping[str, Any]) -> str:
    """The distances, and how many kept tokens one task has that another has not."""
    distance, kinds = summary["distance"], summary["kinds"]
    lines = [["kept for", *(f"not for {kind}" for kind in kinds)]]
    lines += [[a, *(_percent(summary["moved"][a][b]) for b in kinds)] for a in kinds]
    said = [f"{summary['method']} over {distance['documents']} documents, {len(kinds)} tasks"]
    for name, meaning in (
        ("within", "same task, other document"),
        ("across", "other task, other document"),
        ("same_document", "other task, same document"),
    ):
        if distance[name] is not None:
            said.append(f"budget that lies in other layers, {meaning}: {_percent(distance[name])}")
    if distance["separation"] is not None:
        said.append(
            f"across minus within: {_percent(distance['separation'])}, "
            f"95 % interval {_range(distance['interval'])}"
        )
    return "\n".join([*said, "", aligned(lines)])


def blocks_by_capacity(summary: Sequence[Row]) -> list[tuple[int | None, list[Row]]]:
    """FullKV's rows on top of every capacity's; alone if there is no other."""
    whole = [row for row in summary if row["capacity"] is None]
    sizes = sorted({row["capacity"] for row in summary if row["capacity"] is not None})
    if not sizes:
        return [(None, whole)]
    return [
        (size, [*whole, *(row for row in summary if row["capacity"] == size)]) for size in sizes
    ]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _capacity(row: Row) -> str:
    return "all" if row["capacity"] is None else str(row["capacity"])


def _percent(share: float | None, unit: str = " %") -> str:
    return "-" if share is None else f"{100 * share:.1f}{unit}"


def _range(interval: Sequence[float], unit: str = " %") -> str:
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}{unit}"


def _score(cell: Row | None) -> str:
    return "-" if cell is None else f"{100 * cell['score']:.2f}"


def _gain(difference: Row | None, unit: str = " points") -> str:
    if difference is None:
        return "-"
    low, high = difference["interval"]
    return f"{100 * difference['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){unit}"
