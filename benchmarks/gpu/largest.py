"""The longest prompt that fits, with the full cache and in serve mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import dynamickv as dkv
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import attention_set_to
from benchmarks.gpu.timing import free, peak_of
from dynamickv.cache import KVCache
from dynamickv.reading.observe import observed


@contextlib.contextmanager
def attention_left_out(llm: dkv.LoadedModel) -> Iterator[None]:
    """Attention that allocates what flash attention does (its output, and one float per head and
    position) and computes nothing, so that memory can be probed at any length in seconds."""

    def probe(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        output = torch.empty_like(query).copy_(query).transpose(1, 2).contiguous()
        del sums
        return output, None

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", AttentionMaskInterface()["sdpa"])
    with attention_set_to(llm, "probe"):
        yield


@torch.inference_mode()
def largest(bench: Bench, llm: dkv.LoadedModel) -> None:
    """The longest prompt that fits, with the full cache and in serve mode."""
    if bench.device.type != "cuda":
        return

    def full(ids: Tensor) -> None:
        with observed(llm.model):
            cache = KVCache(llm.geometry.num_layers)
            llm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def serve(ids: Tensor) -> None:
        with dkv.compress(llm.model, bench.method) as cache:
            llm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def peak(mode: Callable[[Tensor], None], length: int) -> int:
        ids = torch.randint(0, 1000, (1, length), device=llm.device)
        return peak_of(lambda: mode(ids))

    def fits(mode: Callable[[Tensor], None], length: int) -> bool:
        try:
            peak(mode, length)
        except torch.OutOfMemoryError:
            free()
            return False
        return True

    small, large = (1024, 4096) if bench.dry else (65536, 131072)
    real = peak(serve, large)
    total = torch.cuda.mem_get_info()[1] - 2**30
    with attention_left_out(llm):
        bench.add(
            f"memory probe / real serve mode, peak at {large} tokens", peak(serve, large) / real
        )
        if bench.dry:
            return
        for label, mode in (("FullKV", full), ("serve mode, DynamicKV(512)", serve)):
            low, high = peak(mode, small), peak(mode, large)
            slope = (high - low) / (large - small)
            guess = int(small + (total - low) / slope) // 1024
            known, refused = 0, 0
            for _ in range(5):
                if fits(mode, guess * 1024):
                    known = max(known, guess)
                    guess = guess * 102 // 100 if not refused else (known + refused) // 2
                else:
                    refused = min(refused, guess) if refused else guess
                    guess = (known + refused) // 2 if known else guess * 97 // 100
                if refused and refused - known <= known // 100:
                    break
            bench.add(
                f"largest prompt that fits, {label}",
                known * 1024,
                "tokens",
                note=f"{slope / 1024:.0f} KiB per token; attention left out in the probe; "
                f"first length refused {refused * 1024}",
            )
