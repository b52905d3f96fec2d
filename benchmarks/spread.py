"""python -m benchmarks.spread [--parts model,large,processes] [--processes N] [--small]

The evaluation on several GPUs: whether processes that share the work find what one finds, also when
one of them is killed, and how much sooner. A model spread over the GPUs: whether it answers as on
one, and one that no GPU could hold alone. Writes benchmarks/results/spread.json. Without GPUs the
processes share the CPU: a dry run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

import dynamickv as dkv
from benchmarks.gpu.answers import graph_answer, graph_seconds, plain_answer, plain_seconds
from benchmarks.gpu.models import prompt
from benchmarks.gpu.timing import free
from benchmarks.prompts import QUESTION, document_of
from benchmarks.report import Row, machine, measured, publish, ratios, scaled
from dynamickv.cache import prune
from dynamickv.decoding.cuda_graph import DecodeGraph, graphable
from dynamickv.evaluate.journal import Journal
from dynamickv.reading.prefill import prefill_prompt

ROOT = Path(__file__).parent.parent
LOST = 3
"""Trials of a process after which it is killed."""
LENGTHS = (32768, 131072)
"""Prompt tokens of the model that one GPU cannot hold."""
LAYERS = 80
STEPS = 24
STEPS_CAPTURED = 144
"""Steps on either path; `graph_seconds` takes as many."""


def command(name: str, options: argparse.Namespace, output: Path) -> list[str]:
    """One evaluation, as README gives it."""
    small = options.small
    asked = {
        "needle": [
            *("--lengths", "300,400" if small else "1024,2048,3072,4096"),
            *("--capacity", "32" if small else "128"),
            *("--depths", "5", "--max-new-tokens", "4" if small else "15"),
            *("--samples", "1" if small else "20"),
        ],
        "longbench": [
            *("--data", str(ROOT / "benchmarks" / "data")),
            *("--max-new-tokens", "2" if small else "64"),
            *("--limit", "6" if small else "20"),
            *("--capacity", "32" if small else "128"),
            *(("--max-length", "300") if small else ()),
        ],
    }[name]
    target = output / f"{name}.json" if name == "needle" else output / name
    return [name, "--model", options.model, "--dtype", "float32", *asked, "--output", str(target)]


def journal(name: str, output: Path) -> Journal:
    """Where that command's results go."""
    return Journal(output / (f"{name}.jsonl" if name == "needle" else f"{name}/results.jsonl"))


def found(name: str, output: Path) -> dict[str, Any]:
    """Every unit's runs, without how long they took."""
    rows = [row for row in journal(name, output).read() if "unit" in row]
    return {json.dumps(row["unit"]): row["runs"] for row in rows}


def alone(arguments: list[str], place: int) -> float:
    """Seconds of one process on one device."""
    gpus = torch.cuda.device_count()
    own = {"CUDA_VISIBLE_DEVICES": str(place % gpus)} if gpus else {}
    began = time.perf_counter()
    started = [sys.executable, "-m", "dynamickv", *arguments]
    subprocess.run(started, check=True, cwd=ROOT, env={**os.environ, **own})
    return time.perf_counter() - began


def launched(arguments: list[str], processes: int) -> subprocess.Popen[bytes]:
    """The same under `accelerate launch`."""
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0", "-m", "dynamickv"),
    ]
    return subprocess.Popen([*launcher, *arguments], cwd=ROOT, start_new_session=True)


def together(arguments: list[str], processes: int) -> float:
    """Seconds of several processes."""
    began = time.perf_counter()
    if launched(arguments, processes).wait():
        raise SystemExit("the launched processes failed")
    return time.perf_counter() - began


def lose_one(name: str, arguments: list[str], output: Path, processes: int) -> int:
    """Kill the last process once it has measured a little; how many units were measured by then."""
    part = Journal(journal(name, output).path, processes - 1).own
    launcher = launched(arguments, processes)
    while not part.is_file() or len(part.read_bytes().splitlines()) <= LOST:
        if launcher.poll() is not None:
            raise SystemExit("the launched processes ended before one could be killed")
        time.sleep(0.05)
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK") == str(processes - 1):
            process.kill()
    if launcher.wait() == 0:
        raise SystemExit("nobody noticed that a process was killed")
    return len(found(name, output))


def evaluations(options: argparse.Namespace, folder: Path) -> list[Row]:
    """One process, several, and several of which one is killed."""
    rows = []
    one, many = folder / "one", folder / "many"
    for output in (one, many):
        output.mkdir(exist_ok=True)
    names = ("needle", "longbench")
    # On GPUs of their own neither slows the other.
    apart = torch.cuda.device_count() > 1
    with ThreadPoolExecutor(len(names) if apart else 1) as pool:
        single = list(
            pool.map(lambda place: alone(command(names[place], options, one), place), (0, 1))
        )
    for name, seconds in zip(names, single, strict=True):
        shared = together(command(name, options, many), options.processes)
        expected, got = found(name, one), found(name, many)
        answers = sum(len(runs) for runs in expected.values())
        target = ">= 6" if name == "needle" and options.processes == 8 else ""
        rows += [
            Row(
                f"{name}: the same results from {options.processes} processes as from one",
                share_equal(expected, got), "", "1", f"{answers} answers, {len(expected)} prompts",
            ),
            Row(
                f"{name}: one process / {options.processes}", seconds / shared, "x", target,
                f"{seconds:.0f} and {shared:.0f} s, start and loading included",
            ),
        ]  # fmt: skip
    killed = folder / "killed"
    killed.mkdir()
    arguments = command("needle", options, killed)
    before = lose_one("needle", arguments, killed, options.processes)
    together(arguments, options.processes)
    rows.append(
        Row(
            "needle: the same results after one process was killed",
            share_equal(found("needle", folder / "one"), found("needle", killed)), "", "1",
            f"{before} prompts were measured before, the rest after the restart",
        )
    )  # fmt: skip
    return rows


def share_equal(expected: dict[str, Any], got: dict[str, Any]) -> float:
    """How many answers of `expected` are in `got`, word for word with scores and bytes."""
    pairs = [
        (run, got.get(unit, []))
        for unit, runs in expected.items()
        for run in runs
    ]  # fmt: skip
    return sum(run in runs for run, runs in pairs) / len(pairs)


def in_turn(layers: int, gpus: int) -> dict[str, int]:
    """A Llama's layers in equal parts on one GPU after the other; its ends where they belong."""
    places = {f"model.layers.{n}": n * gpus // layers for n in range(layers)}
    first, last = min(places.values()), max(places.values())
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last}
    return {**places, **ends, "lm_head": last}


def spread_model(options: argparse.Namespace) -> list[Row]:
    """SmolLM2 on one GPU and on several."""
    methods = [dkv.build_method(name, capacity=128) for name in dkv.METHODS if name != "Manual"]
    traces: list[dkv.Trace] = []
    gpus = torch.cuda.device_count()
    # Its projection to logits is the embedding table.
    halves = {**in_turn(30, gpus), "lm_head": 0}
    for place in ({"device": "cuda:0"}, {"device_map": halves}):
        llm = dkv.load_model(options.model, dtype="float32", **place)  # type: ignore[arg-type]
        asked = document_of(llm, 2000), QUESTION
        traces.append(dkv.compare(llm, *asked, methods=methods, max_new_tokens=48))
    equal = [
        one.answer == other.answer and one.retained == other.retained
        for one, other in zip(traces[0].runs, traces[1].runs, strict=True)
    ]
    step = "captured step" if graphable(llm) else "plain path"
    note = f"answers and kept sets of {len(equal)} methods, 2,000 tokens, float32, {step}"
    return [
        Row(f"SmolLM2 over {gpus} GPUs: the same as on one", sum(equal) / len(equal), "", "1", note)
    ]


def model_of_70b(gpus: int, small: bool) -> dkv.LoadedModel:
    """Llama-3-70B's geometry with random weights, in equal parts on the GPUs."""
    from accelerate import dispatch_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": LAYERS,
    }  # fmt: skip
    config = LlamaConfig(
        **{**sizes, **({"num_hidden_layers": 4} if small else {})},
        rope_theta=5e5,
        max_position_embeddings=2 * max(LENGTHS),
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    places = in_turn(config.num_hidden_layers, gpus)
    for name, place in places.items():
        module = model.get_submodule(name).to_empty(device=f"cuda:{place}")
        for weight in module.parameters():
            torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
    with torch.device("cuda:0"):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.generation_config.eos_token_id = None
    dispatch_model(model, device_map=places)
    return dkv.LoadedModel.wrap(model.eval(), None, "70B", "random weights")  # type: ignore[arg-type]


def beyond_one(options: argparse.Namespace) -> list[Row]:
    """A model that no single GPU here can hold: what a step takes on the model's own path and
    captured, and whether both say the same."""
    gpus = torch.cuda.device_count()
    llm = model_of_70b(gpus, options.small)
    card = torch.cuda.get_device_properties(0).total_memory
    size = sum(weight.numel() * weight.element_size() for weight in llm.model.parameters())
    name = f"Llama-3-70B geometry, {llm.geometry.num_layers} layers over {gpus} GPUs"
    note = "random bfloat16"
    rows = [Row(f"{name}: weights / memory of one GPU", size / card, "x", "", note)]
    for length in (1024,) if options.small else options.lengths:
        prefill = prefill_prompt(llm, prompt(llm, length))
        held = [torch.cuda.max_memory_allocated(gpu) / 2**30 for gpu in range(gpus)]
        of = f"{name}, {length} tokens"
        rows.append(Row(f"{of}: prefill", prefill.seconds, "s", "", f"up to {max(held):.0f} GiB"))
        plain, graph = {}, {}
        for method in (dkv.FullKV(), dkv.DynamicKV(capacity=512)):
            retention = method.select(prefill.layers)
            plain[method.name] = plain_seconds(llm, prefill, retention, [1] * STEPS)
            rows.append(step_row(f"{of}: {method.name}, plain path", plain[method.name]))
            own = plain_answer(llm, prefill, retention, 4, [1] * 4)[1]
            free()
            captured = graph_answer(llm, prefill, retention, [1] * 4)
            free()
            away = max(
                float((a.to(b.device).float() - b.float()).abs().max())
                for a, b in zip(own, captured, strict=True)
            )
            spread = float(own[-1].float().std())
            cache = prune(prefill, retention, STEPS_CAPTURED)
            decoder = DecodeGraph(llm, cache, prefill.length, STEPS_CAPTURED)
            graph[method.name], _ = graph_seconds(decoder, 1)
            note = f"logits at most {away:.3g} from the plain path's, whose spread is {spread:.3g}"
            rows.append(step_row(f"{of}: {method.name}, captured step", graph[method.name], note))
            del cache, decoder
            free()
        target = "<= 0.8" if length == LENGTHS[-1] else ""
        for path, seconds in (("captured step", graph), ("plain path", plain)):
            compared = ratios(seconds["DynamicKV"], seconds["FullKV"])
            rows.append(
                measured(
                    f"{of}: DynamicKV(512) / FullKV, {path}", compared, "x",
                    target if path == "captured step" else "",
                )
            )  # fmt: skip
        del prefill
        free()
    return rows


def step_row(measure: str, seconds: list[float], note: str = "") -> Row:
    """One token's time."""
    return measured(measure, scaled(seconds, 1e3), "ms/token", "", note)


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=__doc__)
    parser.add_argument("--model", default=dkv.models.DEFAULT_MODEL)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a few short trials")
    parser.add_argument("--parts", default="processes,model,large")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="of `large`")
    options = parser.parse_args()
    where = machine()
    name = "spread" if torch.cuda.is_available() else "spread-dry"
    rows: list[Row] = []
    parts = options.parts.split(",")
    for part, measure in (("model", spread_model), ("large", beyond_one)):
        if part in parts and torch.cuda.device_count() > 1:
            rows += measure(options)
            publish(name, where, rows)
    if "processes" in parts:
        with tempfile.TemporaryDirectory() as folder:
            rows += evaluations(options, Path(folder))
        publish(name, where, rows)


if __name__ == "__main__":
    main()
