"""DynamicKV inside vLLM: a plugin, loaded by vLLM where VLLM_PLUGINS names it.

    VLLM_PLUGINS=dynamickv vllm serve MODEL --enforce-eager --block-size 32 \\
        --kv-transfer-config '{"kv_connector": "DynamicKV", "kv_role": "kv_both",
            "kv_connector_module_path": "dynamickv.integrations.vllm.connector",
            "kv_connector_extra_config": {"capacity": 256}}'

Uses vLLM's official extension points only: the attention backend registry (sees a prompt's last
queries, gives every layer a block table of its own), the KV cache spec registry (one cache group
per layer) and a KV connector (what the scheduler and the workers tell each other). The methods in
`dynamickv.methods` choose, as everywhere else.
"""

from __future__ import annotations

import os

from dynamickv.integrations.vllm.options import CONNECTOR as CONNECTOR


def register() -> None:
    """Announce the plugin's classes to vLLM; its entry point, called in every process.

    Does nothing unless VLLM_PLUGINS names dynamickv: an installed package must not change a server
    that did not ask for it.

    Raises:
        ValueError: vLLM is of a version that was not tested.
    """
    if "dynamickv" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from dynamickv.integrations.vllm.plugin import announce

    announce()
