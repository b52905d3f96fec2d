"""vLLM's FlashAttention backend, with compressed layers. Not run yet: see docs/vllm.md."""

from __future__ import annotations

from dynamickv.integrations.vllm.backend import CompressedBackend, CompressedBuilder, CompressedImpl
from dynamickv.integrations.vllm.compat import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)


class CompressedFlashAttentionImpl(CompressedImpl, FlashAttentionImpl):  # type: ignore[misc]
    """FlashAttention; the worker sees the queries."""


class CompressedFlashAttentionBuilder(CompressedBuilder, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """FlashAttention's metadata, of shorter rows."""

    supports_update_block_table = False
    """Layers differ in length, so that none may take over another's metadata."""


class CompressedFlashAttentionBackend(CompressedBackend, FlashAttentionBackend):  # type: ignore[misc]
    """Known to vLLM as FLASH_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CompressedFlashAttentionImpl]:
        """The class of a layer's attention."""
        return CompressedFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedFlashAttentionBuilder]:
        """The class of a layer's metadata builder."""
        return CompressedFlashAttentionBuilder
