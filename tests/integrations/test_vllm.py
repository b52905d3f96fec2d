"""The vLLM plugin keeps what the engine keeps, and vLLM stays vLLM. Runs where vLLM is installed
(make vllm)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM pins its own torch; run make vllm")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.engine.llm_engine import LLMEngine

import dynamickv as dkv
from dynamickv.integrations import vllm as plugin
from dynamickv.integrations.vllm.options import method_of

LAYERS, BLOCK, WINDOW = 6, 32, 8
GREEDY = {"temperature": 0, "detokenize": False, "ignore_eos": True}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with random weights: grouped queries, six layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return str(folder)


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def started(folder: str, options: dict[str, Any] | None, **named: Any) -> Iterator[LLMEngine]:
    """vLLM with the plugin, or without where there are no options."""
    transfer = options and KVTransferConfig(
        kv_connector=plugin.CONNECTOR, kv_role="kv_both", kv_connector_extra_config=dict(options)
    )
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        max_num_batched_tokens=256,
        kv_transfer_config=transfer,
        **{"max_model_len": 2048, "enable_prefix_caching": False, **named},
    )
    try:
        yield llm.llm_engine
    finally:
        llm.llm_engine.engine_core.shutdown()


def scheduler_of(engine: LLMEngine) -> Any:
    return engine.engine_core.engine_core.scheduler


def add(engine: LLMEngine, name: str, prompt: Sequence[int], tokens: int) -> None:
    sampling = SamplingParams(max_tokens=tokens, **GREEDY)
    engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)


def run(engine: LLMEngine) -> dict[str, Any]:
    """Step until nothing is left; the finished outputs by request."""
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return finished


def answers(engine: LLMEngine, prompts: dict[str, Sequence[int]], tokens: int) -> dict[str, Any]:
    for name, prompt in prompts.items():
        add(engine, name, prompt, tokens)
    return {name: tuple(o.outputs[0].token_ids) for name, o in run(engine).items()}


# First of all: an engine without the plugin must be started before the plugin is registered.
@pytest.fixture(scope="module")
def plain_answers(folder: str) -> dict[str, Any]:
    assert os.environ.get("VLLM_PLUGINS") == "dynamickv", "run make vllm, which sets VLLM_PLUGINS"
    os.environ["VLLM_PLUGINS"] = "none"
    with started(folder, None) as engine:
        tokens = answers(engine, PROMPTS, 24)
    os.environ["VLLM_PLUGINS"] = "dynamickv"
    plugin.register()
    return tokens


PROMPTS = {name: prompt_of(length, length) for name, length in (("a", 300), ("b", 90), ("c", 611))}


def test_a_capacity_above_the_prompt_gives_plain_vllms_tokens(folder, plain_answers):
    with started(folder, {"capacity": 700}) as engine:
        assert answers(engine, PROMPTS, 24) == plain_answers


def recorded(folder: str, prompt: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every layer's post-RoPE queries and keys in transformers, through plain hooks."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    queries: list[torch.Tensor] = []

    def record(module, arguments, named, output):
        states = module.q_proj(named["hidden_states"]).view(1, len(prompt), -1, 32).transpose(1, 2)
        queries.append(apply_rotary_pos_emb(states, states, *named["position_embeddings"])[0])

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(record, with_kwargs=True)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([prompt]), past_key_values=cache)
    return queries, [layer.keys for layer in cache.layers]


def held_positions(keys: list[torch.Tensor]) -> list[torch.Tensor]:
    """Which of the engine's keys lie in vLLM's blocks, (heads, kept) per layer, in their order."""
    worker = get_kv_transfer_group().worker
    (request,) = worker._requests.values()
    found = []
    for layer, pages in enumerate(worker._pages):
        kept = request.kept[layer] * BLOCK + request.plan.prompt_length - request.plan.tail_start
        held = pages.keys(request.blocks[layer][: request.held_blocks(layer)].long(), kept)
        distances = torch.cdist(
            held, keys[layer][0], compute_mode="donot_use_mm_for_euclid_dist"
        )
        assert distances.amin(dim=2).max() < 1e-3, "a key that the prompt does not have"
        found.append(distances.argmin(dim=2))
    return found


METHODS = (
    dkv.SnapKV(capacity=100),
    dkv.PyramidKV(capacity=120),
    dkv.DynamicKV(capacity=100, r_max=3.0, update_interval=4),
    dkv.DynamicKV(capacity=72, kernel_size=5, pooling="avg", progressive=False),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.capacity}")
def test_blocks_hold_what_the_engine_selects_at_the_rounded_budgets(folder, plain_answers, method):
    """The prompt ends so that the observation window begins a block: then the engine's own Manual
    method, given the rounded budgets, must choose the same."""
    prompt = prompt_of(20 * BLOCK + WINDOW, 5)
    queries, keys = recorded(folder, prompt)
    budgets = dkv.retain(method, queries, keys).budgets
    rounded = [-(-(budget - WINDOW) // BLOCK) * BLOCK + WINDOW for budget in budgets]
    manual = dkv.Manual(
        budgets=rounded, kernel_size=method.kernel_size, pooling=method.pooling
    )
    expected = dkv.retain(manual, queries, keys).indices
    with started(folder, {"method": method.name, **method.parameters}) as engine:
        add(engine, "only", prompt, 4)
        while not engine.step():
            pass
        held = held_positions(keys)
        engine.abort_request(["only"])
    assert [kept.shape[1] for kept in held] == rounded
    assert len(set(rounded)) > 1 or method.name == "SnapKV"
    for got, wanted in zip(held, expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_prompt_read_in_chunks_keeps_whole_blocks_of_streaming_llm(folder, plain_answers):
    """Nothing to score: sinks, then the latest tokens up to the block boundary."""
    prompt = prompt_of(413, 9)
    _, keys = recorded(folder, prompt)
    with started(folder, {"method": "StreamingLLM", "capacity": 70}) as engine:
        add(engine, "only", prompt, 4)
        while not engine.step():
            pass
        held = held_positions(keys)
        engine.abort_request(["only"])
    expected = [*range(4), *range(12 * BLOCK - 60, 413)]
    for kept in held:
        assert kept.tolist() == [expected, expected]


DYNAMIC = {"method": "DynamicKV", "capacity": 72, "r_max": 3.0}


def test_preempted_requests_among_others_answer_as_alone(folder, plain_answers):
    """Chunked prefill, four prompts at once, and too few blocks for all four answers."""
    prompts = {str(seed): prompt_of(180 + 19 * seed, seed) for seed in range(4)}
    with started(folder, DYNAMIC, max_model_len=400, num_gpu_blocks_override=18 * LAYERS) as engine:
        alone = {}
        for name, prompt in prompts.items():
            alone |= answers(engine, {name: prompt}, 140)
        preempted: set[str] = set()
        for name, prompt in prompts.items():
            add(engine, name, prompt, 140)
        together = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    together[output.request_id] = tuple(output.outputs[0].token_ids)
            requests = scheduler_of(engine).requests.values()
            preempted |= {r.request_id for r in requests if r.num_preemptions}
    assert preempted, "no request was preempted; lower num_gpu_blocks_override"
    assert together == alone


def test_every_block_comes_back_after_two_hundred_requests_and_aborts(folder, plain_answers):
    random.seed(1)
    with started(folder, DYNAMIC, max_model_len=900, num_gpu_blocks_override=40 * LAYERS) as engine:
        pool = scheduler_of(engine).kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        names = [str(number) for number in range(200)]
        waiting = list(names)
        running: set[str] = set()
        least = free
        while waiting or engine.has_unfinished_requests():
            while waiting and len(running) < 16:
                running.add(name := waiting.pop())
                add(engine, name, prompt_of(random.randint(1, 500), int(name)), 12)
            if running and random.random() < 0.2:
                aborted = random.choice(sorted(running))
                engine.abort_request([aborted])
                running.discard(aborted)
            for output in engine.step():
                if output.finished:
                    running.discard(output.request_id)
            least = min(least, pool.get_num_free_blocks())
        answers(engine, {"last": prompt_of(5, 5)}, 2)
        assert least < free / 4
        assert pool.get_num_free_blocks() == free
        assert not get_kv_transfer_group().worker._requests
        assert not any(get_kv_transfer_group().worker._by_block)
        connector = scheduler_of(engine).connector
        assert not connector._prompts
        assert not connector._kept
        assert not any(manager._gaps for manager in connector._managers())


def test_layers_give_back_what_their_own_budget_does_not_need(folder, plain_answers):
    prompt = prompt_of(20 * BLOCK, 11)
    with started(folder, DYNAMIC) as engine:
        pool = scheduler_of(engine).kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        add(engine, "only", prompt, 8)
        while not engine.step():
            pass
        used = free - pool.get_num_free_blocks()
        output = run(engine)["only"]
    told = output.kv_transfer_params["dynamickv"]
    assert told["prompt_tokens"] == len(prompt)
    assert len(set(told["kept_tokens"])) > 1
    assert used == sum(-(-kept // BLOCK) for kept in told["kept_tokens"])


def config(**named: Any) -> Any:
    """As much of a VllmConfig as the plugin reads."""
    options = {"capacity": 64, **named.pop("options", {})}
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_dbo": False,
    }
    cache = {"enable_prefix_caching": False, "cache_dtype": "auto"}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector=named.pop("connector", plugin.CONNECTOR),
            kv_connector_extra_config=options,
        ),
        speculative_config=named.pop("speculative_config", None),
        scheduler_config=SimpleNamespace(async_scheduling=named.pop("async_scheduling", False)),
        parallel_config=SimpleNamespace(**{k: named.pop(k, v) for k, v in parallel.items()}),
        cache_config=SimpleNamespace(**{k: named.pop(k, v) for k, v in cache.items()}),
    )


def test_options_are_the_methods_own():
    options = {"capacity": 256, "r_max": 4.0, "window_size": 16, "update_interval": 2}
    assert method_of(config(options=options)) == dkv.DynamicKV(**options)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"enable_prefix_caching": True}, "does not work with prefix caching; use --no-enable-p"),
        ({"speculative_config": object()}, "does not work with speculative decoding"),
        ({"tensor_parallel_size": 2}, "does not work with tensor parallelism"),
        ({"pipeline_parallel_size": 2}, "does not work with pipeline parallelism"),
        ({"decode_context_parallel_size": 2}, "does not work with context parallelism"),
        ({"async_scheduling": True}, "does not work with asynchronous scheduling"),
        ({"cache_dtype": "fp8"}, "does not work with a quantized KV cache"),
        ({"connector": "NixlConnector"}, "needs --kv-transfer-config"),
        ({"options": {"method": "H2O"}}, "needs the attention of all queries"),
        ({"options": {"method": "Best"}}, "there is no method 'Best'"),
        ({"options": {"budget": 3}}, "DynamicKV has no option 'budget'"),
        ({"options": {"capacity": 8}}, "capacity must exceed window_size=8 tokens, got 8"),
        ({"options": {"granularity": "query_head"}}, "granularity must be 'kv_head' in vLLM"),
        ({"options": {"head_budgets": "adaptive"}}, "head_budgets must be 'uniform' in vLLM"),
    ],
)
def test_what_cannot_be_compressed_is_refused_in_one_sentence(named, sentence):
    with pytest.raises(ValueError, match=sentence):
        method_of(config(**named))


def test_vllm_refuses_to_start_with_prefix_caching(folder, plain_answers):
    refused = pytest.raises(ValueError, match="does not work with prefix caching")
    with refused, started(folder, {"capacity": 64}, enable_prefix_caching=True):
        pass


def test_another_version_of_vllm_is_refused(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.1+cpu")
    with pytest.raises(ValueError, match=r"tested with vLLM 0\.32\.0 and this is 0\.33\.1"):
        plugin.register()


def test_nothing_happens_unless_vllm_is_told_to_load_the_plugin(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    for value in ("", "other", None):
        if value is None:
            monkeypatch.delenv("VLLM_PLUGINS")
        else:
            monkeypatch.setenv("VLLM_PLUGINS", value)
        plugin.register()


def test_the_entry_point_is_announced():
    entries = metadata.entry_points(group="vllm.general_plugins")
    assert entries["dynamickv"].load() is plugin.register
