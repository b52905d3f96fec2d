"""What is added to any of vLLM's attention backends; the kernels stay vLLM's.

A layer's metadata is built from a batch in which compressed rows are shorter, and its queries are
shown to the worker.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynamickv.integrations.vllm.cache_layout import CompressedSpec
from dynamickv.integrations.vllm.compat import (
    AttentionMetadata,
    AttentionSpec,
    CommonAttentionMetadata,
    FullAttentionSpec,
    get_current_vllm_config,
    get_kv_transfer_group,
    has_kv_transfer_group,
    replace_as,
)
from dynamickv.integrations.vllm.options import method_of, require_plain_attention


class CompressedBackend:
    """Mixed into a backend: its layers get cache groups of their own."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A spec that shares blocks with no other layer."""
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            return spec
        return replace_as(spec, CompressedSpec)


class CompressedBuilder:
    """Mixed into a metadata builder: compressed rows are found in fewer blocks."""

    layer_names: list[str]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AttentionMetadata:
        """Metadata of one layer's batch."""
        if has_kv_transfer_group():
            common_attn_metadata = get_kv_transfer_group().shortened(
                self.layer_names[0], common_attn_metadata
            )
        return super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, fast_build
        )


class CompressedImpl:
    """Mixed into an implementation: the worker sees the queries."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        method_of(get_current_vllm_config())
        super().__init__(*arguments, **named)
        require_plain_attention(self)

    def forward(self, layer: Any, query: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Attention, and a look at the queries."""
        if has_kv_transfer_group():
            get_kv_transfer_group().see(layer.layer_name, query)
        output: Tensor = super().forward(layer, query, *arguments, **named)  # type: ignore[misc]
        return output
