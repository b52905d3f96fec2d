"""What the plugin is told, and what it refuses to run with."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dynamickv.methods import METHODS, CompressionMethod, build_method
from dynamickv.methods.registry import require_known

if TYPE_CHECKING:
    from dynamickv.integrations.vllm.compat import VllmConfig

CONNECTOR = "DynamicKV"
"""Name of the connector in --kv-transfer-config."""
DEFAULT_METHOD = "DynamicKV"


def method_of(config: VllmConfig) -> CompressionMethod:
    """The method that --kv-transfer-config asks for.

    Raises:
        ValueError: no or bad options, or a configuration of vLLM that cannot be compressed.
    """
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        raise ValueError(
            "VLLM_PLUGINS names dynamickv, which needs --kv-transfer-config "
            f'\'{{"kv_connector": "{CONNECTOR}", "kv_role": "kv_both", '
            '"kv_connector_extra_config": {"capacity": 256}}\''
        )
    _require_supported(config)
    conversations_of(config)
    settings = dict(transfer.kv_connector_extra_config)
    settings.pop("conversations", None)
    if "decoding" in settings:
        raise ValueError(
            "DynamicKV's plugin compresses prompts and keeps answers whole: choosing again while "
            "answering would move tokens between blocks that the scheduler has already dealt with; "
            "leave decoding out"
        )
    return _method(settings)


def conversations_of(config: VllmConfig) -> bool:
    """Whether a later turn goes on from a compressed prompt: the option `conversations`.

    Raises:
        ValueError: it is neither true nor false.
    """
    value = config.kv_transfer_config.kv_connector_extra_config.get("conversations", True)
    if not isinstance(value, bool):
        raise ValueError(f"conversations must be true or false, got {value!r}")
    return value


def _method(settings: dict[str, Any]) -> CompressionMethod:
    name = settings.pop("method", DEFAULT_METHOD)
    require_known([name])
    known = {field.name for field in fields(METHODS[name])}
    for option in settings:
        if option not in known:
            raise ValueError(
                f"{name} has no option {option!r}; choose from {', '.join(sorted(known))}"
            )
    method = build_method(name, **settings)
    if not method.capabilities.vllm:
        why = "does not run in vLLM"
        if method.needs_mass:
            why = "needs the attention of all queries, which vLLM does not keep"
        elif method.capabilities.values:
            why = "reads the values, which the plugin does not look at"
        others = ", ".join(other for other in METHODS if METHODS[other].capabilities.vllm)
        raise ValueError(f"{name} {why}; choose from {others}")
    for option, only in (("granularity", "kv_head"), ("head_budgets", "uniform")):
        if getattr(method, option, only) != only:
            raise ValueError(
                f"{option} must be {only!r} in vLLM, whose blocks hold all KV heads of a layer, "
                f"got {getattr(method, option)!r}"
            )
    return method


def _require_supported(config: VllmConfig) -> None:
    """Refuse what would give wrong answers, or was never tried."""
    parallel = config.parallel_config
    refused = {
        "speculative decoding": (
            config.speculative_config is not None,
            "start without --speculative-config",
        ),
        "more ranks than KV heads": (
            parallel.tensor_parallel_size > 1
            and parallel.tensor_parallel_size > config.model_config.get_total_num_kv_heads(),
            "a smaller --tensor-parallel-size",
        ),
        "pipeline parallelism": (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size 1"),
        "context parallelism": (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            "start without context parallelism",
        ),
        "micro-batch overlap": (parallel.enable_dbo, "start without --enable-dbo"),
        "vLLM's second model runner": (
            config.use_v2_model_runner,
            "the environment variable VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        "a quantized KV cache": (
            config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            "--kv-cache-dtype auto",
        ),
    }
    _raise_first(refused)


def require_plain_attention(layer: Any) -> None:
    """Refuse layers in which a query's product with a key is not all that decides.

    Args:
        layer: vLLM's attention implementation of one layer.
    """
    remedy = "another model"
    _raise_first(
        {
            "ALiBi": (layer.alibi_slopes is not None, remedy),
            "capped attention logits": (bool(layer.logits_soft_cap), remedy),
            "attention sinks": (layer.sinks is not None, remedy),
            "layers that share a KV cache": (
                layer.kv_sharing_target_layer_name is not None,
                remedy,
            ),
        }
    )


def _raise_first(refused: dict[str, tuple[bool, str]]) -> None:
    for what, (present, remedy) in refused.items():
        if present:
            raise ValueError(f"DynamicKV's plugin does not work with {what}; use {remedy}")
