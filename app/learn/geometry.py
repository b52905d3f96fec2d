"""Sizes of the paper's models and of the one in use: what the KV-cache calculator multiplies.

Source: the models' config.json on the Hugging Face hub; parameters are counted from those sizes (a
test builds the models without memory and counts again).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What one token costs in a model's cache, and what the model itself weighs."""

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence the model reads, in tokens."""
    parameters: int

    def cache_bytes(self, tokens: int, bytes_per_value: int, batch: int = 1) -> int:
        """Bytes of keys and values of `tokens` tokens, over all layers, for `batch` sequences."""
        values = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return values * bytes_per_value * tokens * batch


MODELS: tuple[ModelSize, ...] = (
    ModelSize(
        name="Llama-3-8B-Instruct",
        num_layers=32,
        num_query_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=8192,
        parameters=8_030_261_248,
    ),
    ModelSize(
        name="Mistral-7B-Instruct-v0.2",
        num_layers=32,
        num_query_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=32768,
        parameters=7_241_732_096,
    ),
    ModelSize(
        name="Qwen2-7B-Instruct",
        num_layers=28,
        num_query_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_positions=32768,
        parameters=7_615_616_512,
    ),
    ModelSize(
        name="InternLM2.5-7B-Chat-1M",
        num_layers=32,
        num_query_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=262144,
        parameters=7_737_708_544,
    ),
    ModelSize(
        name="SmolLM2-135M-Instruct",
        num_layers=30,
        num_query_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=8192,
        parameters=134_515_008,
    ),
)


def describe_models() -> list[dict[str, Any]]:
    """The models as plain data for the browser."""
    return [asdict(model) for model in MODELS]
