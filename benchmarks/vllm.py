"""The plugin inside vLLM against vLLM without it. Runs in vLLM's environment.

python -m benchmarks.vllm MODEL_FOLDER   (make vllm passes the embedded model's)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import vllm
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import dynamickv as dkv
from benchmarks import vllm_run as engines
from benchmarks.prompts import example_text
from benchmarks.report import Row, machine, measured, publish, ratios

CAPACITY, WINDOW, BLOCK = 128, 8, engines.BLOCK
BATCH, PROMPT, STEPS, ROUNDS = 8, 4096, 8, 5
LONG, SPACE, CEILING = 8000, 4, 1024
METHODS = (
    dkv.SnapKV(capacity=CAPACITY),
    dkv.PyramidKV(capacity=CAPACITY),
    dkv.DynamicKV(capacity=CAPACITY, r_max=4.0),
)


def main() -> None:
    """Measure, print a table, write JSON."""
    folder, where = sys.argv[1], machine()
    rows = [*same_tokens(folder), *same_positions(folder), *throughput(folder)]
    rows += second_turn(folder)
    with tempfile.TemporaryDirectory() as tiny:
        engines.write_tiny_model(tiny)
        rows += [*same_with_prefix_caching(tiny), *same_on_two_ranks(tiny)]
        rows += [*concurrency(tiny), *together(tiny), *blocks_returned(tiny)]
    publish("vllm", where, rows)


def text_ids(folder: str, length: int, start: int = 0) -> list[int]:
    """Token ids of the example texts, from a place on, repeated as needed."""
    ids = _example_ids(folder)
    while len(ids) < start + length:
        ids = [*ids, *ids]
    return ids[start : start + length]


@cache
def _example_ids(folder: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(example_text())["input_ids"]
    return ids


class Child:
    """Another process with an engine of its own."""

    def __init__(
        self, action: str, plugin: bool, arguments: dict[str, Any], **environment: str
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm_run", action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "VLLM_PLUGINS": "dynamickv" if plugin else "none",
                **environment,
            },
        )
        self.ask(arguments)

    def ask(self, value: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The next value that it says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("JSON "):
                return json.loads(line[5:])
        raise SystemExit("vLLM stopped early; its messages are above")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)


def pair(action: str, options: dict[str, Any], arguments: dict[str, Any]) -> list[Child]:
    """vLLM without and with the plugin."""
    return [
        Child(action, plugin, {**arguments, "options": options if plugin else None})
        for plugin in (False, True)
    ]


def same_tokens(folder: str) -> list[Row]:
    """A capacity above the prompts: nothing may change."""
    prompts = [text_ids(folder, length, 500 * length) for length in (1000, 700, 300, 60)]
    arguments = {"folder": folder, "prompts": prompts, "tokens": 48, "settings": {}}
    found = []
    for child in pair("tokens", {"capacity": 1024}, arguments):
        found.append(child.answer())
        child.close()
    plain, plugin = ([token for name in sorted(run) for token in run[name]] for run in found)
    equal = sum(a == b for a, b in zip(plain, plugin, strict=True))
    return [
        Row(
            "capacity >= prompt: tokens equal to vLLM without the plugin",
            100 * equal / len(plain),
            "%",
            "100",
            f"{equal} of {len(plain)}; vLLM {vllm.__version__}",
        )
    ]


def recorded(folder: str, prompt: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every layer's post-RoPE queries and keys in transformers, through plain hooks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    queries: list[torch.Tensor] = []

    def record(module: Any, arguments: Any, named: Any, output: Any) -> None:
        states = module.q_proj(named["hidden_states"])
        states = states.view(1, len(prompt), -1, module.head_dim).transpose(1, 2)
        queries.append(apply_rotary_pos_emb(states, states, *named["position_embeddings"])[0])

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(record, with_kwargs=True)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
    return queries, [layer.keys for layer in cache.layers]


def at_whole_blocks(
    method: dkv.ScoredMethod, queries: list[torch.Tensor], keys: list[torch.Tensor]
) -> dkv.Manual:
    """The engine's own Manual method at a method's budgets in whole blocks. For a prompt whose
    observation window begins a block it must keep what lies in vLLM's blocks."""
    budgets = dkv.retain(method, queries, keys).budgets
    rounded = [-(-(b - method.window_size) // BLOCK) * BLOCK + method.window_size for b in budgets]
    return dkv.Manual(budgets=rounded, kernel_size=method.kernel_size, pooling=method.pooling)


def engine_answers(
    folder: str, method: dkv.CompressionMethod, turns: Sequence[list[int]]
) -> list[list[int]]:
    """The engine's serve mode on a conversation: to each turn as many tokens as `read_prompt` asks
    for, every turn going on from the cache of the one before."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    said: list[int] = []
    found = []
    with dkv.compress(model, method) as cache:
        for turn in turns:
            said += turn
            ids = torch.tensor([said])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                do_sample=False,
                max_new_tokens=engines.ANSWER,
            )
            found.append(output[0, len(said) :].tolist())
            said += found[-1]
    return found


def same_positions(folder: str) -> list[Row]:
    """What lies in vLLM's blocks, and what it answers from them, against the engine."""
    prompt = text_ids(folder, 32 * BLOCK + WINDOW, 700)
    queries, keys = recorded(folder, prompt)
    equal = total = 0
    tokens: list[bool] = []
    for method in METHODS:
        options = {"method": method.name, **method.parameters}
        with engines.started(folder, options) as engine:
            engines.read_prompt(engine, prompt)
            held = engines.held_positions([key[0] for key in keys])
            answer = list(engines.finish(engine)["only"].outputs[0].token_ids)
        rounded = at_whole_blocks(method, queries, keys)
        for got, wanted in zip(held, dkv.retain(rounded, queries, keys).indices, strict=True):
            total += len(wanted)
            equal += sum(map(torch.equal, got, wanted)) if got.shape == wanted.shape else 0
        (expected,) = engine_answers(folder, rounded, [prompt])
        tokens += [a == b for a, b in zip(answer, expected, strict=True)]
    note = "SnapKV, PyramidKV and DynamicKV, float32"
    return [
        Row(
            "kept positions equal to the engine's at the block-rounded budgets",
            100 * equal / total,
            "%",
            "100",
            f"{equal} of {total} layers x heads; {note}",
        ),
        Row(
            "answer tokens equal to the engine's from the same positions",
            100 * sum(tokens) / len(tokens),
            "%",
            "",
            f"{sum(tokens)} of {len(tokens)}; {note}",
        ),
    ]


def same_with_prefix_caching(folder: str) -> list[Row]:
    """Prompts that share their beginnings, with prefix caching off and on."""
    options = {"capacity": 72, "r_max": 3.0}
    (off, on), cached, _ = engines.with_and_without_prefix_caching(folder, options)
    equal = sum(off[name] == on[name] for name in off)
    return [
        Row(
            "of 50 prompts that share beginnings, answered alike with prefix caching off and on",
            equal,
            "requests",
            "50",
            f"float32; the beginnings of {cached[1]} were cached",
        )
    ]


def same_on_two_ranks(folder: str) -> list[Row]:
    """What two ranks keep and answer, against one."""
    prompt = engines.random_prompt(20 * BLOCK + 3, 5)
    equal = total = tokens = 0
    for method in (dkv.SnapKV(capacity=100), dkv.DynamicKV(capacity=100, r_max=3.0), *OTHERS):
        one, two = on_ranks(folder, method, prompt)
        for ours, theirs in zip(one["positions"], two["positions"], strict=True):
            total += len(ours)
            equal += sum(a == b for a, b in zip(ours, theirs, strict=True))
        tokens += one["answer"] == two["answer"]
    return [
        Row(
            "two ranks: kept positions equal to one rank's",
            100 * equal / total,
            "%",
            "100",
            f"{equal} of {total} layers x heads; SnapKV, DynamicKV, CAKE and KeyDiff, float32",
        ),
        Row("two ranks: of 4 answers, equal to one rank's", tokens, "answers", "4"),
    ]


OTHERS = (dkv.CAKE(capacity=100), dkv.KeyDiff(capacity=100))


def on_ranks(
    folder: str, method: dkv.CompressionMethod, prompt: list[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One rank, then two on a core each: positions kept, (layers, heads, kept), and the answer."""
    _, keys = recorded(folder, prompt)
    found = []
    with tempfile.TemporaryDirectory() as keep:
        file = f"{keep}/keys.safetensors"
        save_file({str(layer): key[0].contiguous() for layer, key in enumerate(keys)}, file)
        for count in (1, 2):
            arguments = {
                "folder": folder,
                "prompt": prompt,
                "keys": file,
                "options": {"method": method.name, **method.parameters},
                "settings": {"tensor_parallel_size": count},
            }
            bind = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if count == 2 else {}
            child = Child("kept", True, arguments, **bind)
            said = child.answer()
            child.close()
            layers = zip(*said["ranks"], strict=True)
            positions = [[head for rank in layer for head in rank] for layer in layers]
            found.append({"positions": positions, "answer": said["answer"]})
    return found[0], found[1]


def second_turn(folder: str) -> list[Row]:
    """Time to the first token of a conversation's second turn: on its chain, with the prefix cache
    alone, and read anew."""
    seconds: list[list[float]] = [[], [], []]
    settings = {
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": True,
    }
    with engines.started(folder, {"capacity": CAPACITY}, **settings) as engine:
        for number in range(ROUNDS + 1):
            prompt = text_ids(folder, PROMPT, 371 * number)
            answer, _ = engines.ask(engine, prompt, 16)
            turn = [*prompt, *answer, *text_ids(folder, 32, 7000 + 41 * number)]
            for salt, found in zip((None, None, str(number)), seconds, strict=True):
                taken = engines.first_token(engine, turn, salt)
                if number:
                    found.append(taken)
    chain, cached, anew = seconds
    what = "second turn, first token"
    return [
        measured(f"{what}: on its chain", chain, "s", "", "4K tokens before it, bfloat16"),
        measured(f"{what}: read anew", anew, "s"),
        measured(f"{what}: on its chain / read anew", ratios(chain, anew), "x", "<= 0.25"),
        measured(f"{what}: the prefix cache alone / read anew", ratios(cached, anew), "x"),
    ]


def throughput(folder: str) -> list[Row]:
    """Decode steps of both, in turn; all prompts are read before."""
    arguments = {
        "folder": folder,
        "prompts": [text_ids(folder, PROMPT, 371 * number) for number in range(BATCH)],
        "tokens": STEPS * (ROUNDS + 1) + 120,
        "settings": {
            "dtype": "bfloat16",
            "max_model_len": 8192,
            "max_num_batched_tokens": 4096,
        },
    }
    children = pair("decode", {"capacity": CAPACITY}, arguments)
    for child in children:
        child.answer()
    seconds: list[list[float]] = [[], []]
    for round_number in range(ROUNDS + 1):
        for child, found in zip(children, seconds, strict=True):
            child.ask(STEPS)
            taken = child.answer()
            if round_number:
                found.append(taken)
    for child in children:
        child.close()
    plain, plugin = ([BATCH * STEPS / one for one in found] for found in seconds)
    where = f"4K prompts, batch {BATCH}, bfloat16, threads: {torch.get_num_threads()}"
    return [
        measured("decode, vLLM without the plugin", plain, "tokens/s", "", where),
        measured(f"decode, DynamicKV({CAPACITY})", plugin, "tokens/s", "", where),
        measured(
            f"decode, DynamicKV({CAPACITY}) / vLLM without the plugin",
            ratios(plugin, plain),
            "x",
            ">= 1.5",
            f"median of {ROUNDS} rounds taken in turn",
        ),
    ]


def concurrency(folder: str) -> list[Row]:
    """How many long prompts are answered at once in the room of a few whole ones."""
    tokens, layers = 48, 6
    whole = -(-(LONG + tokens) // BLOCK)
    arguments = {"folder": folder, "count": 32, "length": LONG, "tokens": tokens}
    options = {"capacity": 256, "r_max": (CEILING - WINDOW) / (256 - WINDOW)}
    children = [
        Child(
            "at_once",
            plugin,
            {
                **arguments,
                "count": 32 if plugin else 2 * SPACE,
                "options": options if plugin else None,
                "settings": {
                    # The same bytes: without the plugin a block is one of all layers.
                    "num_gpu_blocks_override": SPACE * whole * (layers if plugin else 1) + 1,
                    "max_model_len": LONG + tokens,
                    "max_num_batched_tokens": 8192,
                },
            },
        )
        for plugin in (False, True)
    ]
    full, found = [child.answer() for child in children]
    for child in children:
        child.close()
    ceiling = (CEILING // BLOCK + 3) * layers
    note = (
        f"{found['requests']:.0f} and {full['requests']:.0f} of {LONG} tokens, capacity 256; "
        "32 were sent"
    )
    return [
        Row(
            "concurrent requests in the same KV space / vLLM without the plugin",
            found["requests"] / full["requests"],
            "x",
            ">= 4",
            note,
        ),
        Row("blocks a compressed request holds, each layer its own", found["blocks"], "blocks"),
        Row(
            f"blocks it would hold with one ceiling of {CEILING} tokens per layer",
            ceiling,
            "blocks",
            "",
            f"6 layers; without the plugin: {whole * layers}",
        ),
    ]


def together(folder: str) -> list[Row]:
    """Four prompts at once, with preemption, against each alone."""
    options = {"capacity": 72, "r_max": 3.0}
    named = {"max_model_len": 400, "num_gpu_blocks_override": 18 * 6}
    with engines.started(folder, options, **named) as engine:
        equal, preempted = engines.alone_and_together(engine, 140)
    note = f"chunked prefill; {preempted} of them preempted"
    measure = "of 4 concurrent requests, answered as alone"
    return [Row(measure, sum(equal), "requests", "4", note)]


def blocks_returned(folder: str) -> list[Row]:
    """Blocks missing after many requests."""
    options = {"capacity": 72, "r_max": 3.0}
    named = {
        "max_model_len": 900,
        "num_gpu_blocks_override": 40 * 6,
        "enable_prefix_caching": True,
    }
    with engines.started(folder, options, **named) as engine:
        found = engines.mixed_requests(engine, 500)
    note = (
        f"{found['aborted']} aborted, {found['preempted']} preempted, {found['continued']} went on "
        f"from a chain, {found['cached']} found their beginning cached; "
        f"{found['before'] - found['least']} blocks in use at most"
    )
    missing = found["before"] - found["after"]
    return [Row("blocks not returned after 500 mixed requests", missing, "blocks", "0", note)]


if __name__ == "__main__":
    main()
