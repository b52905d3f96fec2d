"""docs/models.md and the printed summary, from the coverage record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.coverage.families import APART, POPULAR, WRAPPERS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FOLLOWS = 0.97
"""Least share of the positions that the model's own attention asks for."""
VERDICTS = {
    "exact": "compressed exactly",
    "refused": "refused, in one sentence",
    "wrong": "silently wrong",
    "error": "unclear error",
    "crash": "crash or hang",
    "own": "does not run in transformers itself",
    "unbuilt": "does not build in transformers itself",
}
"""What can come of an entry, best first, and what the page calls it."""
INTRODUCTION = """\
Written by `python -m benchmarks.coverage` on {date}: transformers {transformers}, torch {torch},
dynamickv {dynamickv}; beside it kvpress {kvpress} with transformers {theirs}, in an environment of
its own.

Every decoder that transformers' causal-LM mapping names is built in small, with random weights,
and run. "Compressed exactly" means all of this:

- with a capacity above the prompt, `generate` gives the model's own tokens and logits;
- with a small capacity, the answer's logits are those of the model's own eager attention over the
  kept positions, every layer that attends to everything is compressed, and the memory shrinks;
- SnapKV keeps at least 97 % of the positions that the model's own attention weights ask for, in
  every layer and head, over three prompts;
- `compare` answers as `generate` does, whole and compressed.

For kvpress: whether its SnapKVPress shrinks the cache, and whether what it keeps follows the
model's own attention by the same 97 %, judged by its own rule for choosing.
"""


def summary(here: Mapping[str, Mapping[str, Any]]) -> str:
    """Counts, and every entry that is not exact with its reason."""
    wrappers = {name: here[name] for name in WRAPPERS if name in here}
    here = {name: answer for name, answer in here.items() if name not in WRAPPERS}
    lines = [
        f"{len(here)} decoders: {_counted(here)}",
        f"{len(POPULAR)} well known: {_counted({n: here[n] for n in POPULAR if n in here})}",
    ]
    for verdict in VERDICTS:
        named = sorted(name for name, answer in here.items() if answer["verdict"] == verdict)
        if verdict == "exact":
            notes = [name for name in named if here[name]["note"]]
            lines += ["", f"exact: {len(named)}", " ".join(named)]
            lines += [f"  {name}: {here[name]['note']}" for name in notes]
        elif named:
            lines += ["", f"{verdict}: {len(named)}"]
            lines += [f"  {name}: {here[name]['reason']}" for name in named]
    lines += ["", f"{len(wrappers)} of more than text: {_counted(wrappers)}"]
    lines += [f"  {name}: {a['reason']}" for name, a in wrappers.items() if a["reason"]]
    return "\n".join(lines)


def _counted(answers: Mapping[str, Mapping[str, Any]]) -> str:
    counts = Counter(answer["verdict"] for answer in answers.values())
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def write(record: Mapping[str, Any], path: Path = PAGE) -> None:
    """Write the page."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text(record), "utf-8")


def text(record: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    wrappers = {name: record["here"].get(name) for name in WRAPPERS}
    here = {name: answer for name, answer in record["here"].items() if name not in WRAPPERS}
    theirs = record.get("kvpress", {})
    machine, peer = record["machine"], record.get("peer", {})
    introduction = INTRODUCTION.format(
        date=machine["date"],
        transformers=machine["transformers"],
        torch=machine["torch"],
        dynamickv=machine["dynamickv"],
        kvpress=peer.get("kvpress", "(not run)"),
        theirs=peer.get("transformers", "-"),
    )
    ours = [
        [
            meaning,
            *(
                str(sum(1 for n in names if here[n]["verdict"] == verdict))
                for names in (here, [n for n in POPULAR if n in here])
            ),
        ]
        for verdict, meaning in VERDICTS.items()
    ]
    shrinks = [name for name, answer in theirs.items() if answer["verdict"] == "shrinks"]
    follows = [name for name in shrinks if follows_attention(theirs[name])]
    known = [name for name in theirs if theirs[name]["verdict"] not in ("unknown", "own")]
    peers = [
        [what, str(len(names)), str(sum(1 for name in names if name in POPULAR))]
        for what, names in (
            ("run in its transformers", known),
            ("the cache gets shorter", shrinks),
            ("and what it keeps follows the model's own attention", follows),
        )
    ]
    rows = [
        [f"`{name}`", answer["kinds"] or "-", _ours(answer), _theirs(theirs.get(name))]
        for name, answer in sorted(here.items())
    ]
    apart: dict[str, list[str]] = {}
    for name, reason in APART.items():
        apart.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(
        [
            "# Models\n",
            introduction,
            _table(["here", f"all {len(here)}", f"{len(POPULAR)} well known"], ours),
            "",
            _table(["kvpress", "all", "well known"], peers),
            "\n## Every architecture\n",
            _table(["architecture", "layers", "here", "kvpress"], rows),
            "\n## Counted apart\n",
            "Models of more than text, given text alone:\n",
            _table(
                ["architecture", "its decoder", "here"],
                [
                    [f"`{name}`", f"`{WRAPPERS[name]}`", _ours(answer)]
                    for name, answer in wrappers.items()
                    if answer is not None
                ],
            ),
            "\nNot examined:\n",
            *(f"- {reason}: {', '.join(names)}" for reason, names in apart.items()),
            "",
        ]
    )


def follows_attention(answer: Mapping[str, Any]) -> bool:
    """Whether every layer keeps what the model's own attention asks for."""
    return all(share >= FOLLOWS for share in answer["overlap"].values())


def _ours(answer: Mapping[str, Any]) -> str:
    verdict = answer["verdict"]
    if verdict == "exact":
        return f"exact ({answer['note']})" if answer["note"] else "exact"
    return f"{VERDICTS[verdict].split(',')[0]}: {_cell(answer['reason'])}"


def _theirs(answer: Mapping[str, Any] | None) -> str:
    if answer is None or answer["verdict"] in ("unknown", "own"):
        return "-"
    if answer["verdict"] == "whole":
        return "nothing shrinks"
    if answer["verdict"] == "error":
        return f"error: {_cell(answer['reason'].split(':')[0])}"
    if follows_attention(answer):
        return "shrinks, follows"
    return f"shrinks, keeps {min(answer['overlap'].values()):.0%} of what is asked for"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
