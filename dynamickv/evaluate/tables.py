"""Summaries as lines of cells, which the page shows too, and as text; the paper's figures beside
ours."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from dynamickv.evaluate.data import data_file
from dynamickv.evaluate.datasets import task_of
from dynamickv.evaluate.summary import Row
from dynamickv.evaluate.verdict import FEWEST as FEWEST
from dynamickv.evaluate.verdict import headline as headline
from dynamickv.evaluate.verdict import standing as standing

Lines = list[list[str]]
"""A head and its rows."""

ORDER = ("FullKV", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "DynamicKV")
"""The columns of the paper's tables."""


def needle_lines(summary: Sequence[Row]) -> Lines:
    """Method, capacity, exact score with its interval, fuzzy score, cost, difference to SnapKV."""
    head = [
        "method",
        "capacity",
        "exact",
        "95 % interval",
        "fuzzy",
        "kept",
        "KV MiB",
        "over SnapKV",
    ]
    return [head] + [
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


def needle_paper_lines(summary: Sequence[Row]) -> Lines:
    """The paper's percents, and ours in its layout: a row a capacity."""
    paper = data_file("paper.json")["needle"]
    ours = [
        (
            "here, whole cache" if size is None else f"here, capacity {size}",
            {row["method"]: row["exact"] for row in rows},
        )
        for size, rows in blocks_by_capacity(summary)
    ]
    theirs = {method: value / 100 for method, value in paper["percent"].items()}
    return _beside([(f"paper: {paper['label']}", theirs), *ours], "{:.0f} %")


def needle_table(summary: Sequence[Row]) -> str:
    """All of it as text."""
    said = standing(summary, "exact")
    tables = [aligned(needle_lines(summary)), aligned(needle_paper_lines(summary))]
    return "\n\n".join([*tables, *(["\n".join(said)] if said else [])])


def longbench_lines(rows: Sequence[Row]) -> Lines:
    """One capacity in the paper's layout: a row a method, a column a task; percents."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    head = ["method", *tasks, "average", "95 % interval", "kept", "over SnapKV", "repeated"]
    return [head] + [
        [
            row["method"],
            *(_score(row["tasks"].get(task)) for task in tasks),
            _percent(row["average"], ""),
            _range(row["interval"], ""),
            _percent(row["kept_fraction"]),
            _gain(row["over_snapkv"], ""),
            "-" if row.get("repetition") is None else _percent(row["repetition"]),
        ]
        for row in rows
    ]


def longbench_paper_lines(summary: Sequence[Row]) -> Lines:
    """The paper's averages at its capacity, and ours over LongBench's tasks in its layout: a row a
    capacity. Nothing where none of the tasks is LongBench's."""
    tasks = [task for task in {t for row in summary for t in row["tasks"]} if task_of(task)]
    if not tasks:
        return []
    paper = data_file("paper.json")["longbench"]
    theirs = [
        (f"paper: {model}, {paper['capacity']}", {k: v / 100 for k, v in row.items()})
        for model, row in paper["rows"].items()
    ]
    ours = [
        (
            f"here: {len(tasks)} task{'' if len(tasks) == 1 else 's'}, {size or 'whole cache'}",
            {
                row["method"]: mean(scores)
                for row in rows
                if (scores := [row["tasks"][t]["score"] for t in tasks if t in row["tasks"]])
            },
        )
        for size, rows in blocks_by_capacity(summary)
    ]
    return _beside([*theirs, *ours], "{:.2f}")


def longbench_table(summary: Sequence[Row]) -> str:
    """All of it as text: one block per capacity, then the paper's rows with ours."""
    blocks = [
        f"{'whole cache' if size is None else f'capacity {size}'}\n{aligned(longbench_lines(rows))}"
        for size, rows in blocks_by_capacity(summary)
    ]
    blocks.append("\n".join(longbench_notes(summary)))
    if paper := longbench_paper_lines(summary):
        title = data_file("paper.json")["longbench"]["title"]
        blocks.append(f"the paper: {title}\n{aligned(paper)}")
    return "\n\n".join(blocks)


def longbench_notes(summary: Sequence[Row]) -> list[str]:
    """How long the prompts were in this model's tokens, and what the official scorer gave up on."""
    prompts = summary[0].get("prompts", {}) if summary else {}
    notes = [
        f"{task}: prompts of {least:,.0f} to {most:,.0f} tokens, median {middle:,.0f}"
        for task, (least, middle, most) in prompts.items()
    ]
    lost = sum(row.get("gave_up", 0) for row in summary)
    if lost:
        notes.append(
            f"{lost:.0f} answers count 0 because the official ROUGE scorer gives up on sentences "
            "of some 990 words."
        )
    return notes


def _beside(rows: Sequence[tuple[str, Mapping[str, float]]], form: str) -> Lines:
    """Rows of shares in the paper's order of methods, then others."""
    methods = list(dict.fromkeys(method for _, shares in rows for method in shares))
    methods.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return [["", *methods]] + [
        [title, *(form.format(100 * shares[m]) if m in shares else "-" for m in methods)]
        for title, shares in rows
    ]


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


def sweep_lines(lines: Sequence[Row]) -> Lines:
    """Method, capacity, agreement with FullKV, KL and bytes."""
    head = ["method", "capacity", "same tokens", "ROUGE-L", "KL nats", "kept", "KV MiB"]
    return [head] + [
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


def sweep_table(lines: Sequence[Row]) -> str:
    """The same as text."""
    return aligned(sweep_lines(lines))


def tasks_lines(summary: Mapping[str, Any]) -> Lines:
    """How many of the document tokens kept for one task are not kept for another."""
    kinds = summary["kinds"]
    head = ["kept for", *(f"not for {kind}" for kind in kinds)]
    return [head] + [[a, *(_percent(summary["moved"][a][b]) for b in kinds)] for a in kinds]


def tasks_sentences(summary: Mapping[str, Any]) -> list[str]:
    """The distances in words."""
    distance = summary["distance"]
    documents, kinds = distance["documents"], len(summary["kinds"])
    said = [f"{summary['method']} over {documents} documents, {kinds} tasks"]
    if not distance["even"]:
        counts = ", ".join(f"{kind} {number}" for kind, number in summary["asked"].items())
        said.append(f"documents per task: {counts}")
    for name, meaning in (
        ("within", "same task, other document"),
        ("across", "other task, other document"),
        ("same_document", "other task, same document"),
    ):
        if distance[name] is not None:
            said.append(f"budget that lies in other layers, {meaning}: {_percent(distance[name])}")
    if distance["same_document_interval"] is not None:
        said[-1] += f", 95 % interval {_range(distance['same_document_interval'])}"
    if distance["separation"] is not None:
        over = "" if distance["even"] else ", over the tasks that both documents meet"
        said.append(
            f"across minus within{over}: {_percent(distance['separation'])}, "
            f"95 % interval {_range(distance['interval'])}"
        )
    if not distance["even"]:
        said.append(
            "Tasks that suit few documents differ from the others in their documents too, so "
            "'other task, other document' holds both; 'same document' and 'across minus within' "
            "hold the task alone."
        )
    return said


def tasks_table(summary: Mapping[str, Any]) -> str:
    """All of it as text."""
    return "\n".join([*tasks_sentences(summary), "", aligned(tasks_lines(summary))])


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
