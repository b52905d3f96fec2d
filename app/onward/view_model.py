"""What the panel under the answers shows. Pure functions; no widgets, no model."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dynamickv as dkv
from app.examples import Example
from app.form import method_of
from app.record.words import document_of, run_names
from app.theme import method_style
from app.wording import mebibytes, percent

HOW = {
    "facts": "The answer must hold what is expected: {facts}.",
    "words": "No word of FullKV's answer may lose more than half of its probability.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One run's method, with which something is tried again."""

    method: dkv.CompressionMethod
    run: dkv.Run
    place: int
    """The run's among the record's."""
    look: str
    label: str


def methods_of(trace: dkv.Trace, compressing: bool = True) -> list[Method]:
    """The record's methods as their runs had them set; those that compress, or all."""
    found = []
    for place, (run, (look, label)) in enumerate(
        zip(trace.runs, run_names(trace.runs), strict=True)
    ):
        method = method_of(run)
        if method is not None and (method.capabilities.capacity or not compressing):
            found.append(Method(method=method, run=run, place=place, look=look, label=label))
    return found


def facts_of(trace: dkv.Trace, examples: Iterable[Example]) -> list[str]:
    """What a right answer holds: what its user expected, else the facts of the example that it is
    of, as far as FullKV's answer holds them.
    """
    if trace.expected is not None and trace.expected.text.strip():
        return [trace.expected.text]
    full = next((run for run in trace.runs if run.method == "FullKV"), None)
    prompt = trace.prompt
    for example in examples:
        same = example.question.strip() == prompt.question.strip()
        if full and same and example.is_document(document_of(prompt)):
            held = example.facts_in(full.answer)
            return [fact for fact, there in zip(example.expected, held, strict=True) if there]
    return []


def smallest_row(found: dkv.Smallest, at: Method, length: int, whole_bytes: int) -> dict[str, Any]:
    """One method's result, as the panel lists it."""
    if found.whole:
        words = f"nothing less than the whole prompt ({length:,} tokens)"
    else:
        words = (
            f"{percent(found.kept_fraction)} of the prompt, {mebibytes(found.kv_bytes)} of "
            f"{mebibytes(whole_bytes)}"
        )
    return {
        **painted(at),
        "capacity": found.capacity,
        "share": found.kept_fraction,
        "words": words,
        "tried": ", ".join(
            f"{probe.capacity:,} {'yes' if probe.answers else 'no'}" for probe in found.probes
        ),
    }


def painted(at: Method) -> dict[str, Any]:
    """How a run is called and drawn."""
    style = method_style(at.look)
    return {
        "label": at.label,
        "method": at.look,
        "glyph": style.glyph,
        "color": [style.light, style.dark],
    }


def how_words(by: str, facts: Sequence[str]) -> str:
    """What counts as an answer, in one sentence."""
    return HOW[by].format(facts=", ".join(facts))


def marks_of(held: dkv.Run, wanted: dkv.Run, trace: dkv.Trace, other: dkv.Trace) -> dict[str, Any]:
    """What another question would have kept of the document, beside what is held.

    Args:
        held, trace: the run that was compressed for the first question, and its record.
        wanted, other: the same method's run of the document with the other question.

    Returns:
        `first`: the document's first token; `wanted` and `gone`, base64 of uint8 per token of the
        document: share of layers and heads, 0 to 255, that would be kept, and of those the ones
        that are not held; `held_share`: of all that would be kept, the part that is held, None
        where nothing would.
    """
    first, end = trace.prompt.document_span
    start, last = other.prompt.document_span
    # The last token may join what follows it.
    length = min(end - first, last - start) - 1
    layers = trace.model.num_layers
    compressed = [i for i in range(layers) if i not in trace.model.uncompressed]
    now = held.retained.unpack(layers, trace.prompt.length)[compressed, :, first : first + length]
    then = wanted.retained.unpack(layers, other.prompt.length)
    then = then[compressed, :, start : start + length]
    gone = then & ~now
    number = then.shape[0] * then.shape[1]

    def packed(mask: np.ndarray) -> str:
        shares = np.round(255 * mask.sum(axis=(0, 1)) / number).astype(np.uint8)
        return base64.b64encode(shares.tobytes()).decode("ascii")

    total = int(then.sum())
    return {
        "first": first,
        "wanted": packed(then),
        "gone": packed(gone),
        "held_share": None if not total else 1 - int(gone.sum()) / total,
    }
