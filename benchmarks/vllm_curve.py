"""Requests per second and latency over the size of the KV pool: vLLM as servers run it, vLLM with
the plugin's settings, and the plugin. Says where the one overtakes the other.

python -m benchmarks.vllm_curve MODEL_FOLDER [--rounds 2] [--requests 8] [--pools 12 8 5 3 2]

Every round is its own set of documents, each asked several questions, by as many clients at once
as `CLIENTS`; a client sends its next question when it has its answer. The engines of one pool size
run at the same time and take their rounds in turn, after a few requests that do not count. About
seventeen minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import vllm

from benchmarks.report import Row, machine, measured, publish, ratios
from benchmarks.vllm import Child, text_ids

CAPACITY, R_MAX = 128, 4.0
DOCUMENT, QUESTION, ANSWER = 1000, 24, 96
QUESTIONS = 2
"""Asked of every document."""
CLIENTS = 8
POOLS = (12.0, 8.0, 5.0, 3.0, 2.0)
"""Whole requests, prompt and answer, that the pool has room for. In less a prompt and its copy take
nearly all of it."""
WARM_UP = 2
"""Requests."""
BLOCK = 32
SETTINGS = {
    "dtype": "bfloat16",
    "max_model_len": DOCUMENT + QUESTION + ANSWER + BLOCK,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": True,
}
SERVED, FLAGS, PLUGIN = "FullKV as servers run it", "FullKV with the plugin", "DynamicKV"
EIGHT_BIT = "FullKV, KV cache in FP8"
"""In the scarcest pool only: twice the tokens in the same bytes."""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--pools", type=float, nargs="+", default=POOLS)
    asked = parser.parse_args()
    where, rows, gains = machine(), [], {}
    for pool in asked.pools:
        found = one_pool(asked.folder, pool, asked.rounds, asked.requests)
        rows += rows_of(pool, found)
        gains[pool] = min(ratios(found[PLUGIN]["rate"], found[SERVED]["rate"]))
    publish("vllm-curve", where, [*rows, crossover(gains)])


def one_pool(folder: str, pool: float, rounds: int, requests: int) -> dict[str, dict[str, Any]]:
    """Rates, latencies and more of the engines, by name, a value per round."""
    layers = layers_of(folder)
    whole = pool * -(-(DOCUMENT + QUESTION + ANSWER) // BLOCK)
    choices: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
        # Blocks as vLLM chooses them on a CPU, of all layers.
        SERVED: (
            None,
            {"block_size": 128, "num_gpu_blocks_override": int(whole * BLOCK / 128) + 1},
        ),
        FLAGS: ({"method": "FullKV"}, {"num_gpu_blocks_override": int(whole * layers) + 1}),
        PLUGIN: (
            {"capacity": CAPACITY, "r_max": R_MAX},
            {"num_gpu_blocks_override": int(whole * layers) + 1},
        ),
    }
    if pool == min(POOLS):
        blocks = int(2 * whole * BLOCK / 128) + 1
        choices[EIGHT_BIT] = (
            None,
            {"block_size": 128, "num_gpu_blocks_override": blocks, "kv_cache_dtype": "fp8"},
        )
    children = {
        name: Child(
            "serve",
            options is not None,
            {"folder": folder, "options": options, "settings": {**SETTINGS, **settings}},
        )
        for name, (options, settings) in choices.items()
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in children}
    for number in range(rounds + 1):
        prompts = questions(folder, number, requests if number else WARM_UP)
        for name, child in children.items():
            child.ask({"prompts": prompts, "tokens": ANSWER, "clients": CLIENTS})
            said = child.answer()
            if number:
                for what, value in said.items():
                    found[name].setdefault(what, []).append(value)
    for child in children.values():
        child.close()
    return found


def layers_of(folder: str) -> int:
    """Layers of a checkpoint."""
    from transformers import AutoConfig

    layers: int = AutoConfig.from_pretrained(folder).num_hidden_layers
    return layers


def questions(folder: str, number: int, requests: int) -> list[list[int]]:
    """A round's prompts: documents asked in turn, so that one's questions are apart."""
    documents = -(-requests // QUESTIONS)
    prompts = []
    for request in range(requests):
        document, question = request % documents, request // documents
        start = 977 * (number * documents + document)
        prompts.append(
            [
                *text_ids(folder, DOCUMENT, start),
                *text_ids(folder, QUESTION, 31 * (request + 1) + 53 * question),
            ]
        )
    return prompts


def rows_of(pool: float, found: dict[str, dict[str, Any]]) -> list[Row]:
    """The table's lines of one pool size."""
    where = f"pool of {pool:g} whole requests"
    rows = []
    for name, one in found.items():
        note = (
            f"{statistics.median(one['most']):.0f} answered at once, "
            f"{statistics.median(one['cached']):.0f} % of prompt tokens cached, "
            f"{one['mib'][0]:.0f} MiB"
        )
        rows.append(measured(f"{where}: {name}", one["rate"], "requests/s", "", note))
        rows.append(measured(f"{where}: {name}, mean latency", one["latency"], "s"))
    target = {max(POOLS): ">= 0.9", min(POOLS): ">= 1.5"}.get(pool, "")
    gain = ratios(found[PLUGIN]["rate"], found[SERVED]["rate"])
    rows.append(measured(f"{where}: {PLUGIN} / {SERVED}", gain, "x", target))
    return rows


def crossover(gains: dict[float, float]) -> Row:
    """The largest pool at which the plugin serves more requests than vLLM as servers run it.

    Args:
        gains: pool -> the least of the rounds' ratios.
    """
    better = [pool for pool, gain in gains.items() if gain > 1]
    note = (
        f"vLLM {vllm.__version__}; prompts of {DOCUMENT + QUESTION} tokens, {QUESTIONS} questions "
        f"per document, answers of {ANSWER}, {CLIENTS} clients, DynamicKV({CAPACITY}), bfloat16; "
        "0: at none"
    )
    return Row(
        "largest measured pool at which DynamicKV serves more in every round",
        max(better, default=0.0),
        "whole requests",
        "",
        note,
    )


if __name__ == "__main__":
    main()
