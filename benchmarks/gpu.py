"""python -m benchmarks.gpu [--dry-run] [--sections a,b] [--out DIR] [--gguf FILE]

The engine at 7-8B scale and up to 128K tokens on one GPU: correctness first, then time and memory.
The large models have their published geometry and random weights, because speed and memory do not
depend on the weights; `max_position_embeddings` is raised where 128K needs it. Needs torch,
transformers and dynamickv, no network. Writes gpu.json and gpu.md after every section, so that a
run that is cut short keeps what it measured. --dry-run: tiny sizes, any device.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

import dynamickv as dkv
from benchmarks.report import RESULTS, Row
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.cuda_graph import DecodeGraph, fastest_ops, graphable
from dynamickv.decoding.decode import choose, extend
from dynamickv.decoding.decode_step import PlainOps, Slots
from dynamickv.reading.observe import observed
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt

LONGEST = 131072
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
GEOMETRIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "Llama-3-8B": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
        },
    ),
    "Mistral-7B-v0.2": (
        MistralConfig,
        MistralForCausalLM,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
    ),
    "Qwen2-7B": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
        },
    ),
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@dataclass
class Bench:
    """Sizes, the device, and what was measured so far."""

    dry: bool
    out: Path
    gguf: Path | None
    limit: float
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    built: tuple[str, dkv.LoadedModel] | None = None
    """The large model that is on the device: at most one fits."""

    def model(self, name: str) -> dkv.LoadedModel:
        """A model of that geometry, built unless it is the one that is there."""
        if self.built is None or self.built[0] != name:
            self.built = None
            free()
            self.built = name, build(self, name)
        return self.built[1]

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def long(self) -> int:
        return 256 if self.dry else 32768

    @property
    def longest(self) -> int:
        return 512 if self.dry else LONGEST

    @property
    def method(self) -> dkv.DynamicKV:
        return dkv.DynamicKV(capacity=32 if self.dry else 512)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def add(
        self, measure: str, value: float, unit: str = "", target: str = "", note: str = ""
    ) -> None:
        self.rows = [row for row in self.rows if row.measure != measure]
        self.rows.append(Row(measure, value, unit, target, note))
        shown = f" (target {target})" if target else ""
        print(
            f"[{self.seconds:5.0f} s] {measure:<66} {value:10.4f} {unit}{shown} {note}", flush=True
        )
        self.save()

    def save(self) -> None:
        where = machine()
        record = {"machine": where, "facts": self.facts, "rows": [asdict(row) for row in self.rows]}
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        (self.out / "gpu.md").write_text(table(record), "utf-8")


def table(record: dict[str, Any]) -> str:
    """gpu.json as a page: the machine, the figures, and `facts.remarks`."""
    lines = [
        "# Measured on a GPU",
        "",
        ", ".join(f"{name} {value}" for name, value in record["machine"].items()),
        "",
        "| measure | value | unit | target | note |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        value = row["value"]
        shown = f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"
        cells = [row["measure"], shown, row["unit"], row["target"], row["note"]]
        lines.append("| " + " | ".join(cells) + " |")
    remarks = record["facts"].get("remarks", [])
    lines += ["", *(f"- {remark}" for remark in remarks)] if remarks else []
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """Where and when."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "none (dry run)",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "dynamickv": dkv.__version__,
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Mark:
    """A moment on the device's own clock."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event is not None:
            self.event.record()
        self.host = time.perf_counter()

    def since(self, earlier: Mark) -> float:
        """Seconds from an earlier mark."""
        if self.event is None or earlier.event is None:
            return self.host - earlier.host
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def timed(action: Callable[[], object], runs: int, warm: int = 1) -> list[float]:
    """Seconds of each run, by device events."""
    for _ in range(warm):
        action()
    seconds = []
    for _ in range(runs):
        synchronize()
        start = Mark()
        action()
        seconds.append(Mark().since(start))
    return seconds


def build(
    bench: Bench, name: str, dtype: torch.dtype | None = None, **changes: Any
) -> dkv.LoadedModel:
    """A model of that geometry with random weights, made on the device."""
    config_class, model_class, sizes = GEOMETRIES[name]
    if bench.dry:
        sizes = {**sizes, **TINY}
    config = config_class(
        **{
            **sizes,
            "max_position_embeddings": 2 * LONGEST,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or bench.dtype)
    try:
        with torch.device(bench.device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return dkv.LoadedModel.wrap(model, None, name, "random weights")  # type: ignore[arg-type]


def prompt(llm: dkv.LoadedModel, length: int, seed: int = 1) -> EncodedPrompt:
    """Random tokens; no text belongs to them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, llm.model.config.vocab_size, (length,), generator=generator).tolist()
    return EncodedPrompt(
        token_ids=ids,
        text="",
        offsets=[(0, 0)] * length,
        document_span=(0, length),
        document_characters=(0, 0),
        question_span=(length - 8, length),
        question="",
        original_length=length,
    )


def ids_of(llm: dkv.LoadedModel, encoded: EncodedPrompt) -> Tensor:
    return torch.tensor([encoded.token_ids], device=llm.device)


def kv_bytes(llm: dkv.LoadedModel, length: int) -> int:
    """Bytes of a full cache."""
    g = llm.geometry
    return 2 * g.num_layers * g.num_kv_heads * g.head_dim * length * llm.model.dtype.itemsize


def relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.float().cpu()
    return float((actual.float().cpu() - expected).norm() / expected.norm())


def overlap(one: dkv.Retention, other: dkv.Retention) -> float:
    """Positions both keep, over the positions of the larger, across layers and heads."""
    both = total = 0
    for a, b in zip(one.indices, other.indices, strict=True):
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            both += len(set(x) & set(y))
            total += max(len(x), len(y))
    return both / total


# Sections


def bandwidth(bench: Bench) -> None:
    """What the device moves at best: a large copy, bytes read plus bytes written."""
    size = 2**20 if bench.dry else 2**32
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = statistics.median(timed(lambda: target.copy_(source), 20, 3))
    bench.facts["bandwidth"] = 2 * size / seconds
    bench.add("device copy bandwidth", 2 * size / seconds / 1e12, "TB/s")


@torch.inference_mode()
def correctness(bench: Bench) -> None:
    """Pruned decoding on the device against float32 on the CPU, and the graph against the plain
    path."""
    small = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
    }
    if bench.dry:
        small = {"num_hidden_layers": 3}
    tokens = list(range(5, 5 + (4 if bench.dry else 64)))
    for dtype in (torch.float32, torch.bfloat16):
        number = str(dtype).removeprefix("torch.")
        for name in GEOMETRIES:
            llm = build(bench, name, dtype, **small, initializer_range=0.06)
            # Small heads leave no room for chance: wide weights make attention sharp.
            encoded = prompt(llm, 200 if bench.dry else 1000)
            prefill = prefill_prompt(llm, encoded)
            retention = dkv.DynamicKV(capacity=64).select(prefill.layers)
            whole = llm.model(
                ids_of(llm, encoded), past_key_values=DynamicCache(), logits_to_keep=1
            ).logits[0, -1]
            bench.add(
                f"{name}, small, {number}: observed prefill's logits equal the plain model's",
                float(torch.equal(whole, prefill.logits)),
                note="1: bit for bit",
            )
            plain_cache = prune(prefill, retention, len(tokens))
            graph_cache = prune(prefill, retention, len(tokens))
            plain = [
                extend(llm, plain_cache, [token], encoded.length + step)
                for step, token in enumerate(tokens)
            ]
            reference = on_cpu(llm, prefill, retention, tokens)
            bench.add(
                f"{name}, small, {number}: plain decode logits, relative error to CPU float32",
                relative(torch.stack(plain), reference),
            )
            if graphable(llm):
                graph = DecodeGraph(llm, graph_cache, encoded.length, len(tokens))
                stepped = []
                for token in tokens:
                    graph.advance(token)
                    stepped.append(graph.logits.clone())
                bench.add(
                    f"{name}, small, {number}: graph decode logits, relative error to CPU float32",
                    relative(torch.stack(stepped), reference),
                    note=f"{type(fastest_ops(llm.device)).__name__}; "
                    "same next token as the plain path at "
                    f"{same_tokens(stepped, plain)} of {len(tokens)} steps, else within "
                    f"{largest_gap(stepped, plain):.3f} in logits that reach "
                    f"{float(torch.stack(plain).abs().max()):.1f}",
                )
            attention_error(bench, f"{name}, {number}", llm, prefill, retention)
            del llm, prefill
    free()


def largest_gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Where the likeliest tokens differ: how far apart the other's logits see them, at most."""
    return max(
        float(b.float().max() - b[int(a.argmax())].float()) for a, b in zip(one, other, strict=True)
    )


def same_tokens(one: Sequence[Tensor], other: Sequence[Tensor]) -> int:
    return sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(one, other, strict=True))


def on_cpu(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, tokens: list[int]
) -> Tensor:
    """Logits of the same weights and the same pruned cache in float32 on the CPU."""
    twin = type(llm.model)(llm.model.config).float()
    twin.load_state_dict({name: w.float().cpu() for name, w in llm.model.state_dict().items()})
    reference = dkv.LoadedModel.wrap(twin, None, "cpu", "float32")  # type: ignore[arg-type]
    cache = KVCache(len(prefill.layers))
    pruned = prune(prefill, retention, 0)
    for layer, held in zip(cache.whole_layers(), pruned.whole_layers(), strict=True):
        keys, values = (states.float().cpu() for states in held.held())
        layer.hold(keys, values, prefill.length, room=len(tokens))
    return torch.stack(
        [
            extend(reference, cache, [token], prefill.length + step)
            for step, token in enumerate(tokens)
        ]
    )


def attention_error(
    bench: Bench,
    label: str,
    llm: dkv.LoadedModel,
    prefill: dkv.Prefill,
    retention: dkv.Retention,
) -> None:
    """One attention over pruned keys and values against float32 softmax on the CPU."""
    layer, kept = prefill.layers[-1], retention.indices[-1]
    at = kept.unsqueeze(-1).expand(-1, -1, layer.keys.shape[-1])
    keys, values = layer.keys.gather(1, at), prefill.values[-1].gather(1, at)
    query = layer.queries[:, -1]
    group = query.shape[0] // keys.shape[0]
    wide = [states.float().cpu().repeat_interleave(group, dim=0) for states in (keys, values)]
    weights = (wide[0] @ query.float().cpu().unsqueeze(-1) * layer.scaling).softmax(dim=1)
    expected = (weights * wide[1]).sum(dim=1)
    slot = torch.tensor([kept.shape[1] - 1], device=llm.device)
    for ops in {type(ops): ops for ops in (PlainOps(), fastest_ops(llm.device))}.values():
        slots = Slots(keys.contiguous(), values.contiguous(), slot)
        output = ops.attend(query.contiguous(), slots, layer.scaling)
        bench.add(
            f"{label}: pruned attention, {type(ops).__name__}, relative error to CPU float32",
            relative(output.view_as(expected), expected),
        )


SIX: list[Callable[[int], dkv.CompressionMethod]] = [
    lambda capacity: dkv.FullKV(),
    lambda capacity: dkv.StreamingLLM(capacity=capacity),
    lambda capacity: dkv.H2O(capacity=capacity),
    lambda capacity: dkv.SnapKV(capacity=capacity),
    lambda capacity: dkv.PyramidKV(capacity=capacity),
    lambda capacity: dkv.DynamicKV(capacity=capacity),
]


@torch.inference_mode()
def smollm2(bench: Bench) -> None:
    """A real model: what it keeps and says on the GPU in bfloat16 against the CPU in float32."""
    from benchmarks.prompts import prompt_of

    if bench.gguf is None:
        print("no --gguf: SmolLM2 is left out")
        return
    cpu = dkv.load_model(bench.gguf, device="cpu", dtype="float32")
    length = 300 if bench.dry else 4000
    encoded = prompt_of(cpu, length)
    reference = prefill_prompt(cpu, encoded, mass=True)
    chosen = {}
    for dtype in ("float32", "bfloat16"):
        llm = dkv.load_model(bench.gguf, device=str(bench.device), dtype=dtype)
        prefill = prefill_prompt(llm, encoded, mass=True)
        for make in SIX[1:]:
            method = make(64 if bench.dry else 128)
            expected = chosen.get(method.name) or method.select(reference.layers)
            chosen[method.name] = expected
            bench.add(
                f"SmolLM2, {encoded.length} tokens: {method.name}'s kept sets, "
                f"{bench.device.type} {dtype} and CPU float32 overlap",
                overlap(method.select(prefill.layers), expected),
            )
        if not graphable(llm):
            continue
        for method in (dkv.FullKV(), dkv.DynamicKV(capacity=128)):
            retention = method.select(prefill.layers)
            label = f"SmolLM2 {dtype}, {method.name}: same next token as the plain path fed alike"
            fed, plain = plain_answer(llm, prefill, retention, 64)
            alike(bench, f"{label}, graph", graph_answer(llm, prefill, retention, fed), plain)
            with attention_set_to(llm, "eager"):
                other = plain_answer(llm, prefill, retention, 64, fed)[1]
            alike(bench, f"{label}, plain path with eager attention", other, plain)


def plain_answer(
    llm: dkv.LoadedModel,
    prefill: dkv.Prefill,
    retention: dkv.Retention,
    count: int,
    fed: Sequence[int] = (),
) -> tuple[list[int], list[Tensor]]:
    """Tokens fed, greedy ones if none are given, and the plain path's logits after each."""
    cache = prune(prefill, retention, count)
    tokens, logits = [], []
    token = choose(prefill.logits)[0]
    for step in range(count):
        tokens.append(fed[step] if fed else token)
        logits.append(extend(llm, cache, [tokens[-1]], prefill.length + step))
        token = choose(logits[-1])[0]
    return tokens, logits


def graph_answer(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, fed: Sequence[int]
) -> list[Tensor]:
    """The captured step's logits after each token."""
    graph = DecodeGraph(llm, prune(prefill, retention, len(fed)), prefill.length, len(fed))
    logits = []
    for token in fed:
        graph.advance(token)
        logits.append(graph.logits.clone())
    return logits


def alike(bench: Bench, label: str, logits: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """How often the same token is the most likely one."""
    bench.add(
        label,
        same_tokens(logits, plain) / len(plain),
        note=f"of {len(plain)} steps; else within {largest_gap(logits, plain):.4f} in logits "
        f"that reach {float(torch.stack(list(plain)).abs().max()):.1f}; relative difference "
        f"{relative(torch.stack(list(logits)), torch.stack(list(plain))):.1e}",
    )


@contextlib.contextmanager
def attention_set_to(llm: dkv.LoadedModel, backend: str) -> Iterator[None]:
    before = llm.attention
    llm.model.set_attn_implementation(backend)
    try:
        yield
    finally:
        llm.model.set_attn_implementation(before)


@torch.inference_mode()
def overhead(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    """What observing, choosing and pruning add to a prefill."""
    encoded = prompt(llm, bench.long)
    ids = ids_of(llm, encoded)

    def plain() -> None:
        llm.model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

    def explore() -> None:
        prefill = prefill_prompt(llm, encoded)
        prune(prefill, bench.method.select(prefill.layers), 64)

    def serve() -> None:
        with dkv.compress(llm.model, bench.method) as cache:
            llm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    actions = [plain, explore, serve]
    for action in actions:
        action()
    seconds: list[list[float]] = [[], [], []]
    for turn in range(6):
        # Every order equally often: what ran before leaves the chip warmer or cooler.
        for index in list(itertools.permutations(range(3)))[turn]:
            seconds[index] += timed(actions[index], 1, 0)
    medians = [statistics.median(times) for times in seconds]
    bench.facts[f"prefill seconds {name}"] = seconds
    bench.add(f"{name}: plain prefill, {bench.long} tokens", medians[0], "s")
    bench.add(
        f"{name}: (prefill + observe + score + prune) / plain prefill",
        medians[1] / medians[0],
        target="<= 1.01",
        note="median of 6 each, in every order",
    )
    bench.add(
        f"{name}: serve mode, pruning while prefilling / plain prefill",
        medians[2] / medians[0],
        target="<= 1.01",
    )


class Beats(StoppingCriteria):
    """Marks every token of `generate`; stops nothing."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.marks.append(Mark())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def generate_seconds(llm: dkv.LoadedModel, ids: Tensor, tokens: int) -> float:
    """Median seconds per token of transformers' generate with its own cache, prompt excluded."""
    backend = llm.attention
    llm.model.set_attn_implementation(backend)
    cache = DynamicCache()
    llm.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    beats = Beats()
    llm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([beats]),
    )
    gaps = [
        later.since(earlier)
        for earlier, later in zip(beats.marks[:-1], beats.marks[1:], strict=True)
    ]
    return statistics.median(gaps[4:])


@torch.inference_mode()
def decoding(bench: Bench, name: str, llm: dkv.LoadedModel, length: int, target: str) -> None:
    """Time per token: generate, ours with and without the graph, and the bytes limit."""
    encoded = prompt(llm, length)
    label = f"{name}, {length} tokens"
    count = 16 if bench.dry else 40
    default = generate_seconds(llm, ids_of(llm, encoded), count)
    free()
    with sdpa_kernel(WITHOUT_CUDNN):
        theirs = generate_seconds(llm, ids_of(llm, encoded), count)
    free()
    bench.add(
        f"{label}: transformers' generate with DynamicCache, as it comes",
        default * 1e3,
        "ms/token",
        note="cuDNN attention builds a plan for every length that is new to the process",
    )
    bench.add(
        f"{label}: transformers' generate with DynamicCache, cuDNN attention off",
        theirs * 1e3,
        "ms/token",
    )
    prefill = prefill_prompt(llm, encoded)
    steps = 160
    ours = bench.method
    for method in (ours, dkv.FullKV()):
        retention = method.select(prefill.layers)
        fed, plain = plain_answer(llm, prefill, retention, 64)
        seconds = plain_seconds(llm, prefill, retention, fed[:20])
        bench.add(f"{label}: {method.name}, plain path", seconds * 1e3, "ms/token")
        if not graphable(llm):
            continue
        cache = prune(prefill, retention, steps)
        start = time.perf_counter()
        graph = DecodeGraph(llm, cache, length, steps)
        synchronize()
        captured = time.perf_counter() - start
        mine, device = graph_seconds(graph, fed[0])
        bench.add(
            f"{label}: {method.name}, graph",
            mine * 1e3,
            "ms/token",
            note=f"capture {captured:.2f} s",
        )
        read = bytes_read(llm) + cache.nbytes
        bound = read / bench.facts["bandwidth"]
        bench.add(
            f"{label}: generate / {method.name}",
            min(theirs, default) / mine,
            "x",
            target if method is ours else "",
            f"the faster generate; {default / mine:.1f} x as it comes",
        )
        bench.add(
            f"{label}: {method.name} / bytes limit",
            mine / bound,
            "x",
            "<= 1.3" if method is ours else "",
            f"limit {bound * 1e3:.2f} ms for {read / 1e9:.2f} GB; "
            f"{device / bound:.3f} x counting device time alone ({device * 1e3:.2f} ms)",
        )
        same = f"{label}: {method.name}, same next token as the plain path fed alike"
        stepped = graph_answer(llm, prefill, retention, fed)
        alike(bench, f"{same}, graph", stepped, plain)
        if method is ours and length == bench.long and name == "Llama-3-8B":
            yardsticks(bench, same, llm, prefill, retention, fed, plain, stepped)
            profile(bench, "decode", graph._graph.replay, 3)
        del graph, cache, retention
        free()


def plain_seconds(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, fed: Sequence[int]
) -> float:
    """Median seconds of a step on the plain path."""
    cache = prune(prefill, retention, len(fed))
    seconds = []
    for step, token in enumerate(fed):
        start = time.perf_counter()
        choose(extend(llm, cache, [token], prefill.length + step))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[4:])


def graph_seconds(graph: DecodeGraph, token: int) -> tuple[float, float]:
    """Median seconds of a step, and seconds of a step on the device alone; takes 144 steps."""
    seconds = []
    for _ in range(80):
        start = time.perf_counter()
        token = graph.advance(token)[0]
        seconds.append(time.perf_counter() - start)
    begin = Mark()
    for _ in range(64):
        graph._graph.replay()
    return statistics.median(seconds[16:]), Mark().since(begin) / 64


def yardsticks(
    bench: Bench,
    label: str,
    llm: dkv.LoadedModel,
    prefill: dkv.Prefill,
    retention: dkv.Retention,
    fed: Sequence[int],
    plain: Sequence[Tensor],
    stepped: Sequence[Tensor],
) -> None:
    """What else parts from the plain path in bfloat16: another attention kernel, torch's own
    operations captured, exact arithmetic."""
    with attention_set_to(llm, "eager"):
        other = plain_answer(llm, prefill, retention, len(fed), fed)[1]
    alike(bench, f"{label}, plain path with eager attention", other, plain)
    room = len(fed) + 150
    graph = DecodeGraph(llm, prune(prefill, retention, room), prefill.length, room, PlainOps())
    logits = []
    for token in fed:
        graph.advance(token)
        logits.append(graph.logits.clone())
    alike(bench, f"{label}, graph of torch's operations (cuBLAS)", logits, plain)
    bench.add(
        f"{label.split(': ')[0]}: DynamicKV, graph of torch's operations (cuBLAS)",
        graph_seconds(graph, fed[0])[0] * 1e3,
        "ms/token",
    )
    del graph
    exact = list(exact_logits(llm, prefill, retention, list(fed)))
    free()
    for name, found in (("graph", stepped), ("plain path", plain)):
        alike(bench, f"{label.split(', same')[0]}, float32's next token, {name}", found, exact)


def exact_logits(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, tokens: list[int]
) -> Tensor:
    """Logits of the same weights and the same pruned cache in float32, on the device."""
    wide = copy.deepcopy(llm.model).float()
    twin = dkv.LoadedModel.wrap(wide, None, "twin", "float32")  # type: ignore[arg-type]
    cache = KVCache(len(prefill.layers))
    pruned = prune(prefill, retention, 0)
    for layer, held in zip(cache.whole_layers(), pruned.whole_layers(), strict=True):
        keys, values = (states.float() for states in held.held())
        layer.hold(keys, values, prefill.length, room=len(tokens))
    return torch.stack(
        [extend(twin, cache, [token], prefill.length + step) for step, token in enumerate(tokens)]
    )


def bytes_read(llm: dkv.LoadedModel) -> int:
    """Bytes of the weights that a decode step reads: all but the embedding table."""
    embedding = llm.model.get_input_embeddings().weight
    tied = llm.model.get_output_embeddings().weight is embedding
    total = sum(p.numel() * p.element_size() for p in llm.model.parameters())
    return total - (0 if tied else embedding.numel() * embedding.element_size())


def profile(bench: Bench, name: str, action: Callable[[], object], runs: int) -> None:
    """Where the time goes, by kernel, into profile-NAME.txt."""
    if bench.device.type != "cuda":
        return
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as recorded:
        for _ in range(runs):
            action()
        synchronize()
    table = recorded.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=60
    )
    (bench.out / f"profile-{name}.txt").write_text(table, "utf-8")


@torch.inference_mode()
def reselect(bench: Bench, llm: dkv.LoadedModel) -> None:
    """What-if: six methods' choices from one prefill."""
    prefill = prefill_prompt(llm, prompt(llm, bench.long), mass=True)
    methods = [make(bench.method.capacity) for make in SIX]
    bench.add(f"recording H2O's attention mass, {bench.long} tokens", prefill.mass_seconds, "s")
    for method in methods:
        seconds = statistics.median(timed(lambda m=method: m.select(prefill.layers), 5, 2))
        bench.add(f"re-select {method.name}, {bench.long} tokens", seconds, "s")
    together = timed(lambda: [m.select(prefill.layers) for m in methods], 5)
    bench.add(
        f"re-select six methods from one prefill, {bench.long} tokens",
        statistics.median(together),
        "s",
        "<= 0.1",
    )
    profile(bench, "select", lambda: [m.select(prefill.layers) for m in methods], 1)


def peak_of(action: Callable[[], object]) -> int:
    """Most bytes allocated during an action."""
    free()
    torch.cuda.reset_peak_memory_stats()
    action()
    synchronize()
    return torch.cuda.max_memory_allocated()


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


@contextlib.contextmanager
def attention_left_out(llm: dkv.LoadedModel) -> Iterator[None]:
    """Attention that allocates what flash attention does (its output, and one float per head and
    position) and computes nothing, so that memory can be probed at any length in seconds."""

    def probe(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        output = torch.empty_like(query).copy_(query).transpose(1, 2).contiguous()
        del sums
        return output, None

    backend = llm.attention
    masks = AttentionMaskInterface()
    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", masks["sdpa"])
    llm.model.set_attn_implementation("probe")
    try:
        yield
    finally:
        llm.model.set_attn_implementation(backend)


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


def flash_versions() -> list[int]:
    """FlashAttention's packages that transformers finds here."""
    from transformers import utils

    return [
        version
        for version in (2, 3, 4)
        if getattr(utils, f"is_flash_attn_{version}_available", lambda: False)()
    ]


@torch.inference_mode()
def backends(bench: Bench) -> None:
    """Every backend that is here: kept sets against sdpa's, outputs against float32's. On SmolLM2
    where its file is given: random weights attend almost evenly, so that chance decides."""
    from benchmarks.prompts import prompt_of

    if bench.gguf is not None:
        wide = dkv.load_model(bench.gguf, device=str(bench.device), dtype="float32")
        narrow = str(bench.dtype).removeprefix("torch.")
        llm = dkv.load_model(bench.gguf, device=str(bench.device), dtype=narrow)
        encoded = prompt_of(wide, 300 if bench.dry else 4000)
    else:
        sizes = {"num_hidden_layers": 4 if bench.dry else 6, "initializer_range": 0.04}
        llm = build(bench, "Llama-3-8B", **sizes)
        wide = build(bench, "Llama-3-8B", torch.float32, **sizes)
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


@torch.inference_mode()
def tune(bench: Bench) -> None:
    """Decode time for several shapes of the projection kernels."""
    if bench.device.type != "cuda":
        return
    from dynamickv.decoding.kernels import TritonOps

    llm = build(bench, "Llama-3-8B")
    prefill = prefill_prompt(llm, prompt(llm, 4096))
    retention = bench.method.select(prefill.layers)
    for shape in [
        (4, 1024, 4),
        (2, 2048, 4),
        (2, 1024, 2),
        (2, 2048, 8),
        (2, 4096, 8),
        (4, 2048, 8),
    ]:
        graph = DecodeGraph(llm, prune(prefill, retention, 160), 4096, 160, TritonOps(*shape))
        seconds = graph_seconds(graph, 5)[1]
        bench.add(f"tune rows, block, warps = {shape}", seconds * 1e3, "ms/token")
        del graph


def with_models(section: Callable[..., None], *names: str) -> Callable[[Bench], None]:
    """A section that runs on one model after the other."""

    def run(bench: Bench) -> None:
        for name in names:
            section(bench, name, bench.model(name))
            free()

    return run


def with_llama(section: Callable[..., None]) -> Callable[[Bench], None]:
    """A section that runs on Llama-3-8B and does not say so in its rows."""
    return with_models(lambda bench, name, llm: section(bench, llm), "Llama-3-8B")


def decode_long(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    decoding(bench, name, llm, bench.long, ">= 2.5")


def decode_longest(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    decoding(bench, name, llm, bench.longest, ">= 4")


def overhead_and_decode(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    overhead(bench, name, llm)
    decode_long(bench, name, llm)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "bandwidth": bandwidth,
    "correctness": correctness,
    "smollm2": smollm2,
    "backends": backends,
    "tune": tune,
    "overhead": with_models(overhead, "Llama-3-8B"),
    "decode32k": with_models(decode_long, "Llama-3-8B"),
    "reselect": with_llama(reselect),
    "decode128k": with_models(decode_longest, "Llama-3-8B"),
    "serve": with_llama(serve_memory),
    "largest": with_llama(largest),
    "others": with_models(overhead_and_decode, "Mistral-7B-v0.2", "Qwen2-7B"),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, any device")
    parser.add_argument("--sections", help=f"some of {','.join(SECTIONS)}; all but tune by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--gguf", type=Path, help="SmolLM2's .gguf file, for the real model")
    parser.add_argument("--append", action="store_true", help="keep the figures that are there")
    parser.add_argument("--limit", type=float, default=540, help="start no section after, seconds")
    options = parser.parse_args()
    out = options.out / "dry-run" if options.dry_run and options.out == RESULTS else options.out
    bench = Bench(options.dry_run, out, options.gguf, options.limit)
    if options.append and (bench.out / "gpu.json").exists():
        record = json.loads((bench.out / "gpu.json").read_text("utf-8"))
        bench.rows, bench.facts = [Row(**row) for row in record["rows"]], record["facts"]
    chosen = (options.sections or ",".join(s for s in SECTIONS if s != "tune")).split(",")
    if "bandwidth" not in chosen:
        chosen.insert(0, "bandwidth")
    for name in chosen:
        if bench.seconds > bench.limit:
            print(f"no time left for {name}")
            continue
        try:
            SECTIONS[name](bench)
        except Exception:  # the other sections' figures are worth having
            traceback.print_exc()
            bench.facts.setdefault("failed", {})[name] = traceback.format_exc()[-2000:]
        free()
    bench.facts["seconds"] = bench.seconds
    bench.save()
    print((bench.out / "gpu.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
