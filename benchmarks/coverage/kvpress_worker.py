"""The same question put to kvpress, in its own environment: a name per line in, JSON out.

Does SnapKVPress shorten the cache of the tiny model, and does what it keeps follow the model's own
attention? Imports nothing of the engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache

from benchmarks.coverage.reference import Reference, TracingCache, use
from benchmarks.coverage.tiny import tiny_model, tiny_prompt
from benchmarks.coverage.worker import serve

PROMPT, WINDOW, KERNEL, RATIO = 60, 4, 5, 0.6
SEEDS = (1, 2, 3)


def examine(name: str) -> dict[str, Any]:
    """One architecture's answer: "unknown", "own" (the model does not run there), "error",
    "whole" (nothing gets shorter) or "shrinks", then with the overlap of the worst layer."""
    if name not in CONFIG_MAPPING:
        return {"name": name, "verdict": "unknown"}
    try:
        tiny_model(name).generate(tiny_prompt(PROMPT), max_new_tokens=2, do_sample=False)
    except Exception as error:
        return {"name": name, "verdict": "own", "reason": _said(error)}
    try:
        overlaps: dict[int, float] = {}
        for seed in SEEDS:
            for place, share in _shares(name, tiny_prompt(PROMPT, seed)).items():
                overlaps[place] = min(share, overlaps.get(place, share))
    except Exception as error:
        return {"name": name, "verdict": "error", "reason": _said(error)}
    if not overlaps:
        return {"name": name, "verdict": "whole"}
    return {"name": name, "verdict": "shrinks", "overlap": overlaps}


def _shares(name: str, ids: Tensor) -> dict[int, float]:
    """By layer that got shorter, the share of what the model's own attention asks for; of layers
    that attend to the whole prompt, unless only others got shorter."""
    from kvpress import SnapKVPress

    press = SnapKVPress(compression_ratio=RATIO, window_size=WINDOW, kernel_size=KERNEL)
    model = tiny_model(name)
    with press(model):
        pressed = _prefilled(model, ids)
    whole = _prefilled(tiny_model(name), ids)
    shorter = [
        place
        for place, layer in enumerate(pressed.layers)
        if getattr(layer, "keys", None) is not None and layer.keys.shape[2] < PROMPT
    ]
    if not shorter:
        return {}
    model = tiny_model(name)
    cache = TracingCache(config=model.config)
    reference = Reference(cache=cache, prompt_length=PROMPT, window=WINDOW)
    use(model, reference)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    if not reference.weights:
        # Attention of its own code: what it returns is all that can be known.
        eager = tiny_model(name, attention="eager")
        with torch.no_grad():
            returned = eager(ids, output_attentions=True).attentions
        reference.weights.update(
            {place: rows[0, :, -WINDOW:] for place, rows in enumerate(returned)}
        )
    whole_layers = [p for p in shorter if not getattr(cache.layers[p], "is_sliding", False)]
    return {
        place: _share(reference.weights[place], pressed.layers[place], whole.layers[place])
        for place in whole_layers or shorter
    }


@torch.no_grad()
def _prefilled(model: Any, ids: Tensor) -> Any:
    """The cache after the prompt: the one that kvpress's pipeline makes, else the model's own."""
    try:
        cache = DynamicCache()
        model(ids, past_key_values=cache)
    except Exception:
        cache = model(ids, use_cache=True).past_key_values
    return cache


def _share(rows: Tensor, pressed: Any, whole: Any) -> float:
    """The worst head's share of the positions that kvpress's own rule takes from these weights."""
    heads, held = pressed.keys.shape[1:3]
    scores = F.avg_pool1d(rows[..., : PROMPT - WINDOW].mean(dim=1), KERNEL, 1, KERNEL // 2)
    scores = scores.view(heads, -1, PROMPT - WINDOW).mean(dim=1)
    shares = []
    for head in range(heads):
        apart = torch.cdist(pressed.keys[0, head], whole.keys[0, head])
        kept = {place for place in apart.argmin(dim=1).tolist() if place < PROMPT - WINDOW}
        least = scores[head].topk(held - WINDOW).values[-1]
        wanted = (scores[head] > least * (1 + 1e-5)).nonzero().flatten().tolist()
        missed = sum(1 for place in wanted if place not in kept)
        shares.append(1 - missed / (held - WINDOW))
    return min(shares)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


if __name__ == "__main__":
    serve(examine)
