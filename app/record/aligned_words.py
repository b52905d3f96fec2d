"""FullKV's answer word by word under every run's cache, in words and shares. Pure functions."""

from __future__ import annotations

from typing import Any

from app.wording import percent
from dynamickv.record.trace import Trace

from .cards import named
from .words import run_names


def words_of(trace: Trace) -> list[dict[str, Any]]:
    """FullKV's answer word by word under every run's cache, for those who read rather than touch
    it: each word with the white space before it, how much of its probability survives, both
    probabilities, and what this cache would rather say.
    """
    found: list[dict[str, Any]] = []
    for run, (style_name, label) in zip(trace.runs, run_names(trace.runs), strict=True):
        held = run.aligned
        if held is None:
            continue
        full = trace.run("FullKV")
        spans = held.token_spans
        ends = [first for first, _ in spans[1:]] + [len(full.pieces)]
        starts = [0, *(first for first, _ in spans[1:])]
        found.append(
            {
                **named(style_name, label),
                "words": [
                    {
                        "text": "".join(full.pieces[start:end]),
                        "survives": share,
                        "here": percent(own),
                        "full": percent(whole),
                        "instead": instead,
                    }
                    for start, end, share, own, whole, instead in zip(
                        starts,
                        ends,
                        held.shares,
                        held.probabilities,
                        held.probabilities_full,
                        held.instead,
                        strict=True,
                    )
                ],
                "loss": held.loss,
                "survives": percent(held.surviving),
            }
        )
    return found
