"""Every attention backend that is here: what is kept with it, and what it computes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, utils

import dynamickv as dkv
from benchmarks.gpu.agreement import overlap, relative
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import ids_of, prompt
from benchmarks.gpu.timing import free, timed
from benchmarks.prompts import prompt_of
from benchmarks.report import ratios
from dynamickv.reading.prefill import prefill_prompt


def flash_versions() -> list[int]:
    """FlashAttention's packages that transformers finds here."""
    return [
        version
        for version in (2, 3, 4)
        if getattr(utils, f"is_flash_attn_{version}_available", lambda: False)()
    ]


def kernels(bench: Bench) -> dict[str, SDPBackend | None]:
    """The backends that read long prompts here, sdpa's own choice first, and which of sdpa's
    kernels each forces."""
    found: dict[str, SDPBackend | None] = {"sdpa": None}
    if bench.device.type == "cuda":
        found["sdpa (cuDNN)"] = SDPBackend.CUDNN_ATTENTION
        found["sdpa (flash)"] = SDPBackend.FLASH_ATTENTION
        found |= {f"flash_attention_{version}": None for version in flash_versions()}
    return found


@contextlib.contextmanager
def using(llm: dkv.LoadedModel, name: str, kernel: SDPBackend | None) -> Iterator[None]:
    """The model with this backend."""
    llm.model.set_attn_implementation(name.split(" ")[0])
    try:
        with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
            yield
    finally:
        llm.model.set_attn_implementation("sdpa")


@torch.inference_mode()
def fastest(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    """A long prompt's prefill with every backend, against sdpa's own choice and against what the
    matrix products alone would take."""
    ids = ids_of(llm, prompt(llm, bench.long))
    size, rounds = (512, 2) if bench.dry else (8192, 5)
    left, right = torch.randn(2, size, size, device=bench.device, dtype=bench.dtype)
    rate = 2 * size**3 / statistics.median(timed(lambda: left @ right, 20))
    bench.add("matrix products, 8192 x 8192 x 8192", rate / 1e12, "TFLOP/s")
    config = llm.model.config
    heads = config.num_attention_heads * llm.geometry.head_dim
    weights = sum(w.numel() for n, w in llm.model.named_parameters() if "layers" in n)
    needed = 2 * weights * bench.long + 2 * bench.long**2 * heads * config.num_hidden_layers
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for backend, kernel in kernels(bench).items():
            try:
                with using(llm, backend, kernel):
                    took = timed(
                        lambda: llm.model(ids, past_key_values=DynamicCache(), logits_to_keep=1), 1
                    )
            except Exception as error:
                print(f"{backend}: {type(error).__name__}: {str(error)[:300]}")
                continue
            found.setdefault(backend, []).extend(took)
    at = f"{name}: prefill of {bench.long} tokens"
    for backend, seconds in found.items():
        bench.add(f"{at}, {backend}", seconds, "s")
        if backend != "sdpa":
            bench.add(f"{at}, {backend} / sdpa", ratios(seconds, found["sdpa"]), "x", "<= 0.9")
    least = statistics.median(found["sdpa"])
    bench.add(f"{at}, sdpa: share of the matrix products' rate", needed / least / rate)


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
    yardstick = None
    for name, kernel in {**kernels(bench), "eager": None}.items():
        try:
            with using(llm, name, kernel):
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
