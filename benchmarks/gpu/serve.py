"""Memory of serve mode against the full cache's."""

from __future__ import annotations

import torch
from transformers import DynamicCache

import dynamickv as dkv
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import ids_of, kv_bytes, prompt
from benchmarks.gpu.timing import peak_of


@torch.inference_mode()
def serve_memory(bench: Bench, llm: dkv.LoadedModel) -> None:
    """Keys and values held at once in serve mode over the full cache's."""
    ids = ids_of(llm, prompt(llm, bench.longest))
    full = kv_bytes(llm, bench.longest)
    held = 0

    def serve() -> None:
        nonlocal held
        with dkv.compress(llm.model, bench.method) as cache:
            llm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            held = cache.peak_bytes

    if bench.device.type != "cuda":
        serve()
        bench.add("serve mode: peak KV bytes / full cache", held / full, target="<= 0.05")
        return
    served = peak_of(serve)
    bench.add(
        f"serve mode, {bench.longest} tokens: peak KV bytes / full cache",
        held / full,
        target="<= 0.05",
        note=f"{held / 2**30:.2f} of {full / 2**30:.2f} GiB",
    )
    bare = peak_of(lambda: llm.model(ids, use_cache=False, logits_to_keep=1))
    whole = peak_of(
        lambda: llm.model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
    )
    for label, peak in (("no cache", bare), ("serve mode", served), ("DynamicCache", whole)):
        bench.add(f"peak of all memory, {bench.longest} tokens, {label}", peak / 2**30, "GiB")
    bench.add(
        f"serve mode, {bench.longest} tokens: (its peak - peak without a cache) / full cache",
        (served - bare) / full,
    )
