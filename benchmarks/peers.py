"""Other programs that run the embedded model on this CPU, each where its make target has put it:
the same tokens, steps and threads as ours. Rows of benchmarks.cpu."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

import dynamickv as dkv
from benchmarks.prompts import STEPS, step_seconds
from benchmarks.report import Row, measured, paired_seconds, ratios, scaled
from dynamickv.models import KNOWN_MODELS, embedded_file
from dynamickv.reading.prefill import prefill_prompt
from dynamickv.records import EncodedPrompt, Prefill

HERE = Path(__file__).parent
LLAMACPP = HERE.parent / ".llamacpp"
OPENVINO = HERE.parent / ".venv-openvino"
LONG, CAPACITY = 7000, 256
"""Tokens of OpenVINO GenAI's prompt, and what both keep of them."""


def llamacpp(llm: dkv.LoadedModel, prompt: EncodedPrompt, read: Prefill, rounds: int) -> list[Row]:
    """llama.cpp on the same file, everything kept."""
    file = embedded_file(KNOWN_MODELS[dkv.DEFAULT_MODEL])
    node = shutil.which("node")
    if node is None or not (LLAMACPP / "node_modules").is_dir():
        print("llama.cpp is left out: it is not here (make llamacpp, which needs npm).")
        return []
    theirs = _asked(
        [node, str(HERE / "llamacpp.mjs"), str(LLAMACPP)],
        {"model": str(file), **_request(prompt, rounds)},
    )
    reading = paired_seconds([lambda: prefill_prompt(llm, prompt)], rounds)[0]
    steps = [step_seconds(llm, dkv.FullKV(), read) for _ in range(rounds)]
    return [
        measured("prefill, llama.cpp", theirs["prefill"], "s"),
        measured("prefill, llama.cpp / fast", ratios(theirs["prefill"], reading), "x", ">= 3.5"),
        measured("decode, llama.cpp, everything kept", scaled(theirs["decode"], 1000), "ms/token"),
        measured("decode, llama.cpp / fast FullKV", ratios(theirs["decode"], steps), "x", ">= 1.5"),
    ]


def openvino(llm: dkv.LoadedModel, prompt: EncodedPrompt, rounds: int) -> list[Row]:
    """OpenVINO GenAI with int8 weights, its cache evicted to as many tokens as DynamicKV keeps."""
    file = embedded_file(KNOWN_MODELS[dkv.DEFAULT_MODEL])
    if file is None or not (OPENVINO / ".done").exists():
        print("OpenVINO GenAI is left out: it is not here (make openvino).")
        return []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "int8.gguf"
        write_int8(file, model)
        theirs = _asked(
            [str(OPENVINO / "bin" / "python"), str(HERE / "openvino_run.py")],
            {"model": str(model), **_request(prompt, rounds), "capacity": CAPACITY},
        )
    method = dkv.DynamicKV(capacity=CAPACITY)
    read = prefill_prompt(llm, prompt)
    steps = [step_seconds(llm, method, read) for _ in range(rounds)]
    peak, token_bytes = serving_peak(llm, method, prompt)
    # Layers that wait for an update hold up to r_max times the capacity: four with the paper's m.
    sooner = dkv.DynamicKV(capacity=CAPACITY, update_interval=2)
    sooner_peak, _ = serving_peak(llm, sooner, prompt)
    name = f"OpenVINO GenAI (int8 weights, eviction to {CAPACITY})"
    at = f"{prompt.length:,} tokens"
    tokens = f"tokens in the cache (theirs {theirs['peak_tokens']:,}, at the end "
    tokens += f"{theirs['held_tokens']:,}; ours {peak / token_bytes:,.0f}, mean over layers)"
    formats = f"theirs {theirs['token_bytes']:,.0f} bytes a token, ours {token_bytes:,} in "
    formats += str(llm.model.dtype).removeprefix("torch.")
    return [
        measured(f"decode, {name}, {at}", scaled(theirs["decode"], 1000), "ms/token"),
        measured(f"decode, fast DynamicKV({CAPACITY}), {at}", scaled(steps, 1000), "ms/token"),
        measured(
            f"decode, {name} / fast DynamicKV({CAPACITY}), {at}",
            ratios(theirs["decode"], steps),
            "x",
            ">= 1",
        ),
        Row(
            f"peak cache, {name} / DynamicKV({CAPACITY}) in generate, {at}",
            theirs["peak_tokens"] / (peak / token_bytes),
            "x",
            ">= 10",
            tokens,
        ),
        Row(
            "the same, budgets settled every 2 layers instead of every 4",
            theirs["peak_tokens"] / (sooner_peak / token_bytes),
            "x",
            note=f"ours {sooner_peak / token_bytes:,.0f} tokens, mean over layers",
        ),
        Row(
            "the peaks of the paper's setting in bytes, each in its own format",
            theirs["peak_tokens"] * theirs["token_bytes"] / peak,
            "x",
            note=formats,
        ),
    ]


def serving_peak(
    llm: dkv.LoadedModel, method: dkv.CompressionMethod, prompt: EncodedPrompt
) -> tuple[int, int]:
    """Most bytes of keys and values while `generate` reads the prompt and answers, and the bytes
    of one token in all layers."""
    ids = torch.tensor([prompt.token_ids])
    with dkv.compress(llm.model, method) as cache:
        llm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            min_new_tokens=STEPS + 1,
            max_new_tokens=STEPS + 1,
        )
    size = llm.geometry
    token = 2 * size.num_layers * size.num_kv_heads * size.head_dim * llm.model.dtype.itemsize
    return cache.peak_bytes, token


def write_int8(source: Path, target: Path) -> None:
    """A GGUF file with its matrices in int8, groups of 32 with a scale each (Q8_0)."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            listed = field.types[0] == GGUFValueType.ARRAY
            kind = field.types[-1] if listed else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    int8 = GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        if numbers.ndim > 1:
            writer.add_tensor(tensor.name, quantize(numbers, int8), raw_dtype=int8)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _request(prompt: EncodedPrompt, rounds: int) -> dict[str, Any]:
    return {
        "tokens": list(prompt.token_ids),
        "steps": STEPS,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }


def _asked(command: Sequence[str], request: dict[str, Any]) -> dict[str, Any]:
    """A program's answer: the last line that it prints.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"{Path(command[1]).name} ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
