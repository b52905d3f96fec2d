"""From a run record to what the browser draws: compact JSON, built by pure functions.

Bit sets stay base64 as the record holds them; token offsets become deltas, which are a tenth of the
pairs' size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.theme import method_style
from app.wording import mebibytes, percent
from dynamickv.record.trace import Prompt, Run, Trace

from .film import ends_alone, film_of
from .words import run_names, window_tokens


def trace_payload(
    trace: Trace,
    source: str,
    figures: Mapping[str, Any] | None = None,
    *,
    key: str = "",
    example: str = "",
    ready: bool = False,
) -> dict[str, Any]:
    """Everything the views need of one comparison; `source` says where it comes from, in words.

    The record travels nearly whole, so that the page can save it: its token offsets are replaced by
    `starts` and `ends` (see `encode_offsets`), bits that are all ones are left out, and so are the
    scores, which the page fetches with `key` when somebody asks for them. `example` names a
    built-in example; `ready` says that the server still holds the prefill,
    `lacks` what an older record does not hold, `film` is `film_of`'s.
    """
    record = trace.to_dict()
    starts, ends = encode_offsets(record["prompt"].pop("text_utf16_offsets"))
    for run in record["runs"]:
        run["scores"] = None
        if run["kept_fraction"] >= 1 and not trace.model.uncompressed:
            run["retained"]["bits"] = ""
    return {
        "source": source,
        "name": run_file_name(trace),
        "key": key,
        "example": example,
        "ready": ready,
        "record": record,
        "lacks": trace.lacks,
        "starts": starts,
        "ends": ends,
        "looks": [
            look(run, trace.prompt, *names) | {"endsAlone": ends_alone(run, trace)}
            for run, names in zip(trace.runs, run_names(trace.runs), strict=True)
        ],
        "figures": dict(figures or {}),
        "film": film_of(trace),
    }


def look(run: Run, prompt: Prompt, style_name: str, label: str) -> dict[str, Any]:
    """What a record does not say: how its run is drawn and called, and how long its observation
    window was.
    """
    style = method_style(style_name)
    return {
        "look": style_name,
        "label": label,
        "color": [style.light, style.dark],
        "glyph": style.glyph,
        "window": window_tokens(run, prompt),
        "scored": run.scores is not None,
    }


def run_file_name(trace: Trace) -> str:
    """A name that says what is in the file, of safe characters only."""
    capacity = next(
        (run.parameters["capacity"] for run in trace.runs if "capacity" in run.parameters), "full"
    )
    raw = f"dynamickv_{trace.model.name}_b{capacity}_{trace.created[:10]}"
    return (
        "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in raw)[:100]
        + ".json.gz"
    )


def encode_offsets(offsets: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Token starts as deltas, and [token, end] only where a token does not end at the next one's
    start.
    """
    starts: list[int] = []
    ends: list[list[int]] = []
    previous = 0
    for index, (start, end) in enumerate(offsets):
        starts.append(start - previous)
        previous = start
        following = offsets[index + 1][0] if index + 1 < len(offsets) else -1
        if end != following:
            ends.append([index, end])
    return starts, ends


def predicted_payload(
    run: Mapping[str, Any], trace: Trace, color: str = "What if"
) -> dict[str, Any]:
    """A choice that was not answered with: what the browser needs to draw it like a run."""
    style = method_style(color)
    full = max(r.kv_bytes_full for r in trace.runs)
    return {
        **run,
        "look": color,
        "label": "predicted",
        "color": [style.light, style.dark],
        "glyph": style.glyph,
        "words": f"{percent(run['kept_fraction'])} of the prompt, "
        f"{mebibytes(run['kv_bytes'])} of {mebibytes(full)}",
        "predicted": True,
    }
