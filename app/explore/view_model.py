"""From a run record to what the browser draws: compact JSON, built by pure functions.

Nothing here knows widgets, models or plots. Bit sets stay base64 as the record holds them; token
offsets become deltas, which are a tenth of the pairs' size. Texts stay texts: whoever shows them
uses `textContent`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from app.theme import method_style
from dynamickv.record.trace import ModelInfo, Prompt, Run, Trace, seconds_per_token

MIB = 2**20
NOTHING = "\u2013"
CARD_HINTS = {
    "Kept": "Share of the prompt's tokens that stay in the cache, over all layers and heads.",
    "KV cache": "Bytes of keys and values for the prompt, summed from the tensors themselves.",
    "Prefill": "Reading the prompt once. The same prefill serves every method here.",
    "Score + prune": "Choosing the tokens and copying them into the smaller cache.",
    "Decode": "Mean time for each answer token.",
    "Token match": "Agreement with FullKV's answer: share of positions, over the longer answer, "
    "that hold the same token, and the first that differs. It says nothing about truth.",
}


def dumps(value: Any) -> str:
    """The one compact JSON string that a component receives."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


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
    built-in example; `ready` says that the server still holds the prefill.
    """
    record = trace.to_dict()
    starts, ends = encode_offsets(record["prompt"].pop("text_utf16_offsets"))
    for run in record["runs"]:
        run["scores"] = None
        if run["kept_fraction"] >= 1 and not trace.model.sliding_layers:
            run["retained"]["bits"] = ""
    return {
        "source": source,
        "name": run_file_name(trace),
        "key": key,
        "example": example,
        "ready": ready,
        "record": record,
        "starts": starts,
        "ends": ends,
        "looks": [
            look(run, trace.prompt, *names)
            for run, names in zip(trace.runs, run_names(trace.runs), strict=True)
        ],
        "figures": dict(figures or {}),
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


def run_names(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The style and the label of every run: the method's own, or for a second run of a method
    "What if" and what differs.
    """
    first: dict[str, Run] = {}
    names = []
    for run in runs:
        known = first.setdefault(run.method, run)
        marked = marked_words(run)
        if known is run:
            names.append((run.method, ", ".join(filter(None, (run.method, marked)))))
        else:
            differs = ", ".join(filter(None, (what_differs(run, known), marked))) or "again"
            names.append(("What if", f"{run.method}, {differs}"))
    return names


def marked_words(run: Run) -> str:
    """What a person pinned and evicted: "12 tokens pinned, 1 evicted"."""
    words: list[str] = []
    for name in ("pinned", "evicted"):
        size = marked_tokens(run, name)
        if size:
            words.append(f"{size:,} {name}" if words else f"{count(size, 'token')} {name}")
    return ", ".join(words)


def marked_tokens(run: Run, name: str) -> int:
    """How many positions the spans of that name hold; a record may come from a stranger."""
    spans = run.parameters.get(name)
    pairs = spans if isinstance(spans, list) else []
    return sum(
        max(0, pair[1] - pair[0])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
    )


def what_differs(run: Run, other: Run) -> str:
    """The settings in which a run differs from another of its method: "capacity 64"."""
    return ", ".join(
        f"{name.replace('_', ' ')} {shortened(value)}"
        for name, value in run.parameters.items()
        if value != other.parameters.get(name, value) and isinstance(value, (int, float, str))
    )


def shortened(value: object) -> str:
    """A parameter's value as a word or two; a record from a stranger may hold a book."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:23]}\u2026"


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


def document_of(prompt: Prompt) -> str:
    """The document as it was pasted."""
    first, last = prompt.document_utf16_span
    return prompt.text.encode("utf-16-le")[2 * first : 2 * last].decode("utf-16-le", "replace")


def window_tokens(run: Run, prompt: Prompt) -> int:
    """Length of the observation window in this run; 0 where nothing was scored."""
    if "window_size" not in run.parameters or prompt.length <= int(
        run.parameters.get("capacity", 0)
    ):
        return 0
    return min(int(run.parameters["window_size"]), prompt.length)


def compressed_layers(run: Run, prompt: Prompt, model: ModelInfo) -> int:
    """How many layers a method cut; sliding-window layers are nobody's to cut."""
    sliding = set(model.sliding_layers)
    return sum(
        kept < prompt.length for layer, kept in enumerate(run.budgets) if layer not in sliding
    )


def cards_payload(
    trace: Trace, source: str, found: Sequence[Sequence[bool]] | None = None
) -> dict[str, Any]:
    """The answer cards of a finished comparison; `found` says of every run which of the expected
    facts its answer holds, where some are expected.
    """
    return {
        "final": True,
        "source": source,
        "circumstances": circumstances(trace),
        "question": trace.prompt.question,
        "notice": fits_notice(trace),
        "cards": cards(trace, found),
        "partings": partings(trace),
    }


def fits_notice(trace: Trace) -> str:
    """One loud sentence when no method had anything to remove."""
    compressing = [run for run in trace.runs if run.method != "FullKV"]
    if not compressing or any(
        compressed_layers(run, trace.prompt, trace.model) for run in compressing
    ):
        return ""
    capacity = min(int(run.parameters.get("capacity", trace.prompt.length)) for run in compressing)
    return (
        f"Nothing to compress: the prompt ({count(trace.prompt.length, 'token')}) fits in the "
        f"capacity ({capacity:,} tokens per layer). "
        "Lower the capacity or paste a longer document."
    )


def compressed_words(layers: int, total: int, sliding: int = 0) -> str:
    """The receipt that compression happened."""
    also = f", {sliding} slide" if sliding else ""
    return f"compressed at {layers} of {total - sliding} layers{also}"


def cards(trace: Trace, found: Sequence[Sequence[bool]] | None = None) -> list[dict[str, Any]]:
    """Every finished answer, with what is said of it where an answer is expected."""
    said = verdicts(trace.runs, found) if found is not None else [[] for _ in trace.runs]
    return [
        card(run, trace) | named(*names) | {"verdict": verdict}
        for run, names, verdict in zip(trace.runs, run_names(trace.runs), said, strict=True)
    ]


def verdicts(runs: Sequence[Run], found: Sequence[Sequence[bool]]) -> list[list[str]]:
    """Per run, what its answer holds of the expected facts; of a stopped answer only what it does.
    Where FullKV's lacks some too, compression is not to blame, and that is said.
    """
    states = [
        (run, sum(facts), len(facts), run.finish_reason != "cancelled")
        for run, facts in zip(runs, found, strict=True)
    ]
    lost = any(run.method == "FullKV" and hits < of and done for run, hits, of, done in states)
    said = []
    for run, hits, of, done in states:
        words = [facts_words(hits, of)] if hits or done else []
        if done and hits < of and lost and run.method != "FullKV":
            words.append("FullKV is also wrong here")
        said.append(words)
    return said


def facts_words(hits: int, of: int) -> str:
    """How many of the expected facts an answer holds."""
    if of > 1:
        return f"holds {hits} of {of} expected facts"
    return "contains the expected answer" if hits else "misses the expected answer"


def named(style_name: str, label: str) -> dict[str, str]:
    """How a card is called and drawn."""
    return {"method": style_name, "label": label, "glyph": method_style(style_name).glyph}


PARTING_WORDS = 90
"""Characters of common answer shown before the first differing token."""


def partings(trace: Trace) -> list[dict[str, Any]]:
    """Where answers leave FullKV's: the end of what they share, and both tokens with their
    probabilities under both caches.
    """
    found = []
    for run, (style_name, label) in zip(trace.runs, run_names(trace.runs), strict=True):
        divergence = run.agreement.divergence if run.agreement else None
        at = run.agreement.first_divergence if run.agreement else None
        if divergence is None or at is None:
            continue
        shared = "".join(run.pieces[:at])
        words = zip(divergence.pieces, divergence.token_ids, strict=True)
        found.append(
            named(style_name, label)
            | {
                "at": at + 1,
                "shared": ending(shared, PARTING_WORDS),
                "tokens": [token_words(piece, token_id) for piece, token_id in words],
                "here": [percent(share) for share in divergence.probabilities],
                "full": [percent(share) for share in divergence.probabilities_full],
            }
        )
    return found


def ending(text: str, most: int) -> str:
    """The last characters of a text, an ellipsis before them where something is left out."""
    return text if len(text) <= most else f"\u2026{text[-most:]}"


def token_words(piece: str, token_id: int) -> str:
    """A token's text, or its number where it has none of its own."""
    return piece or f"token {token_id}"


def card(run: Run, trace: Trace) -> dict[str, Any]:
    """One finished answer with its receipts."""
    layers = compressed_layers(run, trace.prompt, trace.model)
    total, sliding = trace.model.num_layers, len(trace.model.sliding_layers)
    if run.method == "FullKV":
        chip, tone = "keeps everything", "plain"
    elif layers:
        chip, tone = compressed_words(layers, total, sliding), "good"
    else:
        chip, tone = "nothing to compress: the prompt fits", "loud"
    split = run.agreement.first_divergence if run.agreement and run.method != "FullKV" else None
    same = "".join(run.pieces[:split]) if split is not None else run.answer
    differs = "".join(run.pieces[split : split + 1]) if split is not None else ""
    rest = "".join(run.pieces[split + 1 :]) if split is not None else ""
    return card_frame(run.method) | {
        "state": "stopped" if run.finish_reason == "cancelled" else "done",
        "chip": chip,
        "tone": tone,
        "answer": [same, differs, rest],
        "finish": finish_words(run),
        "kept": run.kept_fraction,
        "receipts": receipts(run, trace),
    }


def card_frame(method: str) -> dict[str, Any]:
    """What a card shows before its run has begun."""
    return named(method, method) | {
        "state": "waiting",
        "chip": "",
        "tone": "plain",
        "answer": ["", "", ""],
        "finish": "",
        "verdict": [],
        "kept": None,
        "receipts": [
            {"label": label, "value": NOTHING, "note": "", "hint": hint}
            for label, hint in CARD_HINTS.items()
        ],
    }


def receipts(run: Run, trace: Trace) -> list[dict[str, str]]:
    """The measured numbers of a run: label, value, and a note in small type."""
    rows = {
        "Kept": (percent(run.kept_fraction), "of prompt"),
        "KV cache": (mebibytes(run.kv_bytes), f"of {mebibytes(run.kv_bytes_full)}"),
        "Prefill": (seconds(trace.prefill_seconds), "shared"),
        "Score + prune": compression_row(run),
        "Decode": decode_row(run.decode_seconds, run.decoded_together),
        "Token match": agreement_row(run),
    }
    return [
        {"label": label, "value": value, "note": note, "hint": CARD_HINTS[label]}
        for label, (value, note) in rows.items()
    ]


def compression_row(run: Run) -> tuple[str, str]:
    """Time to choose and copy the kept tokens."""
    if run.method == "FullKV":
        return NOTHING, "not needed"
    return seconds(run.score_seconds + run.prune_seconds), "all layers"


def decode_row(per_token: Sequence[float], together: int = 1) -> tuple[str, str]:
    """Median time per decoded token."""
    note = "per token" if together == 1 else f"for {together} together"
    found = seconds_per_token(per_token)
    return (NOTHING if found is None else milliseconds(found)), note


def agreement_row(run: Run) -> tuple[str, str]:
    """How far the answer follows FullKV's."""
    if run.method == "FullKV":
        return NOTHING, "reference"
    if run.agreement is None:
        return NOTHING, "stopped" if run.finish_reason == "cancelled" else "no FullKV"
    if run.agreement.first_divergence is None:
        return "100 %", "with FullKV"
    return percent(run.agreement.token_match), f"differs at {run.agreement.first_divergence + 1}"


def finish_words(run: Run) -> str:
    """Why the answer ended."""
    tokens = count(len(run.token_ids), "token")
    return {
        "stop": f"{tokens}, complete",
        "length": f"{tokens}, cut at the limit",
        "cancelled": f"stopped after {tokens}",
    }[run.finish_reason]


def source_label(kind: str, created: str) -> str:
    """Where a record comes from, in words: "recorded on 23 November 2026"."""
    try:
        moment = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return kind
    day = f"{moment.day} {moment:%B %Y}"
    return {
        "recorded": f"recorded on {day}",
        "file": f"opened from a file, run on {day}",
        "run": f"run here, {day} {moment:%H:%M} UTC",
    }.get(kind, f"{kind}, {day}")


def circumstances(trace: Trace) -> str:
    """On what a record was made, in words: model, number format, device and versions."""
    model = trace.model
    names = [shortened(name) for name in (model.revision, model.dtype, model.device)]
    return (
        f"{model.name}, revision {names[0]}, {names[1]} on {names[2]}, "
        f"attention {shortened(model.attention)}, {version_words(trace.versions)}"
    )


def version_words(versions: Mapping[str, str]) -> str:
    """The versions that were recorded: "torch 2.13.0, dynamickv 0.1.0 (commit 1a2b3c4d)"."""
    words = [
        f"{name} {shortened(versions[name])}"
        for name in ("torch", "transformers", "dynamickv")
        if name in versions
    ]
    commit = f" (commit {versions['commit'][:8]})" if "commit" in versions else ""
    return ", ".join(words) + commit


def capacity_line(
    model: Mapping[str, int], capacity: int, tokens: int | None, heads: int | None = None
) -> str:
    """What a capacity means for this prompt: per cent of its tokens, and MiB of cache."""
    per_token = cache_bytes_per_token(model, heads)
    kept = capacity if tokens is None else min(capacity, tokens)
    size = f"about {mebibytes(per_token * kept)}"
    if not tokens:
        return f"{size} of cache"
    whole = mebibytes(per_token * tokens)
    return f"{percent(kept / tokens)} of the prompt · {size.removesuffix(' MiB')} of {whole}"


def cache_bytes_per_token(model: Mapping[str, int], heads: int | None = None) -> int:
    """Bytes of keys and values one token takes over all layers."""
    return (
        2
        * model["num_layers"]
        * (heads or model["num_kv_heads"])
        * model["head_dim"]
        * model["bytes_per_value"]
    )


def count(number: int, noun: str) -> str:
    """ "1 token", "3,412 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A share with as many digits as it deserves."""
    value = 100 * share
    if value >= 99.95:
        return "100 %"
    if 0 < value < 0.05:
        return "< 0.1 %"
    return f"{value:.0f} %" if value >= 20 else f"{value:.1f} %"


def mebibytes(size: float) -> str:
    """Bytes in MiB (2**20)."""
    value = size / MIB
    return (
        f"{value:,.0f} MiB"
        if value >= 100
        else f"{value:.1f} MiB"
        if value >= 1
        else f"{value:.2f} MiB"
    )


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{value:.1f} s" if value >= 1 else milliseconds(value)


def milliseconds(value: float) -> str:
    """Milliseconds, two digits at least."""
    value *= 1000
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"
