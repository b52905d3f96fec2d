"""python -m benchmarks.record_lessons [ID ...]

Runs what the Learn tab teaches with: the lessons' documents with every method of the papers, and
one document with a second question. Each becomes assets/lessons/ID.json.gz, a run record as any
other.

A lesson also needs what a record has no place for: ID.behind.json.gz holds, per layer, where the
window's attention went and every position's score, and, at each of DynamicKV's updates, how many of
the best scores lay in each layer. Every other number of an update follows from these
(`DynamicKV.settle`). With --behind only this file is made again.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

import torch

import dynamickv as dkv
from benchmarks.prompts import EXAMPLES, SIX
from benchmarks.record_examples import ASSETS
from dynamickv.scoring import count_global_top

LESSONS = ASSETS / "lessons"
QUESTIONS = ("FullKV", "SnapKV", "DynamicKV")
"""Methods for the document that is asked twice."""


def main() -> None:
    """Record the lessons named on the command line, or all of them."""
    plans = json.loads((LESSONS / "records.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_lessons")
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"from {', '.join(plans)}")
    parser.add_argument("--behind", action="store_true", help="leave the run records as they are")
    options = parser.parse_args()
    chosen = options.ids or list(plans)
    unknown = [name for name in chosen if name not in plans]
    if unknown:
        parser.error(f"there is no record {unknown[0]!r}; choose from {', '.join(plans)}")
    llm = dkv.load_model(dkv.DEFAULT_MODEL, device="cpu", precision="exact")
    for name in chosen:
        record(llm, name, plans[name], options.behind)


def record(llm: dkv.LoadedModel, name: str, plan: dict[str, Any], behind_only: bool) -> None:
    """Run one plan: an example's document, and its question or another."""
    example = json.loads((EXAMPLES / f"{plan['example']}.json").read_text(encoding="utf-8"))
    document = (EXAMPLES / example["document"]).read_text(encoding="utf-8")
    question = plan.get("question", example["question"])
    names = SIX if "question" not in plan else QUESTIONS
    methods = dkv.build_methods(names, capacity=example["capacity"])
    facts = [] if "question" in plan else example.get("expected", [])
    prefill = dkv.prefill(llm, document, question, mass="H2O" in names and not behind_only)
    if not behind_only:
        trace = dkv.compare(
            llm,
            prefill=prefill,
            methods=methods,
            max_new_tokens=plan.get("max_new_tokens", example["max_new_tokens"]),
            scores=True,
            expected=facts[0] if len(facts) == 1 else "",
        )
        trace.save(LESSONS / f"{name}.json.gz")
        print(f"{name}: {trace.prompt.length:,} tokens")
        for run in trace.runs:
            print(f"  {run.method:<13}{run.kept_fraction:>6.1%}  {run.answer!r}")
    if "question" not in plan:
        ours = next(method for method in methods if isinstance(method, dkv.DynamicKV))
        text = json.dumps(behind(ours, prefill.layers), separators=(",", ":"))
        packed = gzip.compress(f"{text}\n".encode(), mtime=0)
        (LESSONS / f"{name}.behind.json.gz").write_bytes(packed)


@torch.inference_mode()
def behind(method: dkv.DynamicKV, layers: Sequence[dkv.LayerObservation]) -> dict[str, Any]:
    """What DynamicKV saw: `attention` ([to the first token, to the window itself, to the best tenth
    of the rest], of all that the window pays, per layer), `log_scores` (see `log_scores`) and
    `counts` (best scores per layer seen, per update).
    """
    scores = [method.score(layer) for layer in layers]
    heads = scores[0].shape[0]
    return {
        "attention": [attention_shares(method, layer) for layer in layers],
        "log_scores": base64.b64encode(
            b"".join(log_scores(layer).numpy().tobytes() for layer in scores)
        ).decode("ascii"),
        "counts": [
            count_global_top(scores[:seen], method.mean_budget * heads * seen)
            for seen in range(1, len(scores) + 1)
            if method.updates_after(seen - 1, len(scores))
        ],
    }


def attention_shares(method: dkv.DynamicKV, layer: dkv.LayerObservation) -> list[float]:
    """Where the window's attention goes, over all query heads: parts of 1."""
    paid = method.raw_scores(layer).double()
    whole = paid.shape[0] * method.window_size
    rest = paid[:, 1:].sum(dim=0).sort(descending=True).values
    best = rest[: round(0.1 * rest.shape[0])]
    return [
        round(float(part), 6)
        for part in (paid[:, 0].sum() / whole, 1 - paid.sum() / whole, best.sum() / whole)
    ]


def log_scores(scores: torch.Tensor) -> torch.Tensor:
    """Scores as eighths of a halving below the layer's highest: uint8, 0 is the highest, 8 half of
    it. The mean over heads; linear steps would show the first token alone.
    """
    mean = scores.mean(dim=0)
    ratio = mean.max() / mean.clamp_min(torch.finfo(torch.float32).tiny)
    return (8 * ratio.log2()).round().clamp(0, 255).to(torch.uint8).cpu()


if __name__ == "__main__":
    main()
