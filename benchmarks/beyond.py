"""A model that no single GPU holds: python -m benchmarks.beyond [--gpus N] [--small]

Llama-3-70B's geometry, all 80 layers, with random bfloat16 weights that are made where they lie, in
equal parts on the GPUs: what an answer token takes with FullKV and with DynamicKV(512), captured on
every GPU and on the model's own path, whether both say the same, and the memory of each GPU. Writes
benchmarks/results/beyond.json after every part, and says every ten seconds that it goes on.
--small: a few layers and 1,024 tokens; without a GPU a tiny model in parts that lie on the CPU.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import dynamickv as dkv
from benchmarks.gpu.answers import (
    Computed,
    advance_seconds,
    graph_logits,
    plain_answer,
    plain_seconds,
)
from benchmarks.gpu.models import TINY, bytes_read, prompt
from benchmarks.gpu.timing import free
from benchmarks.report import RESULTS, Row, machine, measured, publish, ratios, scaled
from dynamickv.cache import prune
from dynamickv.decoding.cuda_graph import DecodeGraph
from dynamickv.decoding.decode_step import PlainOps
from dynamickv.fast.decoder import Stage
from dynamickv.reading.prefill import prefill_prompt

LENGTHS = (32768, 131072)
SIZES = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}
"""Llama-3-70B's."""
FED = [1] * 8
"""Tokens after which both paths are compared."""
PLAIN, WARM, CAPTURED = 24, 16, 64
"""Steps on the model's own path, of which four warm up; then those of the captured step."""


def config_of(tiny: bool, layers: int, longest: int) -> LlamaConfig:
    """The model's sizes."""
    sizes = {**SIZES, **(TINY if tiny else {}), "num_hidden_layers": layers}
    return LlamaConfig(
        **sizes,
        rope_theta=5e5,
        max_position_embeddings=2 * longest,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def in_turn(layers: int, parts: int) -> dict[str, int]:
    """A Llama's layers in equal parts, one after the other; its ends where they belong."""
    places = {f"model.layers.{n}": n * parts // layers for n in range(layers)}
    first, last = min(places.values()), max(places.values())
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last}
    return {**places, **ends, "lm_head": last}


def bytes_on_one(config: Any, gpus: int, length: int) -> int:
    """What the fullest GPU has to hold: weights, keys and values, and beside them either the copy
    that FullKV answers from or what reading the prompt takes."""
    width, wide = config.hidden_size, config.intermediate_size
    shared = width * config.num_key_value_heads // config.num_attention_heads
    layers = -(-config.num_hidden_layers // gpus)
    table = config.vocab_size * width * (2 if gpus == 1 else 1)
    weights = layers * (2 * width * width + 2 * width * shared + 3 * width * wide) + table
    stored = layers * 2 * shared * length
    reading = length * (3 * wide + 4 * width)
    return 2 * (weights + stored + max(stored, reading))


def require_room(config: Any, room: Sequence[int], length: int) -> None:
    """Refuse before anything is made.

    Args:
        room: free bytes of every GPU.

    Raises:
        ValueError: the GPUs are too few or too small for that model and prompt, in one sentence.
    """
    if not room:
        raise ValueError("there is no GPU here; --small tries the command out on the CPU")
    needed, least = bytes_on_one(config, len(room), length), min(room)
    if needed <= least:
        return
    most = config.num_hidden_layers
    enough = next((n for n in range(1, most + 1) if bytes_on_one(config, n, length) <= least), None)
    remedy = f"use {enough} of them" if enough else "use larger ones"
    raise ValueError(
        f"{most} layers and a prompt of {length:,} tokens take {needed / 2**30:.0f} GiB on each of "
        f"{len(room)} GPUs, and one has {least / 2**30:.0f} GiB free; {remedy}, or lower --layers "
        "or --lengths"
    )


def build(config: LlamaConfig, devices: Sequence[torch.device]) -> dkv.LoadedModel:
    """That model with random weights, in equal parts on the devices, dispatched as `load_model`
    with a device map leaves it."""
    from accelerate import dispatch_model

    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    places = in_turn(config.num_hidden_layers, len(devices))
    for name, place in places.items():
        module = model.get_submodule(name).to_empty(device=devices[place])
        for weight in module.parameters():
            torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
    with devices[0]:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.generation_config.eos_token_id = None
    dispatch_model(
        model,
        device_map={name: str(devices[place]) for name, place in places.items()},
        main_device=str(devices[0]),
        skip_keys=model._skip_keys_device_placement,
        force_hooks=True,
    )
    return dkv.LoadedModel.wrap(model.eval(), None, "70B", "random weights")  # type: ignore[arg-type]


def parts_of(layers: int, devices: Sequence[torch.device]) -> list[Stage]:
    """The stages of a model whose parts lie on one device all the same."""
    places = list(in_turn(layers, len(devices)).values())[:layers]
    last = len(devices) - 1
    return [
        Stage(
            device,
            range(places.index(part), places.index(part) + places.count(part)),
            embeds=part == 0,
            norms=part == last,
            speaks=part == last,
        )
        for part, device in enumerate(devices)
    ]


def beyond(
    llm: dkv.LoadedModel, name: str, length: int, parts: Sequence[Stage] | None
) -> Iterator[list[Row]]:
    """Every figure at one prompt length: of reading it, of the model's own path, of the captured
    step.

    Args:
        parts: for a model on the CPU, the stages whose steps are computed; None captures them.
    """
    graph_of = (
        DecodeGraph
        if parts is None
        else partial(DecodeGraph, ops=PlainOps(), capture=Computed, parts=parts)
    )
    of = f"{name}, {length} tokens"
    say(of, "reading the prompt")
    free()
    forget_peaks()
    prefill = prefill_prompt(llm, prompt(llm, length))
    yield [measured(f"{of}: reading the prompt", prefill.seconds, "s", note=peaks())]
    methods = dkv.FullKV(), dkv.DynamicKV(capacity=512)
    retained = {method.name: method.select(prefill.layers) for method in methods}
    own, seconds = {}, {}
    for method, retention in retained.items():
        say(of, method, "plain path")
        forget_peaks()
        own[method] = plain_answer(llm, prefill, retention, len(FED), FED)[1]
        free()
        seconds[method] = plain_seconds(llm, prefill, retention, [1] * PLAIN)
        free()
        yield [step_row(f"{of}: {method}, plain path", seconds[method], peaks())]
    yield [over_full(f"{of}: DynamicKV(512) / FullKV, plain path", seconds)]
    room, moved = len(FED) + WARM + CAPTURED, {}
    for method, retention in retained.items():
        say(of, method, "captured step")
        forget_peaks()
        cache = prune(prefill, retention, room)
        moved[method] = bytes_read(llm) + cache.nbytes
        began = time.perf_counter()
        graph = graph_of(llm, cache, prefill.length, room)
        note = f"capture {time.perf_counter() - began:.1f} s"
        apart, same = difference(graph_logits(graph, FED), own[method])
        seconds[method] = advance_seconds(graph, 1, WARM, CAPTURED)
        del graph, cache
        free()
        note = ", ".join(filter(None, (note, peaks())))
        yield [
            step_row(f"{of}: {method}, captured step", seconds[method], note),
            Row(
                f"{of}: {method}, captured step and plain path, relative difference of logits",
                apart, "", "<= 0.2", f"{same} of {len(FED)} next tokens the same",
            ),
        ]  # fmt: skip
    target = "<= 0.8" if length == LENGTHS[-1] else ""
    note = f"{moved['DynamicKV'] / moved['FullKV']:.3f} by the bytes that are read"
    yield [over_full(f"{of}: DynamicKV(512) / FullKV, captured step", seconds, target, note)]


def over_full(
    measure: str, seconds: dict[str, list[float]], target: str = "", note: str = ""
) -> Row:
    """DynamicKV's steps over FullKV's."""
    compared = ratios(seconds["DynamicKV"], seconds["FullKV"])
    return measured(measure, compared, "x", target, note)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, int]:
    """The largest distance between logits after one token, in lengths of the expected ones, NaN
    where any is; and after how many tokens the same one is the likeliest next."""
    pairs = [(a.float().cpu(), b.float().cpu()) for a, b in zip(found, expected, strict=True)]
    apart = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    return float(apart.max()), sum(int(a.argmax()) == int(b.argmax()) for a, b in pairs)


def step_row(measure: str, seconds: list[float], note: str = "") -> Row:
    """One token's time."""
    return measured(measure, scaled(seconds, 1e3), "ms/token", "", note)


def forget_peaks() -> None:
    """Count the memory that is allocated at most anew."""
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(gpu)


def peaks() -> str:
    """What was allocated at most on each GPU that holds something, or nothing without a GPU."""
    held = [torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())]
    sizes = ", ".join(f"{size / 2**30:.1f}" for size in held if size)
    return f"at most {sizes} GiB on the GPUs" if sizes else ""


def say(*words: str) -> None:
    """A line of progress, at once."""
    print(f"[{time.strftime('%H:%M:%S')}]", *words, flush=True)


@contextmanager
def going_on(seconds: float = 10.0) -> Iterator[None]:
    """Say every so many seconds that the block is still at work."""
    done = threading.Event()

    def tell() -> None:
        began = time.perf_counter()
        while not done.wait(seconds):
            say(f"at work for {time.perf_counter() - began:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write beyond.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beyond", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens (32768 131072)")
    parser.add_argument("--gpus", type=int, help="how many are used (all; 3 parts of a CPU)")
    parser.add_argument("--layers", type=int, help="of the model (80; 8 with --small)")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    cuda, seen = torch.cuda.is_available(), torch.cuda.device_count()
    gpus = options.gpus or seen or 3
    if cuda and gpus > seen:
        parser.error(f"there are {seen} GPUs and not {gpus}; lower --gpus")
    lengths = options.lengths or ((1024,) if options.small else LENGTHS)
    layers = options.layers or (8 if options.small else SIZES["num_hidden_layers"])
    if gpus > layers:
        parser.error(f"{layers} layers make no {gpus} parts; lower --gpus or raise --layers")
    tiny = options.small and not cuda
    config = config_of(tiny, layers, max(lengths))
    if not tiny:
        try:
            room = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus if cuda else 0)]
            require_room(config, room, max(lengths))
        except ValueError as error:
            parser.error(str(error))
    where = machine()
    devices = [torch.device("cuda", n) if cuda else torch.device("cpu") for n in range(gpus)]
    geometry = "tiny geometry" if tiny else "Llama-3-70B geometry"
    name = f"{geometry}, {layers} layers over {gpus} {'GPUs' if cuda else 'parts of a CPU'}"
    with going_on():
        say(name, "making the weights")
        llm = build(config, devices)
        size = sum(weight.numel() * weight.element_size() for weight in llm.model.parameters())
        rows = [measured(f"{name}: weights", size / 1e9, "GB", note="random bfloat16")]
        if cuda:
            card = torch.cuda.get_device_properties(0).total_memory
            rows.append(measured(f"{name}: weights / memory of one GPU", size / card, "x"))
        for length in lengths:
            for found in beyond(llm, name, length, None if cuda else parts_of(layers, devices)):
                rows += found
                publish("beyond-dry" if options.small else "beyond", where, rows, options.out)


if __name__ == "__main__":
    main()
