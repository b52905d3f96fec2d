"""python -m benchmarks.spread [--model FILE] [--processes N] [--small]

The evaluation on several GPUs: whether processes that share the work find what one finds, also when
one of them is killed, how much sooner, and whether a model spread over the GPUs answers as on one.
Writes benchmarks/results/spread.json. Without GPUs the processes share the CPU: a dry run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import dynamickv as dkv
from benchmarks.gpu.answers import plain_answer, plain_seconds
from benchmarks.gpu.models import prompt
from benchmarks.prompts import QUESTION, document_of
from benchmarks.report import Row, machine, measured, publish, scaled
from dynamickv.evaluate.journal import Journal
from dynamickv.reading.prefill import prefill_prompt

ROOT = Path(__file__).parent.parent
LOST = 3
"""Trials of a process after which it is killed."""
LENGTH = 16384
"""Prompt tokens of the model that one GPU cannot hold."""


def command(name: str, options: argparse.Namespace, output: Path) -> list[str]:
    """One evaluation, as README gives it."""
    small = options.small
    asked = {
        "needle": [
            *("--lengths", "300,400" if small else "1024,2048,3072,4096"),
            *("--capacity", "32" if small else "64,128,256"),
            *("--depths", "5", "--max-new-tokens", "4" if small else "20"),
            *("--samples", "1" if small else "2"),
        ],
        "longbench": [
            *("--data", str(ROOT / "benchmarks" / "data")),
            *("--max-new-tokens", "2" if small else "64"),
            *("--limit", "6" if small else "20"),
            *("--capacity", "32" if small else "64,128,256,512"),
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


def alone(arguments: list[str]) -> float:
    """Seconds of one process on one device."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dynamickv", *arguments], check=True, cwd=ROOT)
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
    for name in ("needle", "longbench"):
        one, many = folder / "one", folder / "many"
        for output in (one, many):
            output.mkdir(exist_ok=True)
        single = alone(command(name, options, one))
        shared = together(command(name, options, many), options.processes)
        expected, got = found(name, one), found(name, many)
        answers = sum(len(runs) for runs in expected.values())
        rows += [
            Row(
                f"{name}: the same results from {options.processes} processes as from one",
                share_equal(expected, got), "", "1", f"{answers} answers, {len(expected)} prompts",
            ),
            Row(
                f"{name}: one process / {options.processes}", single / shared, "x", "",
                f"{single:.0f} and {shared:.0f} s, start and loading included",
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


def halves(layers: int) -> dict[str, int]:
    """The first half of a Llama's layers on GPU 0, the second on GPU 1."""
    places = {f"model.layers.{n}": int(n >= layers // 2) for n in range(layers)}
    return {**places, "model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0}


def spread_model(options: argparse.Namespace) -> list[Row]:
    """SmolLM2 on one GPU and on two."""
    methods = [dkv.build_method(name, capacity=128) for name in dkv.METHODS if name != "Manual"]
    traces: list[dkv.Trace] = []
    for place in ({"device": "cuda:0"}, {"device_map": halves(30)}):
        llm = dkv.load_model(options.model, dtype="float32", **place)  # type: ignore[arg-type]
        asked = document_of(llm, 2000), QUESTION
        traces.append(dkv.compare(llm, *asked, methods=methods, max_new_tokens=48))
    equal = [
        one.answer == other.answer and one.retained == other.retained
        for one, other in zip(traces[0].runs, traces[1].runs, strict=True)
    ]
    note = f"answers and kept sets of {len(equal)} methods, 2,000 tokens, float32"
    return [
        Row("SmolLM2 over two GPUs: the same as on one", sum(equal) / len(equal), "", "1", note)
    ]


def beyond_one(options: argparse.Namespace) -> list[Row]:
    """A model of random weights that no single GPU here can hold."""
    from accelerate import dispatch_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    card = torch.cuda.get_device_properties(0).total_memory
    sizes: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rope_theta": 5e5,
        "max_position_embeddings": 131072, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    a_layer = 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    layers = int(1.25 * card / a_layer)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    places = {**halves(layers), "lm_head": 1}
    for name, place in places.items():
        module = model.get_submodule(name).to_empty(device=f"cuda:{place}")
        for weight in module.parameters():
            torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.02)
    with torch.device("cuda:0"):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.generation_config.eos_token_id = None
    dispatch_model(model, device_map=places)
    llm = dkv.LoadedModel.wrap(model.eval(), None, "70B", "random weights")  # type: ignore[arg-type]
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    name = f"Llama-3-70B geometry, {layers} layers"
    prefill = prefill_prompt(llm, prompt(llm, LENGTH))
    held = [torch.cuda.max_memory_allocated(n) / 2**30 for n in (0, 1)]
    note = f"random bfloat16; with a prompt of {LENGTH} tokens {held[0]:.0f} and {held[1]:.0f} GiB"
    rows = [Row(f"{name}: weights / memory of one GPU", size / card, "x", "", note)]
    for method in (dkv.FullKV(), dkv.DynamicKV(capacity=512)):
        retention = method.select(prefill.layers)
        seconds = plain_seconds(llm, prefill, retention, [1] * 24)
        finite = bool(plain_answer(llm, prefill, retention, 1)[1][0].isfinite().all())
        rows.append(
            measured(
                f"{name}, {LENGTH} tokens: {method.name}, plain path",
                scaled(seconds, 1e3), "ms/token",
                "", "all logits finite" if finite else "NOT FINITE",
            )
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=__doc__)
    parser.add_argument("--model", default=dkv.models.DEFAULT_MODEL)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a few short trials")
    options = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = evaluations(options, Path(folder))
    name = "spread" if torch.cuda.is_available() else "spread-dry"
    publish(name, where, rows)
    if torch.cuda.device_count() > 1:
        rows += spread_model(options)
        publish(name, where, rows)
        publish(name, where, rows + beyond_one(options))


if __name__ == "__main__":
    main()
