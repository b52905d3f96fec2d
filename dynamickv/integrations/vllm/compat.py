"""Every name that the plugin takes from vLLM, and the versions it was tested with: the one file to
change for another version.

A name is looked up when it is first imported from here, so that a backend whose kernels are not
installed is not asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

TESTED_VERSIONS = ("0.32.0",)
"""vLLM versions that `make vllm` was run with."""
READ_VERSIONS = ("0.33.0",)
"""vLLM versions whose sources have every name below, and that could not be run: no build of them
was at hand. Allowed with a warning."""

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
NAMES = {
    "__version__": "vllm",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "AttentionMetadata": "vllm.v1.attention.backend",
    "AttentionSpec": "vllm.v1.kv_cache_interface",
    "BlockPool": "vllm.v1.core.block_pool",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadataBuilder": "vllm.v1.attention.backends.cpu_attn",
    "FlashAttentionBackend": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionImpl": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionMetadataBuilder": "vllm.v1.attention.backends.flash_attn",
    "ForwardContext": "vllm.forward_context",
    "FullAttentionManager": "vllm.v1.core.single_type_kv_cache_manager",
    "FullAttentionSpec": "vllm.v1.kv_cache_interface",
    "KVCacheBlock": "vllm.v1.core.kv_cache_utils",
    "KVCacheBlocks": "vllm.v1.core.kv_cache_manager",
    "KVCacheConfig": "vllm.v1.kv_cache_interface",
    "KVCacheSpec": "vllm.v1.kv_cache_interface",
    "KVCacheSpecRegistry": "vllm.v1.kv_cache_spec_registry",
    "KVConnectorBase_V1": f"{_CONNECTOR}.v1.base",
    "KVConnectorFactory": f"{_CONNECTOR}.factory",
    "KVConnectorMetadata": f"{_CONNECTOR}.v1.base",
    "KVConnectorOutput": "vllm.v1.outputs",
    "KVConnectorPromMetrics": f"{_CONNECTOR}.v1.metrics",
    "KVConnectorRole": f"{_CONNECTOR}.v1.base",
    "KVConnectorStats": f"{_CONNECTOR}.v1.metrics",
    "KVConnectorWorkerMetadata": f"{_CONNECTOR}.v1.base",
    "Request": "vllm.v1.request",
    "RequestStatus": "vllm.v1.request",
    "SlidingWindowSpec": "vllm.v1.kv_cache_interface",
    "SchedulerOutput": "vllm.v1.core.sched.output",
    "SupportsHMA": f"{_CONNECTOR}.v1.base",
    "TritonAttentionBackend": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionImpl": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionMetadataBuilder": "vllm.v1.attention.backends.triton_attn",
    "VllmConfig": "vllm.config",
    "create_metric_per_engine": "vllm.v1.metrics.utils",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "get_current_vllm_config": "vllm.config",
    "get_kv_transfer_group": "vllm.distributed.kv_transfer",
    "get_tp_group": "vllm.distributed.parallel_state",
    "has_kv_transfer_group": "vllm.distributed.kv_transfer",
    "init_logger": "vllm.logger",
    "register_backend": "vllm.v1.attention.backends.registry",
    "replace_as": "vllm.v1.kv_cache_interface",
}
"""Each name's module, the same in all versions above."""


def __getattr__(name: str) -> Any:
    """A name of vLLM's.

    Raises:
        AttributeError: it is not in the list, or vLLM lacks it.
    """
    if name not in NAMES:
        raise AttributeError(f"{name} is not among the names taken from vLLM; add it to NAMES")
    return getattr(importlib.import_module(NAMES[name]), name)
