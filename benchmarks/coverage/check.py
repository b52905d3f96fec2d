"""Is one architecture compressed exactly, refused in a sentence, or wrong?

Runs the engine against the model's own `generate` and its own eager attention (reference.py).
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import dynamickv as dkv
from benchmarks.coverage.reference import Reference, TracingCache, use
from benchmarks.coverage.tiny import tiny_model, tiny_prompt

PROMPT, NEW = 60, 8
CAPACITY, WINDOW, KERNEL = 24, 4, 5
METHODS: dict[str, dkv.CompressionMethod] = {
    "SnapKV": dkv.SnapKV(capacity=CAPACITY, window_size=WINDOW, kernel_size=KERNEL),
    "DynamicKV": dkv.DynamicKV(capacity=CAPACITY, window_size=WINDOW, kernel_size=KERNEL),
}
"""What compresses; the first one's kept set is checked against the model's attention."""
TOLERANCE, MASKED_TOLERANCE = 1e-5, 1e-4
"""Of logits, relative to the largest: against the model's own run, against its eager attention."""
OVERLAP = 0.97
"""Least share of the positions that the model's own attention asks for."""


@dataclass(kw_only=True)
class Verdict:
    """What came of one architecture, JSON-ready."""

    name: str
    verdict: str = ""
    """exact, refused, wrong, error; or unbuilt, own: the model itself does not build or run."""
    reason: str = ""
    kinds: list[str] = field(default_factory=list)
    """Kinds of the layers' caches, in order, as transformers makes them."""
    details: dict[str, Any] = field(default_factory=dict)


def examine(name: str) -> Verdict:
    """Build, run and judge one architecture; never raises for what the model or the engine does."""
    verdict = Verdict(name=name)
    try:
        model = tiny_model(name)
    except Exception as error:
        return _ended(verdict, "unbuilt", last_line(error))
    ids = tiny_prompt(PROMPT)
    try:
        own = generate(model, ids)
    except Exception as error:
        return _ended(verdict, "own", last_line(error))
    verdict.kinds = [type(layer).__name__ for layer in getattr(own.past_key_values, "layers", [])]
    verdict.details["attention"] = model.config._attn_implementation
    problems: list[str] = []
    try:
        whole = _whole(name, ids, own, verdict.details, problems)
        for label, method in METHODS.items():
            _compressed(name, label, method, ids, whole, verdict.details, problems)
    except Exception as error:
        if refused(error):
            return _ended(verdict, "refused", str(error))
        verdict.details["traceback"] = traceback.format_exc()[-2000:]
        return _ended(verdict, "error", last_line(error))
    return _ended(verdict, "wrong" if problems else "exact", "; ".join(problems))


def generate(model: Any, ids: Tensor, **settings: Any) -> Any:
    """Greedy tokens and their raw logits."""
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )


def _whole(name: str, ids: Tensor, own: Any, details: dict[str, Any], problems: list[str]) -> int:
    """A capacity above the prompt changes nothing; the bytes then held."""
    model = tiny_model(name)
    with dkv.compress(model, dkv.DynamicKV(capacity=2 * PROMPT)) as cache:
        ours = generate(model, ids, past_key_values=cache)
    difference = distance(ours.logits, own.logits)
    details["whole"] = difference
    if not torch.equal(ours.sequences, own.sequences):
        problems.append("above the prompt's length: other tokens than generate's")
    elif difference > TOLERANCE:
        problems.append(f"above the prompt's length: logits differ by {difference:.1e}")
    details["bytes"] = {"own": stored_bytes(own.past_key_values), "whole": stored_bytes(cache)}
    return stored_bytes(cache)


def _compressed(
    name: str,
    label: str,
    method: dkv.CompressionMethod,
    ids: Tensor,
    whole: int,
    details: dict[str, Any],
    problems: list[str],
) -> None:
    """A small capacity gives what the model's own attention gives over the kept positions."""
    model = tiny_model(name)
    with dkv.compress(model, method) as cache:
        ours = generate(model, ids, past_key_values=cache)
    held = stored_bytes(cache)
    details["bytes"][label] = held
    if held >= whole:
        problems.append(f"{label}: nothing was compressed")
        return
    geometry = dkv.Geometry.of(model.config) if hasattr(dkv, "Geometry") else _geometry(model)
    kept = dict(zip(geometry.compressed_layers, cache.retention().indices, strict=True))
    dropped = {place: _dropped(heads) for place, heads in kept.items()}
    same = reference_run(name, ids, ours.sequences, {})
    masked = reference_run(name, ids, ours.sequences, dropped)
    unhidden = sorted(place for place in dropped if place not in masked.reference.hidden)
    if unhidden:
        problems.append(f"{label}: layers {unhidden} were not met by the reference")
        return
    noise = distance(same.logits[:1], ours.logits[:1])
    difference = distance(masked.logits, ours.logits)
    changed = distance(masked.logits, same.logits)
    details[label] = {"masked": difference, "eager": noise, "without": changed}
    if difference > max(MASKED_TOLERANCE, 4 * noise):
        problems.append(f"{label}: logits differ from attention over the kept by {difference:.1e}")
    full = full_layers(same.reference.cache)
    left = sorted(set(full) - set(kept))
    if left:
        problems.append(f"{label}: layers {left} attend to everything and were left whole")
    if label == next(iter(METHODS)):
        overlaps = {place: overlap(masked.reference, place, heads) for place, heads in kept.items()}
        details["overlap"] = overlaps
        low = {place: share for place, share in overlaps.items() if share < OVERLAP}
        if low:
            problems.append(
                f"{label}: keeps {min(low.values()):.0%} of what attention asks for "
                f"in layers {sorted(low)}"
            )


@dataclass(kw_only=True)
class ReferenceRun:
    """Logits of a teacher-forced run, and what the reference saw in it."""

    logits: Any
    reference: Reference


def reference_run(
    name: str, ids: Tensor, sequence: Tensor, dropped: dict[int, Tensor]
) -> ReferenceRun:
    """The model's own eager attention fed the tokens of `sequence`."""
    model = tiny_model(name)
    cache = TracingCache(config=model.config)
    reference = Reference(cache=cache, prompt_length=ids.shape[1], window=WINDOW, dropped=dropped)
    use(model, reference)
    forced = LogitsProcessorList([Forced(sequence)])
    output = generate(model, ids, past_key_values=cache, logits_processor=forced)
    return ReferenceRun(logits=output.logits, reference=reference)


class Forced(LogitsProcessor):
    """Makes greedy decoding follow a given sequence."""

    def __init__(self, sequence: Tensor) -> None:
        self.sequence = sequence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """All but the next token of the sequence become impossible."""
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.sequence[0, input_ids.shape[1]]] = 0
        return forced


def overlap(reference: Reference, place: int, kept: Any) -> float:
    """Share of what SnapKV would keep by the model's own weights that is kept, the worst head's.

    For layers whose keys others read, the larger of two shares: with the readers' votes and
    without.
    """
    rows = reference.weights.get(place)
    if rows is None:
        return float("nan")
    votes = [rows]
    if place in reference.readers and all(r.shape == rows.shape for r in reference.readers[place]):
        votes.append(torch.stack([rows, *reference.readers[place]]).mean(dim=0))
    return max(_share(vote, kept) for vote in votes)


def _share(rows: Tensor, kept: Any) -> float:
    heads, length = len(kept), rows.shape[-1]
    scores = rows[..., : length - WINDOW].sum(dim=1)
    scores = scores.view(heads, -1, length - WINDOW).mean(dim=1)
    pooled = F.max_pool1d(scores[None], KERNEL, stride=1, padding=KERNEL // 2)[0]
    shares = []
    for head, positions in enumerate(kept):
        chosen = {int(position) for position in positions if position < length - WINDOW}
        # Pooling makes ties; what scores as much as the last one wanted is as good.
        worst = pooled[head].topk(len(chosen)).values[-1]
        wanted = pooled[head] > worst * (1 + 1e-5)
        good = pooled[head] >= worst * (1 - 1e-5)
        missed = sum(1 for place in wanted.nonzero().flatten().tolist() if place not in chosen)
        extra = sum(1 for place in chosen if not bool(good[place]))
        shares.append(1 - max(missed, extra) / len(chosen))
    return min(shares)


def _dropped(kept: Any) -> Tensor:
    """(heads, PROMPT) bool, what is not among the kept positions of each head."""
    dropped = torch.ones(len(kept), PROMPT, dtype=torch.bool)
    for head, positions in enumerate(kept):
        dropped[head, positions] = False
    return dropped


def full_layers(cache: TracingCache) -> list[int]:
    """Layers that hold every position."""
    return [
        place
        for place, layer in enumerate(cache.layers)
        if getattr(layer, "keys", None) is not None
        and not getattr(layer, "is_sliding", False)
        and layer.keys.dim() == 4
        and layer.keys.shape[2] >= PROMPT
    ]


def stored_bytes(cache: Any) -> int:
    """Bytes of the tensors' memory that a cache's layers hold, each storage once."""
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif hasattr(value, "lazy_initialization"):
            walk(vars(value))

    walk(getattr(cache, "layers", None))
    return sum(storages.values())


def distance(left: Any, right: Any) -> float:
    """Largest difference of two runs' logits, relative to the largest logit."""
    one, other = torch.cat(list(left)), torch.cat(list(right))
    scale = max(1.0, float(other[other.isfinite()].abs().max()))
    apart = (one - other).abs()
    return float(apart[one.isfinite() | other.isfinite()].max()) / scale


def refused(error: BaseException) -> bool:
    """Whether it is one sentence that the engine says."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, ValueError)
        and "\n" not in str(error)
        and "/dynamickv/" in frames[-1].filename
    )


def last_line(error: BaseException) -> str:
    """The last line of what a traceback would show, with the place."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
    return f"{text[:300]} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"


def _geometry(model: Any) -> Any:
    from dynamickv.models import Geometry

    return Geometry.of(model.config)


def _ended(verdict: Verdict, kind: str, reason: str) -> Verdict:
    verdict.verdict, verdict.reason = kind, reason
    return verdict
