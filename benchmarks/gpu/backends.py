"""Every attention backend that is here: what is kept with it, and what it computes."""

from __future__ import annotations

import contextlib
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import utils

import dynamickv as dkv
from benchmarks.gpu.agreement import overlap, relative
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import prompt
from benchmarks.gpu.timing import free, timed
from benchmarks.prompts import prompt_of
from dynamickv.reading.prefill import prefill_prompt


def flash_versions() -> list[int]:
    """FlashAttention's packages that transformers finds here."""
    return [
        version
        for version in (2, 3, 4)
        if getattr(utils, f"is_flash_attn_{version}_available", lambda: False)()
    ]


@torch.inference_mode()
def backends(bench: Bench) -> None:
    """Every backend that is here: kept sets against sdpa's, outputs against float32's. On SmolLM2
    where its file is given: random weights attend almost evenly, so that chance decides."""
    if bench.gguf is not None:
        wide = dkv.load_model(bench.gguf, device=str(bench.device), dtype="float32")
        narrow = str(bench.dtype).removeprefix("torch.")
        llm = dkv.load_model(bench.gguf, device=str(bench.device), dtype=narrow)
        encoded = prompt_of(wide, 300 if bench.dry else 4000)
    else:
        sizes = {"num_hidden_layers": 4 if bench.dry else 6, "initializer_range": 0.04}
        llm = bench.build("Llama-3-8B", **sizes)
        wide = bench.build("Llama-3-8B", torch.float32, **sizes)
        wide.model.load_state_dict({k: w.float() for k, w in llm.model.state_dict().items()})
        encoded = prompt(llm, 128 if bench.dry else 4096)
    length = encoded.length
    method = dkv.DynamicKV(capacity=32 if bench.dry else 128)
    exact = prefill_prompt(wide, encoded)
    best = method.select(exact.layers)
    del wide
    free()
    found: dict[str, SDPBackend | None] = {"sdpa": None, "eager": None}
    if bench.device.type == "cuda":
        found["sdpa (cuDNN)"] = SDPBackend.CUDNN_ATTENTION
        found["sdpa (flash)"] = SDPBackend.FLASH_ATTENTION
        found |= {f"flash_attention_{version}": None for version in flash_versions()}
    yardstick = None
    for name, kernel in found.items():
        llm.model.set_attn_implementation(name.split(" ")[0])
        context = sdpa_kernel(kernel) if kernel else contextlib.nullcontext()
        try:
            with context:
                prefill = prefill_prompt(llm, encoded)
                seconds = statistics.median(timed(lambda: prefill_prompt(llm, encoded), 5))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        retention = method.select(prefill.layers)
        yardstick = yardstick or retention
        bench.add(
            f"backend {name}: kept sets' overlap with sdpa's",
            overlap(retention, yardstick),
            note=f"with float32's {overlap(retention, best):.4f}; prefill of {length} tokens "
            f"{seconds * 1e3:.1f} ms",
        )
        bench.add(
            f"backend {name}: last logits, relative error to float32",
            relative(prefill.logits, exact.logits),
        )
