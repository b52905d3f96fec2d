"""Independent restatements of what the engine computes, written to be read and checked by hand:
plain loops, float64, no code shared with the engine."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def attention_received(queries: np.ndarray, keys: np.ndarray, first: int = 0) -> np.ndarray:
    """Attention that the queries from position `first` on pay to every position, summed over them.

    Args:
        queries: (query_heads, n, head_dim), all of the prompt's. keys: (kv_heads, n, head_dim).

    Returns:
        (query_heads, n), float64.
    """
    query_heads, length, head_dim = queries.shape
    group = query_heads // keys.shape[0]
    received = np.zeros((query_heads, length))
    for head in range(query_heads):
        for query in range(first, length):
            logits = keys[head // group, : query + 1].astype(np.float64) @ queries[head, query]
            received[head, : query + 1] += softmax(logits / math.sqrt(head_dim))
    return received


def pooled_row(row: list[float], kernel_size: int, pooling: str) -> list[float]:
    """ "max" over the neighbours that exist; "avg" counts those beyond the ends as zero."""
    half = kernel_size // 2
    pooled = []
    for position in range(len(row)):
        near = row[max(0, position - half) : position + half + 1]
        pooled.append(max(near) if pooling == "max" else sum(near) / kernel_size)
    return pooled


def window_scores(queries: np.ndarray, keys: np.ndarray, method: Any) -> list[list[float]]:
    """Scores of every head's prefix: spec 1.1, 1.2 and 1.4."""
    prefix = keys.shape[1] - method.window_size
    rows = attention_received(queries, keys, prefix)[:, :prefix]
    if method.granularity == "kv_head":
        grouped = rows.reshape(keys.shape[0], -1, prefix)
        join = {"mean": np.mean, "max": np.max, "sum": np.sum}[method.group_reduction]
        rows = join(grouped, axis=1)
    return [pooled_row(row.tolist(), method.kernel_size, method.pooling) for row in rows]


def best(row: list[float], count: int) -> list[int]:
    """The `count` best positions, ascending; ties go to the earlier one."""
    ranked = sorted(range(len(row)), key=lambda position: (-row[position], position))
    return sorted(ranked[: max(count, 0)])


def dynamickv(
    scores: list[list[list[float]]], method: Any
) -> tuple[list[list[list[int]]], list[list[int]]]:
    """DynamicKV with the departures of its docstring, for a prompt longer than its capacity.

    Args:
        scores: per layer and head, the prefix's scores.

    Returns:
        Kept prefix positions per layer and head; the prefix budgets after every update.
    """
    num_layers, heads, prefix = len(scores), len(scores[0]), len(scores[0][0])
    base = method.capacity - method.window_size
    first = min(int(method.r_max * base), prefix)
    held: list[int] = []
    history = []
    for layer in range(num_layers):
        held.append(first)
        seen = layer + 1
        if seen % method.update_interval != 0 and seen != num_layers:
            continue
        budgets = _budgets(scores[:seen], base, first, num_layers, heads)
        history.append(budgets)
        held = [min(have, budget) for have, budget in zip(held, budgets, strict=True)]
    kept = [[best(row, count) for row in layer] for layer, count in zip(scores, held, strict=True)]
    return kept, history


def _budgets(
    scores: list[list[list[float]]], base: int, first: int, num_layers: int, heads: int
) -> list[int]:
    """Spec 5.2, steps 1 to 10."""
    seen, total = len(scores), base * num_layers
    ranked = sorted(
        (-score, layer) for layer, rows in enumerate(scores) for row in rows for score in row
    )
    raw = [0] * seen
    for _, layer in ranked[: base * heads * seen]:
        raw[layer] += 1
    shares = [count // seen for count in raw]
    if seen == num_layers:
        shares[-1] += base * heads - sum(shares)
    claims = [0] * seen
    if sum(shares):
        for layer, share in enumerate(shares):
            fraction = np.float32(share) / np.float32(sum(shares))
            claims[layer] = int(np.float32(first) * fraction)
    if sum(claims) == 0:
        budgets = [total // seen] * seen
    else:
        ratio = Fraction(sum(claims) / total)
        budgets = [math.floor(Fraction(claim) / ratio) for claim in claims]
    budgets[-1] += total - sum(budgets)
    return budgets


def next_token_logits(
    model: Any, token_ids: list[int], prompt_length: int, kept: list[list[list[int]]]
) -> np.ndarray:
    """Logits of a Llama or Qwen2 model at every position, (n, vocabulary), in float64.

    The prompt attends to all of itself. A later token attends, in layer l and query head h, to the
    prompt positions kept[l][h], to the later tokens before it and to itself.
    """
    config, weights = (
        model.config,
        {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()},
    )
    head_dim = (
        config.head_dim
        if getattr(config, "head_dim", None)
        else (config.hidden_size // config.num_attention_heads)
    )
    group = config.num_attention_heads // config.num_key_value_heads
    base = config.rope_parameters["rope_theta"]
    length = len(token_ids)
    hidden = weights["model.embed_tokens.weight"][token_ids]

    def project(states: np.ndarray, name: str) -> np.ndarray:
        return states @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def normed(states: np.ndarray, name: str) -> np.ndarray:
        size = np.sqrt((states**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
        return states / size * weights[f"{name}.weight"]

    def rotated(states: np.ndarray) -> np.ndarray:
        """(n, heads, head_dim) turned by its position."""
        frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
        angles = np.arange(length)[:, None] * frequencies
        cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
        left, right = states[..., : head_dim // 2], states[..., head_dim // 2 :]
        return np.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)

    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        states = normed(hidden, f"{name}.input_layernorm")
        queries, keys, values = (
            project(states, f"{name}.self_attn.{kind}_proj").reshape(length, -1, head_dim)
            for kind in "qkv"
        )
        queries, keys = rotated(queries), rotated(keys)
        mixed = np.zeros((length, config.num_attention_heads, head_dim))
        for head in range(config.num_attention_heads):
            for query in range(length):
                visible = list(range(min(query + 1, prompt_length)))
                if query >= prompt_length:
                    visible = [*kept[layer][head], *range(prompt_length, query + 1)]
                logits = keys[visible, head // group] @ queries[query, head]
                mixed[query, head] = (
                    softmax(logits / math.sqrt(head_dim)) @ values[visible, head // group]
                )
        hidden = hidden + project(mixed.reshape(length, -1), f"{name}.self_attn.o_proj")
        states = normed(hidden, f"{name}.post_attention_layernorm")
        gate = project(states, f"{name}.mlp.gate_proj")
        up = project(states, f"{name}.mlp.up_proj")
        hidden = hidden + project(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj")
    return normed(hidden, "model.norm") @ weights["lm_head.weight"].T
