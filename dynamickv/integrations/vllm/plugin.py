"""Announce the plugin's classes to vLLM's registries."""

from __future__ import annotations

import os

from dynamickv.integrations.vllm import compat
from dynamickv.integrations.vllm.compat import (
    AttentionBackendEnum,
    KVCacheSpecRegistry,
    KVConnectorFactory,
    init_logger,
    register_backend,
)
from dynamickv.integrations.vllm.options import CONNECTOR

logger = init_logger("vllm.dynamickv")
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
    require_version(compat.__getattr__("__version__"))
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


def require_announced() -> None:
    """Raise ValueError where vLLM did not load the plugin."""
    if not all(path == backend.get_path() for backend, path in BACKENDS.items()):
        named = os.environ.get("VLLM_PLUGINS")
        raise ValueError(
            f"--kv-transfer-config asks for {CONNECTOR}, and VLLM_PLUGINS={named or ''} did not "
            "load the plugin; set VLLM_PLUGINS=dynamickv"
        )


def require_version(version: str) -> None:
    """Raise ValueError for a version of vLLM that the plugin is not known to fit; warn for one that
    it was read against and not run with."""
    version = version.partition("+")[0]
    if version in compat.TESTED_VERSIONS:
        return
    tested = ", ".join(compat.TESTED_VERSIONS)
    if version not in compat.READ_VERSIONS:
        raise ValueError(
            f"the DynamicKV plugin was tested with vLLM {tested} and this is {version}; install a "
            "tested version or take dynamickv out of VLLM_PLUGINS"
        )
    logger.warning(
        "the DynamicKV plugin was tested with vLLM %s, not with %s: it was held against its "
        "sources only",
        tested,
        version,
    )
