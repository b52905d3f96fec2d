"""What was kept per request, for vLLM's log and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from dynamickv.integrations.vllm.compat import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    create_metric_per_engine,
)

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Upper ends of the histogram's buckets."""
COUNTERS = {
    "prompt_tokens": "Prompt tokens of finished requests.",
    "kept_tokens": "Prompt tokens kept of finished requests, mean over layers.",
    "compressed_requests": "Finished requests whose prompt was compressed.",
    "whole_requests": "Finished requests whose prompt was kept whole.",
    "continued_requests": "Finished requests that went on from a compressed prompt.",
}
"""What is counted, and what it says in Prometheus, where its name is `vllm:dynamickv_NAME`."""


class KeptStats(KVConnectorStats):  # type: ignore[misc]
    """Finished requests since vLLM last asked: for each, prompt tokens, kept tokens (the mean over
    layers) and whether it went on from a compressed prompt."""

    def reset(self) -> None:
        """Forget what was recorded."""
        self.data: dict[str, list[tuple[int, float, bool]]] = {"requests": []}

    def record(self, told: dict[str, Any]) -> None:
        """A request is finished; what its response tells."""
        kept = sum(told["kept_tokens"]) / len(told["kept_tokens"])
        self.data.setdefault("requests", []).append(
            (told["prompt_tokens"], kept, "continued_tokens" in told)
        )

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Join the records of two intervals."""
        self.data.setdefault("requests", []).extend(other.data.get("requests", []))
        return self

    def reduce(self) -> dict[str, int | float]:
        """As in Prometheus, without the prefix."""
        return counted(self.data)

    def is_empty(self) -> bool:
        """Whether no request was finished."""
        return not self.data.get("requests")


def counted(data: dict[str, Any]) -> dict[str, int | float]:
    """The counters' increments of some finished requests."""
    requests = data.get("requests", [])
    compressed = sum(kept < prompt for prompt, kept, _ in requests)
    return {
        "prompt_tokens": sum(prompt for prompt, _, _ in requests),
        "kept_tokens": sum(kept for _, kept, _ in requests),
        "compressed_requests": compressed,
        "whole_requests": len(requests) - compressed,
        "continued_requests": sum(continued for _, _, continued in requests),
    }


class KeptMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The counters, and a histogram of the share kept."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters = {
            name: self._per_engine(self._counter_cls, name, text) for name, text in COUNTERS.items()
        }
        self._shares = self._per_engine(
            self._histogram_cls,
            "kept_share",
            "Share of a finished request's prompt tokens that was kept, mean over layers.",
            buckets=SHARES,
        )

    def _per_engine(self, kind: Any, name: str, text: str, **named: Any) -> Any:
        metric = kind(
            name=f"vllm:dynamickv_{name}", documentation=text, labelnames=self._labelnames, **named
        )
        return create_metric_per_engine(metric, self.per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Requests are finished."""
        for name, value in counted(transfer_stats_data).items():
            self._counters[name][engine_idx].inc(value)
        for prompt, kept, _ in transfer_stats_data.get("requests", []):
            self._shares[engine_idx].observe(kept / prompt)
