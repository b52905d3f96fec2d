"""The tables of docs/measured.md and README's headline figures, from benchmarks/results:
python -m benchmarks.readme.

A row of a results file may hold `minimum` and `maximum` of its rounds, and a file may hold `again`,
the measures that are to be measured again; the next run of the benchmark writes the file anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dynamickv as dkv
from benchmarks.report import RESULTS
from dynamickv.evaluate.turns_summary import turns_lines

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "measured.md"
MEASURED = "<!-- measured: python -m benchmarks.readme writes this -->", "<!-- /measured -->"
HEADLINES = "<!-- headlines: python -m benchmarks.readme writes this -->", "<!-- /headlines -->"
SECTIONS = {
    "start": ("Start", "make bench"),
    "convert": ("First conversion of a GGUF file", "python -m benchmarks.convert FILE.gguf"),
    "engine": ("Reading, choosing, decoding", "make bench"),
    "cpu": ('Precision "fast" on a CPU', "python -m benchmarks.cpu"),
    "what-if": ("Choosing again from one prefill", "python -m benchmarks.what_if"),
    "decoding": ("Long answers, several questions", "python -m benchmarks.decoding"),
    "decoding-h200": (
        "Long answers, several questions, on one GPU",
        "python -m benchmarks.decoding --device cuda --timed 30 --output decoding-h200",
    ),
    "film": ("Watching a run", "python -m benchmarks.film"),
    "batch": ("Several prompts in one batch", "python -m benchmarks.batch"),
    "evaluate": ("Six methods and one", "python -m benchmarks.evaluate"),
    "kvpress": ("Beside kvpress", "make kvpress"),
    "vllm": ("Inside vLLM", "make vllm"),
    "vllm-curve": ("Inside vLLM, over the size of the pool", "make vllm"),
    "soak-tiny": ("One server for hours, tiny model", "make soak"),
    "soak-real": ("One server for hours, SmolLM2", "make soak"),
    "spread": ("Several processes and GPUs", "python -m benchmarks.spread"),
    "spread-h200": ("A model over two GPUs", "python -m benchmarks.spread --parts model"),
    "beyond": ("A model larger than one GPU", "python -m benchmarks.beyond"),
    "gpu": ("One GPU", "python -m benchmarks.gpu"),
    "gpu-h200-now": (
        "One GPU, the headlines again",
        "python -m benchmarks.gpu --sections overhead,decode128k,serve,batch,others,attention",
    ),
    "overhead-h200": (
        "One GPU, what choosing adds over thirty rounds",
        "python -m benchmarks.gpu --sections overhead,others",
    ),
    "attention-h200": (
        "One GPU, what a prompt is read with",
        "python -m benchmarks.gpu --sections attention",
    ),
}
"""Results files in the page's order: heading, and the command that measures again."""
HEADLINE_ROWS = (
    (
        "reading 32K tokens and choosing what to keep / plain reading, Llama-3-8B's size",
        ("overhead-h200", "Llama-3-8B: (prefill + observe + score + prune) / plain prefill"),
    ),
    (
        "one answer token at 128K tokens, DynamicKV(512) in a conversation, Llama-3-8B's size",
        ("gpu-h200-now", "Llama-3-8B, 131072 tokens: DynamicKV, graph"),
    ),
    (
        "the same with FullKV",
        ("gpu-h200-now", "Llama-3-8B, 131072 tokens: FullKV, graph"),
    ),
    (
        "the same with transformers' `generate`, its faster attention",
        (
            "gpu-h200-now",
            "Llama-3-8B, 131072 tokens: transformers' generate with DynamicCache, cuDNN "
            "attention off",
        ),
    ),
    (
        "peak of keys and values while serving / full cache, 128K tokens, Llama-3-8B's size",
        ("gpu-h200-now", "serve mode, 131072 tokens: peak KV bytes / full cache"),
    ),
)
COUNTED = "counted in bytes, the same every time"
"""README's figures: what each is, the results file and the measure in it."""
NO_ROUNDS = "These results hold no minimum and maximum of their rounds."


def measured_section() -> str:
    """All results files that exist, in order, as docs/measured.md shows them."""
    parts = []
    for name, (title, command) in SECTIONS.items():
        if (RESULTS / f"{name}.json").exists():
            record = results(name)
            rows = [row for row in record["rows"] if name != "gpu" or is_shown(row)]
            again = record.get("again", [])
            cells = columns_by_length(rows) or rows_with_targets(rows, again)
            parts += [f"## {title}", caption(record, command), markdown(cells)]
    return "\n\n".join(
        [MEASURED[0], *parts, *turns(), *forgetting(), *allocations(), first_third(), MEASURED[1]]
    )


def headline_section() -> str:
    """README's figures: each with machine, date, and minimum to maximum of its rounds."""
    cells = [["what", "measured", "minimum to maximum", "where and when"]]
    for what, (name, measure) in HEADLINE_ROWS:
        record = results(name)
        (row,) = (row for row in record["rows"] if row["measure"] == measure)
        cells.append([what, amount(row), spread(row) or COUNTED, where_and_when(record)])
    return "\n\n".join([HEADLINES[0], markdown(cells), needles_found(), HEADLINES[1]])


def results(name: str) -> dict[str, Any]:
    """One file of benchmarks/results."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return record


def caption(record: dict[str, Any], command: str) -> str:
    """Where a results file was measured, what its figures are, and how to measure again."""
    ranged = [row for row in record["rows"] if spread(row)]
    rounds = "In brackets: minimum to maximum of the rounds." if ranged else NO_ROUNDS
    return f"{machine_of(record)}. {rounds} Again with `{command}`."


def machine_of(record: dict[str, Any]) -> str:
    """Where a results file was measured, with what, and where it is known how busy it was."""
    machine = record["machine"]
    named = ("Python", "torch", "transformers", "load")
    versions = [f"{name} {machine[name.lower()]}" for name in named if name.lower() in machine]
    return ", ".join([where_and_when(record), *versions])


def where_and_when(record: dict[str, Any]) -> str:
    """Processor, GPUs and date."""
    machine = record["machine"]
    cores = f"{machine['processor']}, {machine['cores']} cores" if "processor" in machine else ""
    parts = [cores, machine.get("gpus", machine.get("gpu", "")), machine["date"]]
    return ", ".join(part for part in parts if part)


def is_shown(row: dict[str, Any]) -> bool:
    """Of the GPU's hundred rows, which gpu.md has: those with a target, the largest prompts, and
    how often another order of sums names the same next token."""
    measure: str = row["measure"]
    return bool(row["target"]) or measure.startswith("largest") or "same next token" in measure


def rows_with_targets(rows: list[dict[str, Any]], again: list[str]) -> list[list[str]]:
    """One row per figure; those in `again` are not judged."""
    cells = [["what", "measured", "target", "met"]]
    for row in rows:
        note = f" ({row['note']})" if row["note"] else ""
        judged = "to be measured again" if row["measure"] in again else met([row])
        cells.append([f"{row['measure']}{note}", in_brackets(row), target(row), judged])
    return cells


def columns_by_length(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row per measure and one column per prompt length, for measures that end in one (", 4K");
    nothing if they do not."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        measure, _, length = row["measure"].rpartition(", ")
        if not length.endswith("K"):
            return []
        table.setdefault(measure, {})[length] = row
    lengths = list(dict.fromkeys(length for found in table.values() for length in found))
    cells = [["what", *lengths, "target", "met"]]
    for measure, found in table.items():
        wanted = "; ".join(
            f"{target(row)} at {length}" for length, row in found.items() if row["target"]
        )
        values = [in_brackets(found[length]) if length in found else "" for length in lengths]
        same = {target(row) for row in found.values()}
        wanted = same.pop() if len(same) == 1 else wanted
        cells.append([measure, *values, wanted, met(list(found.values()))])
    return cells


def in_brackets(row: dict[str, Any]) -> str:
    """A figure, and where the results hold them minimum and maximum of its rounds."""
    return f"{amount(row)} ({spread(row)})" if spread(row) else amount(row)


def amount(row: dict[str, Any]) -> str:
    """A figure with its unit."""
    return f"{figure(row['value'])} {row['unit']}".rstrip()


def spread(row: dict[str, Any]) -> str:
    """Minimum to maximum of a figure's rounds, or nothing."""
    if row.get("minimum") is None or row.get("maximum") is None:
        return ""
    return f"{figure(row['minimum'])} to {figure(row['maximum'])}"


def target(row: dict[str, Any]) -> str:
    """A row's target with its unit, or nothing."""
    return f"{row['target']} {row['unit']}".rstrip() if row["target"] else ""


def met(rows: list[dict[str, Any]]) -> str:
    """Whether all figures that have a target meet it: "yes", "no", or nothing without one."""
    wanted = [(row["value"], row["target"].partition(" at ")[0]) for row in rows if row["target"]]
    if not wanted:
        return ""
    return "yes" if all(reaches(value, text) for value, text in wanted) else "no"


def reaches(value: float, text: str) -> bool:
    """Whether a value meets a target such as "<= 1.6"; one without a sign is to be equalled."""
    sign, _, bound = text.rpartition(" ")
    return {
        "<": value < float(bound),
        "<=": value <= float(bound),
        ">=": value >= float(bound),
        "": value == float(bound),
    }[sign]


def figure(value: float) -> str:
    """Three significant digits; between 0.9 and 1.1, where ratios lie close to one, four."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.4g}" if 0.9 < abs(value) < 1.1 else f"{value:.3g}"


def turns() -> list[str]:
    """What a cache that was compressed for one question says to the next, a table per model and
    kind of document."""
    parts = []
    for path in sorted(RESULTS.glob("turns-*.json")):
        record = results(path.stem)
        where, summary = record["circumstances"], record["summary"]
        made_up = "--data assets/tasks" if "tasks" in path.stem else "made-up tables"
        parts.append(
            f"{where['model']}, {made_up}: {summary[0]['documents']} documents, "
            f"{summary[0]['questions']} questions after the first ({on_what(where)}). ROUGE-L is "
            "to FullKV's answers; \"over first\" is the gain over the first question's cache in "
            "points; in brackets 95 % intervals. Again with `python -m dynamickv turns`."
        )
        parts.append(markdown(turns_lines(summary)))
    return ["## One document, several questions", *parts] if parts else []


def on_what(where: dict[str, Any]) -> str:
    """Device and date of a measuring command's results."""
    cores = f", {where['cores']} cores" if "cores" in where else ""
    return f"{where['device']}{cores}, {where['date']}"


def forgetting() -> list[str]:
    """What caches of fixed size say along a given text, a table per model."""
    parts = []
    for path in sorted(RESULTS.glob("forgetting-*.json")):
        record = results(path.stem)
        where, rows = record["circumstances"], record["summary"]
        first = rows[0]
        parts.append(
            f"{where['model']}, {first['texts']} texts, {first['answer_tokens']:.0f} tokens fed "
            f"behind {first['prompt_tokens']:.0f} that were read ({on_what(where)}). "
            "Against the full cache; in brackets 95 % intervals over the texts' eighths; what "
            "survives also in the first, fourth and last eighth. Again with "
            "`python -m dynamickv forgetting`."
        )
        cells = [["method", "budget", "same next token", "survives", "1/8", "4/8", "8/8"]]
        for row in rows:
            curve = row["surviving_curve"]
            cells.append(
                [
                    row["method"],
                    str(row["budget"]),
                    *(shared(row, name) for name in ("agreement", "surviving")),
                    *(f"{curve[part]:.0%}" for part in (0, 3, 7)),
                ]
            )
        parts.append(markdown(cells))
    return ["## How a cache of fixed size forgets", *parts] if parts else []


def shared(row: dict[str, Any], name: str) -> str:
    """A share with its interval."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def allocations() -> list[str]:
    """What allocations of equal bytes keep of a hidden fact, a table per model."""
    parts = ["## Allocations at equal bytes"]
    for path in sorted(RESULTS.glob("allocations-*.json")):
        record = results(path.stem)
        parts.append(
            f"{record['model']}, {record['samples']} samples, seed {record['seed']}, a fact in "
            f"{record['prompt_tokens']:.0f} prompt tokens; the full cache finds "
            f"{record['full']:.0%}. {machine_of(record)}. In brackets: gain over SnapKV in points, "
            "95 % interval. Again with `python -m benchmarks.allocations`."
        )
        columns = [
            {row["allocation"]: row for row in rows} for rows in record["capacities"].values()
        ]
        cells = [["allocation", *(f"found at capacity {n}" for n in record["capacities"])]]
        for name in columns[0]:
            cells.append([name, *(found(column[name]) for column in columns)])
        parts.append(markdown(cells))
    return parts


def found(row: dict[str, Any]) -> str:
    """How often an allocation kept the fact, with its gain over SnapKV."""
    low, high = (100 * end for end in row["over_snapkv_interval"])
    gain = "" if row["allocation"] == "SnapKV" else f" ({low:+.0f} to {high:+.0f})"
    return f"{row['found']:.0%}{gain}"


def first_third() -> str:
    """How much of DynamicKV's budget the early layers get in the recorded examples."""
    traces = [dkv.Trace.load(path) for path in sorted((ROOT / "assets" / "runs").iterdir())]
    shares = [
        sum(run.budgets[: len(run.budgets) // 3]) / sum(run.budgets)
        for trace in traces
        for run in trace.runs
        if run.method == "DynamicKV"
    ]
    return (
        f"In the {len(shares)} recorded examples (assets/runs) DynamicKV gives the first third of "
        f"the layers {min(shares):.0%} to {max(shares):.0%} of its budget."
    )


def needles_found() -> str:
    """What the recorded needle tests say of some methods, the first model's first."""
    files = [ROOT / "assets" / "evidence" / f"{name}.json" for name in ("needle", "needle-smollm2")]
    return "\n\n".join(_needles(path) for path in files if path.is_file())


def _needles(path: Path) -> str:
    """One test's, at the smallest capacity where it was made with our methods, else the largest."""
    record = json.loads(path.read_text("utf-8"))
    at, rows = record["circumstances"], record["summary"]
    methods = ["FullKV", "SnapKV", "DynamicKV", "ShiftKV", "VoteKV"]
    sizes = [row["capacity"] for row in rows if row["capacity"]]
    size = min(sizes) if any(row["method"] == "VoteKV" for row in rows) else max(sizes)
    said = [
        f"{row['method']} {100 * row['exact']:.0f} % ({low:.0f} to {high:.0f})"
        for row in rows
        if row["method"] in methods and row["capacity"] in (None, size)
        for low, high in [[100 * end for end in row["interval"]]]
    ]
    return (
        f"Facts found in long texts at capacity {size}, of {rows[0]['trials']}, with 95 % "
        f"intervals: {', '.join(said)} ({at['model']}, {at['device']}, {at['date']})."
    )


def markdown(cells: list[list[str]]) -> str:
    """A table, its first row the heading."""
    rows = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def put(page: Path, section: str, marks: tuple[str, str]) -> None:
    """Write a section, which begins and ends with its marks, in place of the one that is there.

    Raises:
        ValueError: the page lacks the marks.
    """
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{page.name} has no {marks[0]} ... {marks[1]}; put both lines in")
    page.write_text(before + section + after, "utf-8")


def main() -> None:
    """Put the tables into docs/measured.md and the headlines into README."""
    put(PAGE, measured_section(), MEASURED)
    put(README, headline_section(), HEADLINES)


if __name__ == "__main__":
    main()
