"""What Explore's form says of itself: how long the prompt is, and what a capacity means for it.
Pure functions; no widgets, no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import dynamickv as dkv
from app.examples import Example
from app.inputs import MAX_CHARACTERS, MAX_NEW_TOKENS
from app.serving.comparisons import CHARACTERS_PER_TOKEN
from app.serving.model_host import PromptSize
from app.settings import CAPACITIES, offered_methods
from app.wording import count, mebibytes, percent


def counted(document: str, size: PromptSize | None) -> dict[str, Any]:
    """The token readout, which carries the number; a guess before the model is there."""
    if size is None:
        guess = round(len(document) / CHARACTERS_PER_TOKEN)
        return {
            "value": f"about {guess:,} tokens",
            "note": "exact once the model is ready",
            "tokens": guess,
        }
    shown = {"value": count(size.prompt, "token"), "tokens": size.prompt}
    if size.prompt > size.limit:
        note = f"the model reads {size.limit:,}: shorten it, or cut its middle (advanced settings)"
        return {**shown, "note": note, "tone": "loud"}
    # The last token of an answer is never read.
    room = size.limit - size.prompt + 1
    rest = f", so answers end after {room}" if room < MAX_NEW_TOKENS else ""
    return {**shown, "note": f"in the prompt; the model reads {size.limit:,}{rest}"}


def uncountable(document: str) -> dict[str, Any] | None:
    """The token readout of a text that is not counted; None for any other."""
    if not document or not document.strip():
        return {"value": "", "note": "paste a text, upload a file or pick an example"}
    if len(document) > MAX_CHARACTERS:
        return {
            "value": f"{len(document):,} characters",
            "note": f"of at most {MAX_CHARACTERS:,}",
            "tone": "loud",
        }
    return None


def price(ratio: float, methods: Collection[str]) -> dict[str, str]:
    """What those of the chosen methods cost that ask for the attention of all tokens; empty without
    any.
    """
    offered = [name for name in offered_methods() if name in methods]
    asking = [name for name in offered if dkv.METHODS[name].capabilities.mass]
    if not asking:
        return {"value": "", "note": ""}
    note = f"{asking[0]} reads the whole attention matrix: about {ratio:.1f} times the reading."
    return {"value": "", "note": note}


def counted_before(first: Example | None) -> dict[str, Any] | None:
    """The same for the example on screen, known from its recorded run."""
    if first is None or first.trace is None:
        return None
    return {
        "value": f"{first.trace.prompt.length:,} tokens",
        "note": "in the prompt",
        "tokens": first.trace.prompt.length,
    }


def capacity_readout(
    geometry: Mapping[str, int] | None, capacity: Any, tokens: int | None, granularity: str
) -> dict[str, str]:
    """What the capacity means for a prompt of so many tokens; nothing where it is none."""
    number = isinstance(capacity, int | float) and 1 <= capacity < math.inf
    if geometry is None or not number:
        return {"value": "", "note": ""}
    per_query = granularity == "query_head"
    heads = geometry["num_query_heads"] if per_query else geometry["num_kv_heads"]
    line = capacity_line(geometry, int(capacity), tokens, heads)
    if tokens and capacity >= tokens:
        return {
            "value": "the prompt fits",
            "note": f"nothing to compress · {line}",
            "tone": "loud",
        }
    share, _, rest = line.partition(" · ")
    return {"value": share, "note": f"· {rest}" if rest else ""}


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


def bytes_per_value(trace: dkv.Trace) -> int:
    """Bytes of one number in a record's caches."""
    model = asdict(trace.model) | {"bytes_per_value": 1}
    numbers = cache_bytes_per_token(model) * trace.prompt.length
    return round(trace.runs[0].kv_bytes_full / numbers)


def tokens_of(counted: str | None) -> int | None:
    """The number a token readout carries; browsers may send anything back."""
    try:
        tokens = json.loads(counted or "{}").get("tokens")
    except (ValueError, AttributeError):
        return None
    return tokens if isinstance(tokens, int) and 0 < tokens <= dkv.trace.MAX_POSITIONS else None


def capacity_of(trace: dkv.Trace) -> int | None:
    """The capacity at which a record's methods were compared."""
    found = (run.parameters.get("capacity") for run in trace.runs)
    return next((size for size in found if isinstance(size, int)), None)


def linked_capacity(text: str | None) -> int | None:
    """The capacity in an address, or None where it is none that the form offers."""
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= 4):
        return None
    return int(text) if CAPACITIES[0] <= int(text) <= CAPACITIES[1] else None
