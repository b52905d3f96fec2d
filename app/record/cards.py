"""The answer cards of a record: every answer with its receipts, and where it leaves FullKV's. Pure
functions; texts stay texts, whoever shows them uses `textContent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.theme import method_style
from app.wording import count, ending, mebibytes, milliseconds, percent, seconds, shortened
from dynamickv.record.trace import Run, Trace, seconds_per_token

from .words import circumstances, compressed_layers, compressed_words, finish_words, run_names

NOTHING = "\u2013"
CARD_HINTS = {
    "Kept": "Share of the prompt's tokens that stay in the cache, over all layers and heads.",
    "KV cache": "Bytes of keys and values for the prompt, summed from the tensors themselves. With "
    "4 bytes a number (float32) they are twice those with 2 (bfloat16).",
    "Prefill": "Reading the prompt once. The same prefill serves every method here.",
    "Score + prune": "Choosing the tokens and copying them into the smaller cache.",
    "Decode": "Median time of an answer token; 'for 5 together': one pass served five caches.",
    "Survives": "Mean surviving probability: every cache is fed FullKV's answer, and each of its "
    "words keeps a part of the probability it had. 100 %: as probable as with FullKV.",
    "Erased": "Tokens that no layer and no head keeps: no attention brings them back.",
    "Token match": "Agreement with FullKV's answer: share of positions, over the longer answer, "
    "that hold the same token, and the first that differs. It says nothing about truth.",
}


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
        "expected": expected_words(trace),
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


def cards(trace: Trace, found: Sequence[Sequence[bool]] | None = None) -> list[dict[str, Any]]:
    """Every finished answer, with what is said of it where an answer is expected."""
    if found is None and trace.expected is not None:
        found = [[run.expected_found is True] for run in trace.runs]
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


def expected_words(trace: Trace) -> str:
    """Whether the document holds what is expected; empty where nothing is."""
    if trace.expected is None:
        return ""
    if trace.expected.document_utf16_span is None:
        return "What you expect is not in the document, as it is worded."
    return "What you expect is in the document."


def survival_row(run: Run, trace: Trace) -> tuple[str, str]:
    """The mean surviving probability, and the word that carries the loss."""
    if run.aligned is None:
        compared = any(other.method == "FullKV" for other in trace.runs)
        return NOTHING, (
            "reference" if run.method == "FullKV" else "not recorded" if compared else "no FullKV"
        )
    if run.aligned.loss is None:
        return percent(run.aligned.surviving), "no word lost"
    first, last = run.aligned.token_spans[run.aligned.loss]
    word = "".join(trace.run("FullKV").pieces[first:last]).strip()
    return percent(run.aligned.surviving), f"lost: {shortened(word)}"


def erased_row(run: Run) -> tuple[str, str]:
    """Positions that are nowhere any more."""
    if run.erased is None:
        return NOTHING, "not recorded"
    return f"{run.erased:,}", "tokens everywhere"


def token_words(piece: str, token_id: int) -> str:
    """A token's text, or its number where it has none of its own."""
    return piece or f"token {token_id}"


def card(run: Run, trace: Trace) -> dict[str, Any]:
    """One finished answer with its receipts."""
    layers = compressed_layers(run, trace.prompt, trace.model)
    total, others = trace.model.num_layers, trace.model.uncompressed
    if run.method == "FullKV":
        chip, tone = "keeps everything", "plain"
    elif layers:
        chip, tone = compressed_words(layers, total, others), "good"
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
        "finish": finish_words(run) + forgetting_words(run),
        "kept": run.kept_fraction,
        "receipts": receipts(run, trace),
    }


def forgetting_words(run: Run) -> str:
    """How often a run chose again while it answered, and down to what."""
    if run.decoding is None or not run.forgotten:
        return ""
    times = len(run.forgotten)
    often = "once" if times == 1 else f"{times} times"
    return f"; chose again {often}, down to {count(run.decoding['budget'], 'token')} per layer"


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
        "KV cache": kv_row(run, trace),
        "Prefill": (seconds(trace.prefill_seconds), "shared"),
        "Score + prune": compression_row(run),
        "Decode": decode_row(run.decode_seconds, run.decoded_together),
        "Survives": survival_row(run, trace),
        "Erased": erased_row(run),
        "Token match": agreement_row(run),
    }
    return [
        {"label": label, "value": value, "note": note, "hint": CARD_HINTS[label]}
        for label, (value, note) in rows.items()
    ]


def kv_row(run: Run, trace: Trace) -> tuple[str, str]:
    """Bytes held of FullKV's, and of what numbers, where all layers hold alike."""
    model = trace.model
    numbers = 2 * model.num_layers * model.num_kv_heads * model.head_dim * trace.prompt.length
    each = run.kv_bytes_full / numbers
    of = f", {each:.0f} bytes a number" if each in (2, 4) else ""
    return mebibytes(run.kv_bytes), f"of {mebibytes(run.kv_bytes_full)}{of}"


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
