"""vLLM's CPU backend, with compressed layers."""

from __future__ import annotations

from dynamickv.integrations.vllm.backend import CompressedBackend, CompressedBuilder, CompressedImpl
from dynamickv.integrations.vllm.compat import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)


class CompressedCPUImpl(CompressedImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """The CPU kernels; the worker sees the queries."""


class CompressedCPUBuilder(CompressedBuilder, CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """The CPU kernels' metadata, of shorter rows."""


class CompressedCPUBackend(CompressedBackend, CPUAttentionBackend):  # type: ignore[misc]
    """Known to vLLM as CPU_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CompressedCPUImpl]:
        """The class of a layer's attention."""
        return CompressedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedCPUBuilder]:
        """The class of a layer's metadata builder."""
        return CompressedCPUBuilder
