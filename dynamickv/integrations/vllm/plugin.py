"""Announce the plugin's classes to vLLM's registries."""

from __future__ import annotations

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from dynamickv.integrations.vllm.options import CONNECTOR, TESTED_VERSIONS

PACKAGE = "dynamickv.integrations.vllm"
BACKENDS = {
    AttentionBackendEnum.CPU_ATTN: f"{PACKAGE}.cpu.CompressedCPUBackend",
    # Not run yet: no GPU build of a tested version was at hand.
    AttentionBackendEnum.FLASH_ATTN: f"{PACKAGE}.flash_attention.CompressedFlashAttentionBackend",
    AttentionBackendEnum.TRITON_ATTN: f"{PACKAGE}.triton.CompressedTritonBackend",
}
"""The attention backends that are replaced, by the classes that extend them."""


def announce() -> None:
    """Register backends, cache layout and connector; again is no mistake.

    Raises:
        ValueError: vLLM is of a version that was not tested.
    """
    version = vllm.__version__.partition("+")[0]
    if version not in TESTED_VERSIONS:
        raise ValueError(
            f"the DynamicKV plugin was tested with vLLM {', '.join(TESTED_VERSIONS)} and this is "
            f"{version}; install a tested version or take dynamickv out of VLLM_PLUGINS"
        )
    # vLLM registers its own only while there are none yet; any question makes it do so.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    from dynamickv.integrations.vllm.cache_layout import CompressedManager, CompressedSpec

    KVCacheSpecRegistry.register(CompressedSpec, CompressedManager, CompressedSpec)
    for backend, path in BACKENDS.items():
        register_backend(backend, path)
    try:
        KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
    except ValueError:
        KVConnectorFactory.register_connector(
            CONNECTOR, f"{PACKAGE}.connector", "DynamicKVConnector"
        )
