"""What a run record says of its runs and of itself, in words. No widgets, no plots.

Records come from strangers too: a value of any type and length becomes short words or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from app.wording import count, shortened
from dynamickv.record.trace import ModelInfo, Prompt, Run, Trace


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
    """How many layers a method cut; some kinds of layers are nobody's to cut."""
    others = model.uncompressed
    return sum(
        kept < prompt.length for layer, kept in enumerate(run.budgets) if layer not in others
    )


def compressed_words(layers: int, total: int, others: Mapping[int, str]) -> str:
    """The receipt that compression happened; `others` are the layers no method compresses."""
    verb = "slide" if set(others.values()) <= {"sliding"} else "are of other kinds"
    also = f", {len(others)} {verb}" if others else ""
    return f"compressed at {layers} of {total - len(others)} layers{also}"


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
    products = {
        "exact": ", exact products",
        "fast": ", fast products (a prompt's rounded as bfloat16)",
    }
    return (
        f"{model.name}, revision {names[0]}, {names[1]} on {names[2]}"
        f"{products.get(model.precision, '')}, "
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
