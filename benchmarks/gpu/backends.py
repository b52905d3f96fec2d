"""Every attention backend that is here: what is kept with it, and what it computes."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel, utils
from transformers.models.llama import modeling_llama

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


@dataclass(frozen=True)
class Backend:
    """What a prompt is read with."""

    name: str
    attention: str = "sdpa"
    kernel: SDPBackend | None = None
    """Of sdpa's the one that is forced."""
    fused: bool = False
    """With Liger's kernels, which do what lies between the products in one pass each."""


def available(bench: Bench) -> list[Backend]:
    """The backends that read long prompts here, sdpa's own choice first."""
    found = [Backend("sdpa")]
    if bench.device.type != "cuda":
        return found
    own = [f"flash_attention_{version}" for version in flash_versions()]
    found += [
        Backend("sdpa (cuDNN)", kernel=SDPBackend.CUDNN_ATTENTION),
        Backend("sdpa (flash)", kernel=SDPBackend.FLASH_ATTENTION),
        *(Backend(name, name) for name in own),
    ]
    if find_spec("liger_kernel") is not None:
        found += [Backend(f"{name}, Liger's kernels", name, fused=True) for name in ("sdpa", *own)]
    return found


@contextlib.contextmanager
def fused(llm: dkv.LoadedModel) -> Iterator[dkv.LoadedModel]:
    """A Llama with the same weights and Liger's kernels, which replace its rotation for the whole
    process: they are taken back."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    shared = {id(one): one for one in (*llm.model.parameters(), *llm.model.buffers())}
    model = copy.deepcopy(llm.model, shared)
    names = "apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"
    before = {name: getattr(modeling_llama, name) for name in names}
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
    try:
        yield replace(llm, model=model)
    finally:
        for name, one in before.items():
            setattr(modeling_llama, name, one)


@contextlib.contextmanager
def using(llm: dkv.LoadedModel, backend: Backend) -> Iterator[dkv.LoadedModel]:
    """The model with this backend."""
    with (
        fused(llm) if backend.fused else contextlib.nullcontext(llm) as chosen,
        sdpa_kernel(backend.kernel) if backend.kernel else contextlib.nullcontext(),
    ):
        chosen.model.set_attn_implementation(backend.attention)
        try:
            yield chosen
        finally:
            chosen.model.set_attn_implementation("sdpa")


def read(model: PreTrainedModel, ids: Tensor) -> None:
    """The plain model's prefill."""
    model(ids, past_key_values=DynamicCache(), logits_to_keep=1)


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
        for backend in available(bench):
            try:
                with using(llm, backend) as chosen:
                    took = timed(partial(read, chosen.model, ids), 1)
            except Exception as error:
                print(f"{backend.name}: {type(error).__name__}: {str(error)[:300]}")
                continue
            found.setdefault(backend.name, []).extend(took)
    at = f"{name}: prefill of {bench.long} tokens"
    for own, seconds in found.items():
        bench.add(f"{at}, {own}", seconds, "s")
        if own != "sdpa":
            bench.add(f"{at}, {own} / sdpa", ratios(seconds, found["sdpa"]), "x", "<= 0.9")
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
    for backend in (*available(bench), Backend("eager", "eager")):
        try:
            with using(llm, backend) as chosen:
                prefill = prefill_prompt(chosen, encoded)
                seconds = statistics.median(timed(partial(prefill_prompt, chosen, encoded), 5))
        except Exception as error:
            print(f"{backend.name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        retention = method.select(prefill.layers)
        yardstick = yardstick or retention
        bench.add(
            f"backend {backend.name}: kept sets' overlap with sdpa's",
            overlap(retention, yardstick),
            note=f"with float32's {overlap(retention, best):.4f}; prefill of {length} tokens "
            f"{seconds * 1e3:.1f} ms",
        )
        bench.add(
            f"backend {backend.name}: last logits, relative error to float32",
            relative(prefill.logits, exact.logits),
        )
