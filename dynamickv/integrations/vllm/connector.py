"""The scheduler's and the workers' halves of the plugin, as a vLLM KV connector.

Nothing leaves the machine: a connector is vLLM's official place to hear of requests in the
scheduler and of steps in the workers, to give blocks back, to restore a preempted request and to
add to a response.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.model_executor.models.utils import extract_layer_index

from dynamickv.integrations.vllm.blocks import BlockPlan
from dynamickv.integrations.vllm.cache_layout import CompressedManager, CompressedSpec, Gap
from dynamickv.integrations.vllm.options import method_of
from dynamickv.integrations.vllm.steps import Kept, Restored, Started, Step
from dynamickv.integrations.vllm.worker import Worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class DynamicKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One half or the other, by `role`."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.method = method_of(vllm_config)
        names = _layer_names(kv_cache_config)
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._prompts: dict[str, int] = {}
        self._kept: dict[str, list[int]] = {}
        self._restoring: set[str] = set()
        self._compressed_now: dict[str, list[int]] = {}
        if role == KVConnectorRole.WORKER:
            context = vllm_config.compilation_config.static_forward_context
            self._numbers = {name: number for number, name in enumerate(names)}
            self.worker = Worker(self.method, [context[name] for name in names], self._block_size)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed to anyone."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Block tables change shape from layer to layer, which a full CUDA graph cannot follow."""
        return True

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
        return self.worker.shortened(self._numbers[layer_name], common)

    def see(self, layer_name: str, queries: Tensor) -> None:
        """A layer's queries of this step."""
        self.worker.see(self._numbers[layer_name], queries)

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

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """A preempted request that was compressed is restored, all but the token to be run next."""
        if request.request_id in self._kept and request.num_tokens > request.num_prompt_tokens:
            return request.num_tokens - 1, False
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Blocks are there to restore a request into."""
        if num_external_tokens > 0:
            self._restoring.add(request.request_id)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Step:
        """What changed since the step before."""
        started, restored = [], []
        for new in scheduler_output.scheduled_new_reqs:
            if new.prompt_token_ids is not None:
                self._prompts[new.req_id] = len(new.prompt_token_ids)
                started.append((new.req_id, new.block_ids))
        again = scheduler_output.scheduled_cached_reqs
        for name, blocks in zip(again.req_ids, again.new_block_ids, strict=True):
            if name in self._restoring:
                restored.append(Restored(name, blocks))
            elif name in again.resumed_req_ids and name in self._prompts:
                started.append((name, blocks))
        self._restoring.clear()
        return Step(
            preempted=frozenset(scheduler_output.preempted_req_ids or ()),
            finished=frozenset(scheduler_output.finished_req_ids),
            started=tuple(
                Started(name, self._prompts[name], blocks[0][0]) for name, blocks in started
            ),
            restored=tuple(restored),
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Give back the blocks that compressed prompts no longer need."""
        told = connector_output.kv_connector_worker_meta
        if not isinstance(told, Kept):
            return
        for name, kept in told.blocks.items():
            if name not in self._prompts:
                continue
            self._kept[name] = kept
            plan = BlockPlan.of(self.method, self._prompts[name], self._block_size)
            for manager, blocks in zip(self._managers(), kept, strict=True):
                manager.release(name, Gap(blocks, plan.tail_block))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its response tells how much of the prompt each layer kept."""
        name = request.request_id
        length = self._prompts.pop(name, None)
        kept = self._kept.pop(name, None)
        for manager in self._managers():
            manager.forget(name)
        if length is None:
            return False, None
        plan = BlockPlan.of(self.method, length, self._block_size)
        tail = length - plan.tail_start
        return False, {
            "dynamickv": {
                "method": self.method.name,
                "prompt_tokens": length,
                "kept_tokens": [tail + blocks * self._block_size for blocks in kept]
                if kept
                else [length] * len(block_ids),
            }
        }

    def _managers(self) -> list[CompressedManager]:
        managers: list[CompressedManager] = list(
            self._kv_cache_manager.coordinator.single_type_managers
        )
        return managers


def _layer_names(config: KVCacheConfig) -> list[str]:
    """Layers in the order of their cache groups, which is that of the model.

    Raises:
        ValueError: a model with other than plain full attention in every layer.
    """
    for group in config.kv_cache_groups:
        if not isinstance(group.kv_cache_spec, CompressedSpec):
            raise ValueError(
                f"layer {group.layer_names[0]} has {type(group.kv_cache_spec).__name__}, and "
                "DynamicKV's plugin compresses models with full attention in every layer only; "
                "serve another model or take dynamickv out of VLLM_PLUGINS"
            )
    names = [group.layer_names[0] for group in config.kv_cache_groups]
    if names != sorted(names, key=extract_layer_index):
        raise ValueError(f"cache groups are not in the order of the layers: {', '.join(names)}")
    return names
