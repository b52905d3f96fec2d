"""One vLLM engine in one process: what the vLLM benchmark and the plugin's tests run. Needs vLLM's
environment (make vllm).

python -m benchmarks.vllm_run decode|tokens|at_once|kept|serve

reads its arguments as one line of JSON and answers in lines that begin with JSON.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.engine.llm_engine import LLMEngine

from dynamickv.integrations.vllm import CONNECTOR

BLOCK = 32
ANSWER = 24
"""Tokens that `read_prompt` asks for."""


def write_tiny_model(folder: str, num_layers: int = 6) -> None:
    """A Llama checkpoint with random weights and grouped queries; fast, and as strict as any about
    which key lies where."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=16384,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids below 512."""
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def started(folder: str, options: Mapping[str, Any] | None, **named: Any) -> Iterator[LLMEngine]:
    """vLLM with the plugin, or without it where there are no options; stopped at the end."""
    transfer = options and KVTransferConfig(
        kv_connector=CONNECTOR, kv_role="kv_both", kv_connector_extra_config=dict(options)
    )
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 256,
        "max_model_len": 2048,
        **named,
    }
    llm = LLM(folder, skip_tokenizer_init=True, kv_transfer_config=transfer, **settings)
    try:
        yield llm.llm_engine
    finally:
        llm.llm_engine.engine_core.shutdown()


def scheduler_of(engine: LLMEngine) -> Any:
    """The scheduler, which runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
    return engine.engine_core.engine_core.scheduler


def add(
    engine: LLMEngine, name: str, prompt: Sequence[int], tokens: int, salt: str | None = None
) -> None:
    """Queue a prompt that gets a greedy answer of exactly `tokens` tokens; with a salt of its own
    it shares nothing with others."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
    salted = {} if salt is None else {"cache_salt": salt}
    engine.add_request(name, {"prompt_token_ids": list(prompt), **salted}, sampling)


def read_prompt(engine: LLMEngine, prompt: Sequence[int], tokens: int = ANSWER) -> None:
    """Queue a prompt as the only request and step until its first token is there."""
    add(engine, "only", prompt, tokens)
    while not engine.step():
        pass


def ask(engine: LLMEngine, prompt: Sequence[int], tokens: int) -> tuple[list[int], dict[str, Any]]:
    """A prompt alone; its answer, and what the response tells of it."""
    add(engine, "asked", prompt, tokens)
    output = finish(engine)["asked"]
    return list(output.outputs[0].token_ids), output.kv_transfer_params["dynamickv"]


def first_token(engine: LLMEngine, prompt: Sequence[int], salt: str | None = None) -> float:
    """Seconds until a prompt alone has its first token."""
    begin = time.perf_counter()
    add(engine, "timed", prompt, 1, salt)
    while not engine.step():
        pass
    return time.perf_counter() - begin


def finish(engine: LLMEngine) -> dict[str, Any]:
    """Step until nothing is left; the finished outputs by request."""
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return finished


def answers(
    engine: LLMEngine, prompts: Mapping[str, Sequence[int]], tokens: int
) -> dict[str, list[int]]:
    """Answers to prompts that run together."""
    for name, prompt in prompts.items():
        add(engine, name, prompt, tokens)
    return {name: list(o.outputs[0].token_ids) for name, o in finish(engine).items()}


def held_positions(keys: Sequence[Tensor]) -> list[Tensor]:
    """Which positions the blocks of the only request hold, (heads, kept) per layer in block order,
    found by comparing what is in them with `keys`, (heads, n, head_dim) per layer.

    Raises:
        ValueError: a block holds a key that the prompt does not have.
    """
    worker = get_kv_transfer_group().worker
    (request,) = worker._requests.values()
    plan, found = request.plan, []
    for layer, pages in enumerate(worker._pages):
        kept = request.kept[layer] * BLOCK + plan.prompt_length - plan.tail_start
        held = pages.keys(request.blocks[layer][: request.held_blocks(layer)].long(), kept)
        distances = torch.cdist(held, keys[layer], compute_mode="donot_use_mm_for_euclid_dist")
        if distances.amin(dim=2).max() > 1e-2:
            raise ValueError(f"layer {layer} holds a key that the prompt does not have")
        found.append(distances.argmin(dim=2))
    return found


def shared_prompts() -> dict[str, list[int]]:
    """50 prompts: ten ends for each of five beginnings."""
    return {
        f"{start}-{end}": [
            *random_prompt(150 + 67 * start, start),
            *random_prompt(5 + 9 * end, 10 * start + end),
        ]
        for start in range(5)
        for end in range(10)
    }


def with_and_without_prefix_caching(
    folder: str, options: Mapping[str, Any]
) -> tuple[list[dict[str, list[int]]], list[int], list[dict[str, Any]]]:
    """Answers to `shared_prompts` without and with prefix caching, how many of them found their
    beginning cached, and what the last responses told."""
    found, cached, told = [], [], []
    for caching in (False, True):
        with started(folder, options, enable_prefix_caching=caching) as engine:
            for name, prompt in shared_prompts().items():
                add(engine, name, prompt, 8)
            outputs = finish(engine)
        found.append({name: list(one.outputs[0].token_ids) for name, one in outputs.items()})
        cached.append(sum(one.num_cached_tokens > 0 for one in outputs.values()))
        told = [one.kv_transfer_params["dynamickv"] for one in outputs.values()]
    return found, cached, told


def alone_and_together(engine: LLMEngine, tokens: int) -> tuple[list[bool], int]:
    """Whether each of four prompts is answered together with the others as alone, and how many of
    them were preempted."""
    prompts = {str(seed): random_prompt(180 + 19 * seed, seed) for seed in range(4)}
    alone = {}
    for name, prompt in prompts.items():
        alone |= answers(engine, {name: prompt}, tokens)
    for name, prompt in prompts.items():
        add(engine, name, prompt, tokens)
    together: dict[str, list[int]] = {}
    preempted: set[str] = set()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                together[output.request_id] = list(output.outputs[0].token_ids)
        requests = scheduler_of(engine).requests.values()
        preempted |= {request.request_id for request in requests if request.num_preemptions}
    return [together[name] == alone[name] for name in prompts], len(preempted)


def mixed_requests(engine: LLMEngine, count: int) -> dict[str, int]:
    """Serve prompts of 1 to 500 tokens, some of them a next turn of what was answered before, some
    beginning as others do; abort some at any time. Free blocks before, at least, and after, and how
    many of each kind there were."""
    rng = random.Random(1)
    pool = scheduler_of(engine).kv_cache_manager.block_pool
    before = least = pool.get_num_free_blocks()
    waiting, running = [str(number) for number in range(count)], set()
    answered: list[list[int]] = []
    common = random_prompt(8 * BLOCK, 0)
    aborted = continued = cached = 0
    preempted: set[str] = set()
    while waiting or engine.has_unfinished_requests():
        # In quiet stretches chains outlive their requests, in busy ones nothing does.
        while waiting and len(running) < (16 if len(waiting) // 25 % 2 else 3):
            running.add(name := waiting.pop())
            prompt = random_prompt(rng.randint(1, 500), int(name))
            if answered and rng.random() < 0.3:
                prompt = [*answered.pop(), *prompt[:40]]
            elif rng.random() < 0.3:
                prompt = [*common, *prompt[:200]]
            add(engine, name, prompt, rng.choice((8, 60)))
        if running and rng.random() < 0.06:
            engine.abort_request([stopped := rng.choice(sorted(running))])
            running.discard(stopped)
            aborted += 1
        for output in engine.step():
            if output.finished:
                running.discard(output.request_id)
                answered.append([*output.prompt_token_ids, *output.outputs[0].token_ids])
                told = (output.kv_transfer_params or {}).get("dynamickv", {})
                continued += "continued_tokens" in told
                cached += "continued_tokens" not in told and output.num_cached_tokens > 0
        requests = scheduler_of(engine).requests.values()
        preempted |= {request.request_id for request in requests if request.num_preemptions}
        least = min(least, pool.get_num_free_blocks())
    # The workers hear of the last ones with the next step.
    answers(engine, {"last": random_prompt(5, 5)}, 2)
    return {
        "before": before,
        "least": least,
        "after": pool.get_num_free_blocks(),
        "aborted": aborted,
        "continued": continued,
        "cached": cached,
        "preempted": len(preempted),
    }


def most_at_once(engine: LLMEngine, count: int, length: int, tokens: int) -> dict[str, float]:
    """Most requests that had read their prompts and were being answered in one step, and the mean
    number of blocks they held then."""
    manager = scheduler_of(engine).kv_cache_manager
    for number in range(count):
        add(engine, str(number), random_prompt(length, number), tokens)
    most, blocks = 0, 0.0
    while engine.has_unfinished_requests():
        answering = [output for output in engine.step() if not output.finished]
        if len(answering) > most:
            most = len(answering)
            held = [
                sum(not block.is_null for group in groups for block in group)
                for groups in map(manager.coordinator.get_blocks, scheduler_of(engine).requests)
            ]
            blocks = sorted(held)[len(held) // 2]
    return {"requests": most, "blocks": blocks}


def decode(arguments: dict[str, Any]) -> None:
    """Read prompts, say "ready", then decode as many steps as each line asks for; seconds back."""
    with started(arguments["folder"], arguments["options"], **arguments["settings"]) as engine:
        for number, prompt in enumerate(arguments["prompts"]):
            add(engine, str(number), prompt, arguments["tokens"])
        while len(engine.step()) < len(arguments["prompts"]):
            pass
        _say("ready")
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                if len(engine.step()) < len(arguments["prompts"]):
                    raise SystemExit("a request ended too early; ask for more tokens")
            _say(time.perf_counter() - start)


def tokens(arguments: dict[str, Any]) -> None:
    """Answers to prompts that run together."""
    with started(arguments["folder"], arguments["options"], **arguments["settings"]) as engine:
        prompts = {str(number): prompt for number, prompt in enumerate(arguments["prompts"])}
        _say(answers(engine, prompts, arguments["tokens"]))


def at_once(arguments: dict[str, Any]) -> None:
    """How many long prompts are answered at once."""
    with started(arguments["folder"], arguments["options"], **arguments["settings"]) as engine:
        _say(most_at_once(engine, arguments["count"], arguments["length"], arguments["tokens"]))


def kept(arguments: dict[str, Any]) -> None:
    """Which positions every rank keeps of a prompt, and the answer from them."""
    with started(arguments["folder"], arguments["options"], **arguments["settings"]) as engine:
        read_prompt(engine, arguments["prompt"])
        ranks = engine.collective_rpc(rank_positions, args=(arguments["keys"],))
        answer = list(finish(engine)["only"].outputs[0].token_ids)
        _say({"ranks": ranks, "answer": answer})


def rank_positions(worker: Any, file: str) -> list[list[list[int]]]:
    """In a worker: `held_positions` of its heads; the file holds all heads' keys per layer."""
    group = get_tp_group()
    keys = load_file(file)
    own = [
        keys[str(layer)].chunk(group.world_size)[group.rank_in_group] for layer in range(len(keys))
    ]
    return [held.tolist() for held in held_positions(own)]


def serve(arguments: dict[str, Any]) -> None:
    """Rounds of prompts, each asked for by a line: what `served` says of them."""
    with started(arguments["folder"], arguments["options"], **arguments["settings"]) as engine:
        for line in sys.stdin:
            _say(served(engine, **json.loads(line)))


def served(
    engine: LLMEngine, prompts: Sequence[Sequence[int]], tokens: int, clients: int
) -> dict[str, float]:
    """Answer prompts that so many clients send, each its next one when it has its answer.

    Returns:
        Requests per second, mean and slowest latency, how many were answered at once, which share
        of the prompt tokens was cached, and the pool's MiB.
    """
    waiting = list(enumerate(prompts))[::-1]
    sent: dict[str, float] = {}
    latencies: list[float] = []
    most = cached = 0
    begin = time.perf_counter()
    while waiting or sent:
        while waiting and len(sent) < clients:
            number, prompt = waiting.pop()
            sent[str(number)] = time.perf_counter()
            add(engine, str(number), prompt, tokens)
        outputs = engine.step()
        most = max(most, len(outputs))
        for output in outputs:
            if output.finished:
                latencies.append(time.perf_counter() - sent.pop(output.request_id))
                cached += output.num_cached_tokens
    seconds = time.perf_counter() - begin
    return {
        "rate": len(prompts) / seconds,
        "latency": sum(latencies) / len(latencies),
        "slowest": max(latencies),
        "most": most,
        "cached": 100 * cached / sum(map(len, prompts)),
        "mib": pool_bytes(engine) / 2**20,
    }


def pool_bytes(engine: LLMEngine) -> int:
    """Bytes of the KV pool: one allocation, in which all layers lie."""
    config = scheduler_of(engine).kv_cache_manager.kv_cache_config
    (size,) = {tensor.size for tensor in config.kv_cache_tensors}
    return size


def _say(value: Any) -> None:
    print(f"\nJSON {json.dumps(value)}", flush=True)


if __name__ == "__main__":
    actions = {action.__name__: action for action in (decode, tokens, at_once, kept, serve)}
    actions[sys.argv[1]](json.loads(sys.stdin.readline()))
