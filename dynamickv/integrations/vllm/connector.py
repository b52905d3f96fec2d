"""The scheduler's and the workers' halves of the plugin, as a vLLM KV connector.

Nothing leaves the machine: a connector is vLLM's official place to hear of requests in the
scheduler and of steps in the workers, to give blocks back, to restore a preempted request, to go on
from a conversation's compressed prompt, and to add to a response.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from dynamickv.integrations.vllm.cache_layout import CompressedSpec
from dynamickv.integrations.vllm.compat import (
    AttentionMetadata,
    CommonAttentionMetadata,
    ForwardContext,
    KVCacheBlocks,
    KVCacheConfig,
    KVConnectorBase_V1,
    KVConnectorOutput,
    KVConnectorPromMetrics,
    KVConnectorRole,
    KVConnectorStats,
    Request,
    SchedulerOutput,
    SlidingWindowSpec,
    SupportsHMA,
    VllmConfig,
    extract_layer_index,
)
from dynamickv.integrations.vllm.metrics import KeptMetrics, KeptStats
from dynamickv.integrations.vllm.options import conversations_of, method_of
from dynamickv.integrations.vllm.plugin import require_announced
from dynamickv.integrations.vllm.ranks import Ranks
from dynamickv.integrations.vllm.scheduling import Scheduling
from dynamickv.integrations.vllm.steps import Kept, Step
from dynamickv.integrations.vllm.worker import Worker


class DynamicKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One half or the other, by `role`."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.method = method_of(vllm_config)
        groups, sliding = _groups(kv_cache_config)
        caches = kv_cache_config.kv_cache_groups
        block_size = caches[groups[0]].kv_cache_spec.block_size
        self._compressed_now: dict[str, list[int]] = {}
        self._stats = KeptStats()
        if role == KVConnectorRole.WORKER:
            names = [caches[group].layer_names[0] for group in groups]
            self._numbers = {name: number for number, name in enumerate(names)}
            context = vllm_config.compilation_config.static_forward_context
            parallel = vllm_config.parallel_config.tensor_parallel_size > 1
            self.worker = Worker(
                self.method,
                [context[name] for name in names],
                block_size,
                {name: context[name] for name in sliding},
                Ranks.of_group() if parallel else Ranks(),
            )
            return
        if sliding and vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                "DynamicKV's plugin does not work with prefix caching in a model with sliding "
                "windows; use --no-enable-prefix-caching"
            )
        # The manager finds it here: vLLM gives it no other configuration.
        for group in groups:
            caches[group].kv_cache_spec = replace(
                caches[group].kv_cache_spec, tail=self.method.tail
            )
        conversations = conversations_of(vllm_config) and not sliding
        self.scheduling = Scheduling(self.method, groups, sliding, block_size, conversations)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed to anyone."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Block tables change shape from layer to layer, which a full CUDA graph cannot follow."""
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """What was kept, as it came to the process that logs it."""
        return KeptStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> KVConnectorPromMetrics:
        """What was kept, for Prometheus."""
        return KeptMetrics(*arguments)

    # In the workers.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """The caches exist."""
        self.worker.bind_caches()

    def handle_preemptions(self, kv_connector_metadata: Step) -> None:
        """A step begins."""
        self.worker.begin(kv_connector_metadata)

    def shortened(
        self, layer_name: str, common: CommonAttentionMetadata
    ) -> CommonAttentionMetadata:
        """A batch as one layer sees it."""
        number = self._numbers.get(layer_name)
        if number is not None:
            return self.worker.shortened(number, common)
        self.worker.beside(layer_name, common)
        return common

    def see(self, layer_name: str, queries: Tensor) -> None:
        """A layer's queries of this step."""
        number = self._numbers.get(layer_name)
        if number is not None:
            self.worker.see(number, queries)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Restoring was done when the step began."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Restoring was done when the step began."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Layers are compressed together, after the last."""

    def wait_for_save(self) -> None:
        """The model has run."""
        self._compressed_now = self.worker.finish()

    def build_connector_worker_meta(self) -> Kept | None:
        """Tell the scheduler what is kept."""
        told, self._compressed_now = self._compressed_now, {}
        return Kept(told) if told else None

    # In the scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """The managers exist."""
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = kv_cache_manager.coordinator.single_type_managers
        self.scheduling.managers = [managers[group] for group in self.scheduling.groups]
        self.scheduling.require_room(
            kv_cache_manager.block_pool.num_gpu_blocks - 1, kv_cache_manager.max_model_len
        )

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How far a request goes on from a compressed prompt."""
        return self.scheduling.matched(request, num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """A request has its blocks."""
        self.scheduling.allocated(request.request_id, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Step:
        """What changed since the step before."""
        return self.scheduling.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Give back the blocks that compressed prompts no longer need."""
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, Kept):
            self.scheduling.compressed(told)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its response tells how much of the prompt each layer kept."""
        told = self.scheduling.finished(request)
        # Aborted before its prompt was read to the end: neither compressed nor kept whole.
        if request.num_output_tokens:
            self._stats.record(told)
        return False, {"dynamickv": told}

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was kept of the requests that finished since the last call."""
        stats, self._stats = self._stats, KeptStats()
        return None if stats.is_empty() else stats

    def reset_cache(self) -> bool:
        """Forget all conversations."""
        self.scheduling.chains.clear()
        return True


# vLLM comes here by kv_connector_module_path, be the plugin loaded or not: without it nothing would
# be compressed.
require_announced()
DynamicKV = DynamicKVConnector
"""By the name in --kv-transfer-config."""


def _groups(config: KVCacheConfig) -> tuple[list[int], dict[str, int]]:
    """Numbers of the cache groups of compressed layers, in the order of the layers, and of sliding
    layers by their names.

    Raises:
        ValueError: a model with layers of another kind, or without one to compress.
    """
    groups: list[int] = []
    sliding: dict[str, int] = {}
    for number, group in enumerate(config.kv_cache_groups):
        kind = type(group.kv_cache_spec)
        if kind is CompressedSpec:
            groups.append(number)
        elif kind is SlidingWindowSpec:
            sliding |= dict.fromkeys(group.layer_names, number)
        else:
            raise ValueError(
                f"layer {group.layer_names[0]} has {kind.__name__}, and DynamicKV's plugin works "
                "with full attention and sliding windows only; serve another model or take "
                "dynamickv out of VLLM_PLUGINS"
            )
    if not groups:
        raise ValueError(
            "every layer of this model has a sliding window, and DynamicKV's plugin compresses "
            "layers with full attention; serve another model or take dynamickv out of VLLM_PLUGINS"
        )
    names = [config.kv_cache_groups[group].layer_names[0] for group in groups]
    if names != sorted(names, key=extract_layer_index):
        raise ValueError(f"cache groups are not in the order of the layers: {', '.join(names)}")
    return groups, sliding
