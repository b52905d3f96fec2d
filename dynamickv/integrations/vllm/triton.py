"""vLLM's Triton backend, with compressed layers. Not run yet: see docs/vllm.md."""

from __future__ import annotations

from dynamickv.integrations.vllm.backend import CompressedBackend, CompressedBuilder, CompressedImpl
from dynamickv.integrations.vllm.compat import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)


class CompressedTritonImpl(CompressedImpl, TritonAttentionImpl):  # type: ignore[misc]
    """Triton's kernels; the worker sees the queries."""


class CompressedTritonBuilder(CompressedBuilder, TritonAttentionMetadataBuilder):  # type: ignore[misc]
    """Triton's metadata, of shorter rows."""

    supports_update_block_table = False
    """Layers differ in length, so that none may take over another's metadata."""


class CompressedTritonBackend(CompressedBackend, TritonAttentionBackend):  # type: ignore[misc]
    """Known to vLLM as TRITON_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CompressedTritonImpl]:
        """The class of a layer's attention."""
        return CompressedTritonImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedTritonBuilder]:
        """The class of a layer's metadata builder."""
        return CompressedTritonBuilder
