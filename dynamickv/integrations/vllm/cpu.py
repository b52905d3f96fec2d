"""vLLM's CPU backend, with compressed layers."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from dynamickv.integrations.vllm.backend import CompressedBackend, CompressedBuilder, CompressedImpl


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
