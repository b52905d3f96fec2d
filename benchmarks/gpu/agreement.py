"""How near two ways of computing the same come to each other."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

import dynamickv as dkv
from benchmarks.gpu.bench import Bench
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode import extend


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    expected = expected.float().cpu()
    return float((actual.float().cpu() - expected).norm() / expected.norm())


def overlap(one: dkv.Retention, other: dkv.Retention) -> float:
    """Positions both keep, over the positions of the larger, across layers and heads."""
    both = total = 0
    for a, b in zip(one.indices, other.indices, strict=True):
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            both += len(set(x) & set(y))
            total += max(len(x), len(y))
    return both / total


def largest_gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Where the likeliest tokens differ: how far apart the other's logits see them, at most."""
    return max(
        float(b.float().max() - b[int(a.argmax())].float()) for a, b in zip(one, other, strict=True)
    )


def same_tokens(one: Sequence[Tensor], other: Sequence[Tensor]) -> int:
    """Steps at which the same token is the most likely one."""
    return sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(one, other, strict=True))


def largest(logits: Sequence[Tensor]) -> float:
    """How far logits reach from 0."""
    return max(float(step.abs().max()) for step in logits)


def alike(bench: Bench, label: str, logits: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """A figure: how often the same token is the most likely one."""
    bench.add(
        label,
        same_tokens(logits, plain) / len(plain),
        note=f"of {len(plain)} steps; else within {largest_gap(logits, plain):.4f} in logits "
        f"that reach {largest(plain):.1f}; relative difference "
        f"{relative(torch.stack(list(logits)), torch.stack(list(plain))):.1e}",
    )


def cpu_twin(llm: dkv.LoadedModel) -> dkv.LoadedModel:
    """The same weights in float32 on the CPU, where all else is computed anew."""
    twin = type(llm.model)(llm.model.config).float()
    twin.load_state_dict({name: w.float().cpu() for name, w in llm.model.state_dict().items()})
    return dkv.LoadedModel.wrap(twin, None, "cpu", "float32")  # type: ignore[arg-type]


def wide_twin(llm: dkv.LoadedModel) -> dkv.LoadedModel:
    """The same weights in float32 on the same device."""
    wide = copy.deepcopy(llm.model).float()
    return dkv.LoadedModel.wrap(wide, None, "twin", "float32")  # type: ignore[arg-type]


def logits_of(
    twin: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, tokens: Sequence[int]
) -> Tensor:
    """A float32 model's logits after each token, (tokens, vocabulary), from the same pruned
    cache."""
    cache = KVCache(len(prefill.layers))
    pruned = prune(prefill, retention, 0)
    for layer, held in zip(cache.whole_layers(), pruned.whole_layers(), strict=True):
        keys, values = (states.float().to(twin.device) for states in held.held())
        layer.hold(keys, values, prefill.length, room=len(tokens))
    return torch.stack(
        [extend(twin, cache, [token], prefill.length + step) for step, token in enumerate(tokens)]
    )
