"""The vLLM plugin keeps what the engine keeps, and vLLM stays vLLM. Runs where vLLM is installed
(make vllm)."""

from __future__ import annotations

import logging
import os
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM pins its own torch; run make vllm")

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import MLAAttentionSpec

import dynamickv as dkv
from benchmarks.vllm import at_whole_blocks, engine_answers, on_ranks, recorded
from benchmarks.vllm_run import (
    ANSWER,
    BLOCK,
    add,
    alone_and_together,
    answers,
    ask,
    finish,
    held_positions,
    mixed_requests,
    random_prompt,
    read_prompt,
    scheduler_of,
    started,
    with_and_without_prefix_caching,
    write_tiny_model,
)
from dynamickv.integrations import vllm as plugin
from dynamickv.integrations.vllm import compat
from dynamickv.integrations.vllm.blocks import BlockPlan, kept_before_tail
from dynamickv.integrations.vllm.metrics import COUNTERS
from dynamickv.integrations.vllm.plugin import BACKENDS, PACKAGE, require_version

LAYERS = 6


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with random weights: grouped queries, six layers."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    write_tiny_model(folder)
    return folder


PROMPTS = {str(length): random_prompt(length, length) for length in (300, 90, 611)}


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


def test_a_capacity_above_the_prompt_gives_plain_vllms_tokens(folder, plain_answers):
    with started(folder, {"capacity": 700}) as engine:
        assert answers(engine, PROMPTS, 24) == plain_answers


METHODS = (
    dkv.SnapKV(capacity=100),
    dkv.PyramidKV(capacity=120),
    dkv.DynamicKV(capacity=100, r_max=3.0, update_interval=4),
    dkv.DynamicKV(capacity=72, kernel_size=5, pooling="avg", progressive=False),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.capacity}")
def test_blocks_hold_what_the_engine_selects_at_the_rounded_budgets(folder, plain_answers, method):
    """The prompt ends so that the observation window begins a block: then the engine's own Manual
    method, given the rounded budgets, must choose the same, and answer the same from it."""
    prompt = random_prompt(20 * BLOCK + method.window_size, 5)
    queries, keys = recorded(folder, prompt)
    rounded = at_whole_blocks(method, queries, keys)
    expected = dkv.retain(rounded, queries, keys).indices
    with started(folder, {"method": method.name, **method.parameters}) as engine:
        read_prompt(engine, prompt)
        held = held_positions([key[0] for key in keys])
        answer = list(finish(engine)["only"].outputs[0].token_ids)
    assert len({kept.shape[1] for kept in expected}) > 1 or method.name == "SnapKV"
    for got, wanted in zip(held, expected, strict=True):
        assert torch.equal(got, wanted)
    assert [answer] == engine_answers(folder, rounded, [prompt])


@pytest.mark.parametrize("method", [dkv.CAKE(capacity=90), dkv.KeyDiff(capacity=90)], ids=str)
def test_blocks_hold_what_other_methods_rank_best_in_the_engine(folder, plain_answers, method):
    prompt = random_prompt(407, 8)
    queries, keys = recorded(folder, prompt)
    selection = method.start(LAYERS)
    for query, key in zip(queries, keys, strict=True):
        selection.observe(
            dkv.LayerObservation(queries=query[0, :, -method.tail :], keys=key[0], scaling=32**-0.5)
        )
    plan = BlockPlan.of(method, len(prompt), BLOCK)
    with started(folder, {"method": method.name, **method.parameters}) as engine:
        read_prompt(engine, prompt)
        held = held_positions([key[0] for key in keys])
    tail = torch.arange(plan.tail_start, len(prompt)).expand(2, -1)
    for layer, got in enumerate(held):
        assert torch.equal(got, torch.cat([kept_before_tail(selection, layer, plan), tail], dim=1))


def test_a_method_without_scores_fills_its_blocks_with_the_latest_tokens(folder, plain_answers):
    prompt = random_prompt(413, 9)
    _, keys = recorded(folder, prompt)
    with started(folder, {"method": "StreamingLLM", "capacity": 70}) as engine:
        read_prompt(engine, prompt)
        held = held_positions([key[0] for key in keys])
    expected = [*range(4), *range(12 * BLOCK - 60, 413)]
    for kept in held:
        assert kept.tolist() == [expected, expected]


DYNAMIC = {"method": "DynamicKV", "capacity": 72, "r_max": 3.0}


def test_short_prompts_in_blocks_that_a_compressed_one_gave_back_answer_as_alone(
    folder, plain_answers
):
    """The pool is so small that it hands them out while the compressed prompt is answered."""
    shorts = {f"short {seed}": random_prompt(34 + seed % 30, seed) for seed in range(30)}
    blocks = {"max_model_len": 600, "num_gpu_blocks_override": 24 * LAYERS}
    with started(folder, DYNAMIC, enable_prefix_caching=True, **blocks) as engine:
        alone = {}
        for name, prompt in shorts.items():
            alone |= answers(engine, {name: prompt}, 4)
        read_prompt(engine, random_prompt(400, 1), 195)
        among = {}
        for name, prompt in shorts.items():
            add(engine, name, prompt, 4)
            while name not in among:
                done = [output for output in engine.step() if output.finished]
                among |= {one.request_id: list(one.outputs[0].token_ids) for one in done}
        assert "only" not in among
    assert among == alone


def test_preempted_requests_among_others_answer_as_alone(folder, plain_answers):
    """Chunked prefill, four prompts at once, and too few blocks for all four answers."""
    blocks = {"max_model_len": 400, "num_gpu_blocks_override": 18 * LAYERS}
    with started(folder, DYNAMIC, **blocks) as engine:
        equal, preempted = alone_and_together(engine, 140)
    assert preempted, "no request was preempted; lower num_gpu_blocks_override"
    assert equal == [True] * 4


def test_prefix_caching_changes_no_answer(folder, plain_answers):
    """The prompts that the cache serves were themselves compressed, and are being answered."""
    (off, on), cached, told = with_and_without_prefix_caching(folder, DYNAMIC)
    assert off == on
    assert cached[0] == 0
    assert cached[1] >= 20
    assert all(len(one["kept_tokens"]) == LAYERS for one in told)
    assert sum(max(one["kept_tokens"]) < one["prompt_tokens"] for one in told) >= 45


def test_a_prompt_whose_blocks_are_shared_in_the_step_that_writes_them_is_compressed(
    folder, plain_answers
):
    """The longer one finds the blocks of the shorter in the cache while both are being read."""
    short = random_prompt(5 * BLOCK, 7)
    prompts = {"short": short, "long": [*short, *random_prompt(50, 8)]}
    found = []
    for caching in (False, True):
        with started(folder, DYNAMIC, enable_prefix_caching=caching) as engine:
            for name, prompt in prompts.items():
                add(engine, name, prompt, ANSWER)
            outputs = finish(engine)
        assert outputs["long"].num_cached_tokens == (len(short) if caching else 0)
        found.append(
            {
                name: (list(one.outputs[0].token_ids), one.kv_transfer_params["dynamickv"])
                for name, one in outputs.items()
            }
        )
    assert found[0] == found[1]
    assert all(max(told["kept_tokens"]) < told["prompt_tokens"] for _, told in found[0].values())


@pytest.mark.parametrize(
    "method", [dkv.DynamicKV(capacity=100, r_max=3.0), dkv.KeyDiff(capacity=90)], ids=str
)
def test_two_ranks_keep_and_answer_what_one_does(folder, plain_answers, method):
    one, two = on_ranks(folder, method, random_prompt(20 * BLOCK + 3, 5))
    assert one == two
    kept = [len(layer[0]) for layer in one["positions"]]
    assert len(one["positions"][0]) == 2
    assert max(kept) < 400


def test_a_second_turn_goes_on_from_the_compressed_first_as_in_the_engine(folder, plain_answers):
    """And answers as the engine does, whose cache holds the same positions."""
    method = dkv.DynamicKV(capacity=100, r_max=3.0, update_interval=4)
    prompt, question = random_prompt(20 * BLOCK + method.window_size, 5), random_prompt(21, 6)
    rounded = at_whole_blocks(method, *recorded(folder, prompt))
    options = {"method": method.name, **method.parameters}
    with started(folder, options, enable_prefix_caching=True) as engine:
        first, _ = ask(engine, prompt, ANSWER)
        second, told = ask(engine, [*prompt, *first, *question], ANSWER)
        _, told_anew = ask(engine, [*prompt, *first, *question], ANSWER)
    assert told["continued_tokens"] == len(prompt) + ANSWER - 1
    assert [first, second] == engine_answers(folder, rounded, [prompt, question])
    assert "continued_tokens" not in told_anew
    assert told_anew["prompt_tokens"] == len(prompt) + ANSWER + len(question)


def test_a_conversation_has_one_writer_and_goes_on_turn_after_turn(folder, plain_answers):
    with started(folder, DYNAMIC, enable_prefix_caching=True) as engine:
        turn = random_prompt(400, 1)
        turn += ask(engine, turn, 8)[0]
        for name in ("left", "right"):
            add(engine, name, [*turn, *random_prompt(9, ord(name[0]))], 8)
        told = {n: o.kv_transfer_params["dynamickv"] for n, o in finish(engine).items()}
        assert sum("continued_tokens" in one for one in told.values()) == 1
        third = [*random_prompt(400, 1)]
        lengths = []
        for number in range(4):
            answer, told = ask(engine, third, 8)
            lengths.append(told.get("continued_tokens", 0))
            third += [*answer, *random_prompt(11, number)]
        # The first turn's own chain was taken; it was read again, and then went on three times.
        assert lengths == [0, 407, 426, 445]


def test_chains_are_dropped_oldest_first_when_their_blocks_are_needed(folder, plain_answers):
    blocks = {"num_gpu_blocks_override": 30 * LAYERS, "max_model_len": 600}
    with started(folder, DYNAMIC, enable_prefix_caching=True, **blocks) as engine:
        manager = scheduler_of(engine).kv_cache_manager
        free = manager.block_pool.get_num_free_blocks()
        turns = [random_prompt(400, seed) for seed in range(9)]
        for turn in turns:
            turn += ask(engine, turn, 8)[0]
        assert manager.block_pool.get_num_free_blocks() == free
        found = ["continued_tokens" in ask(engine, [*turn, 1], 2)[1] for turn in reversed(turns)]
    assert found[0]
    assert not found[-1]
    assert found == sorted(found, reverse=True)


def test_every_block_comes_back_after_many_requests_aborts_and_chains(folder, plain_answers):
    blocks = {"max_model_len": 900, "num_gpu_blocks_override": 40 * LAYERS}
    with started(folder, DYNAMIC, enable_prefix_caching=True, **blocks) as engine:
        found = mixed_requests(engine, 150)
        assert min(found["aborted"], found["continued"], found["cached"]) > 5
        assert found["preempted"] > 0
        assert found["least"] < found["before"] / 4
        assert found["after"] == found["before"]
        worker = get_kv_transfer_group().worker
        assert not worker._requests
        assert not worker._by_block
        scheduling = scheduler_of(engine).connector.scheduling
        known = ("_plans", "_kept", "_found", "_went_on", "_written", "_resuming")
        assert not any(getattr(scheduling, name) for name in known)
        for manager in scheduling.managers:
            for known in (manager._awaited, manager._rooms, manager._gaps, manager._rows):
                assert not known


def test_requests_whose_prompt_was_read_are_counted(folder, plain_answers):
    """Not those aborted before: neither the one that was being read nor the one that waited."""
    settings = {"enable_prefix_caching": True, "max_num_seqs": 1, "disable_log_stats": False}
    with started(folder, DYNAMIC, **settings) as engine:
        prompt = random_prompt(400, 1)
        answer, told = ask(engine, prompt, 4)
        ask(engine, [*prompt, *answer, 5], 4)
        for name in ("read", "waited"):
            add(engine, name, random_prompt(400, ord(name[0])), 4)
        engine.step()
        engine.abort_request(["read", "waited"])
        ask(engine, random_prompt(40, 2), 4)
        metrics = {metric.name: metric for metric in engine.get_metrics()}
    counted = {name: metrics[f"vllm:dynamickv_{name}"].value for name in COUNTERS}
    kept = sum(told["kept_tokens"]) / LAYERS
    assert counted == {
        "prompt_tokens": 400 + 400 + 40,
        "kept_tokens": pytest.approx(2 * kept + 40, abs=1),
        "compressed_requests": 2,
        "whole_requests": 1,
        "continued_requests": 1,
    }
    assert metrics["vllm:dynamickv_kept_share"].count == 3


def test_layers_give_back_what_their_own_budget_does_not_need(folder, plain_answers):
    prompt = random_prompt(20 * BLOCK, 11)
    with started(folder, DYNAMIC) as engine:
        pool = scheduler_of(engine).kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        read_prompt(engine, prompt)
        used = free - pool.get_num_free_blocks()
        output = finish(engine)["only"]
    told = output.kv_transfer_params["dynamickv"]
    assert told["prompt_tokens"] == len(prompt)
    assert len(set(told["kept_tokens"])) > 1
    assert used == sum(-(-kept // BLOCK) for kept in told["kept_tokens"])


GEOMETRY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
}


def write_model(folder: str, kind: str) -> None:
    """A checkpoint with random weights of a kind of layers."""
    torch.manual_seed(0)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(
            **GEOMETRY,
            num_hidden_layers=4,
            layer_types=layers,
            sliding_window=48,
            query_pre_attn_scalar=32,
        )
        Gemma3ForCausalLM(config).float().save_pretrained(folder)
    elif kind == "qwen3":
        Qwen3ForCausalLM(Qwen3Config(**GEOMETRY, num_hidden_layers=2)).float().save_pretrained(
            folder
        )
    else:
        config = MistralConfig(**GEOMETRY, num_hidden_layers=2, sliding_window=64)
        MistralForCausalLM(config).float().save_pretrained(folder)


@pytest.mark.parametrize(("kind", "layers"), [("gemma3", 2), ("qwen3", 2)])
def test_other_layer_kinds_answer_together_and_preempted_as_alone(
    tmp_path, plain_answers, kind, layers
):
    """Queries after norms, and sliding windows beside; only full attention is compressed."""
    write_model(str(tmp_path), kind)
    blocks = {"max_model_len": 400, "num_gpu_blocks_override": 56 if kind == "gemma3" else 36}
    with started(str(tmp_path), DYNAMIC, **blocks) as engine:
        _, told = ask(engine, random_prompt(300, 3), 2)
        equal, preempted = alone_and_together(engine, 140)
    assert len(told["kept_tokens"]) == layers
    assert sum(told["kept_tokens"]) < 0.6 * 300 * layers
    assert preempted, "no request was preempted; lower num_gpu_blocks_override"
    assert equal == [True] * 4


@pytest.mark.parametrize("kind", ["gemma3", "qwen3"])
def test_other_layer_kinds_keep_what_the_engine_keeps(tmp_path, plain_answers, kind):
    """The answers of the engine's serve mode, which has its own code for each."""
    method = dkv.SnapKV(capacity=5 * BLOCK + 8)
    write_model(str(tmp_path), kind)
    prompt = random_prompt(12 * BLOCK + 8, 4)
    with started(str(tmp_path), {"method": method.name, **method.parameters}) as engine:
        answer, _ = ask(engine, prompt, ANSWER)
    assert [answer] == engine_answers(str(tmp_path), method, [prompt])


def test_a_model_with_sliding_windows_only_is_refused(tmp_path, plain_answers):
    write_model(str(tmp_path), "mistral")
    refused = pytest.raises(ValueError, match="every layer of this model has a sliding window")
    with refused, started(str(tmp_path), {"capacity": 64}):
        pass


def test_sliding_windows_with_prefix_caching_are_refused(tmp_path, plain_answers):
    write_model(str(tmp_path), "gemma3")
    refused = pytest.raises(ValueError, match="prefix caching in a model with sliding windows")
    with refused, started(str(tmp_path), {"capacity": 64}, enable_prefix_caching=True):
        pass


def test_a_pool_without_room_for_the_longest_prompt_and_its_copy_is_refused(folder, plain_answers):
    blocks = {"num_gpu_blocks_override": 20 * LAYERS + 1, "max_model_len": 20 * BLOCK}
    refused = pytest.raises(ValueError, match=r"compressed copy; use --max-model-len 544 or give")
    with refused, started(folder, DYNAMIC, **blocks):
        pass


def test_latent_attention_is_refused(plain_answers):
    spec = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=96, dtype=torch.float32)
    group = SimpleNamespace(layer_names=["model.layers.0.self_attn.attn"], kv_cache_spec=spec)
    with pytest.raises(ValueError, match="has MLAAttentionSpec, and DynamicKV's plugin works with"):
        resolve_obj_by_qualname(f"{PACKAGE}.connector._groups")(
            SimpleNamespace(kv_cache_groups=[group])
        )


def test_every_backend_extends_vllms_own(plain_answers):
    """Also those that need a GPU to run."""
    for backend, path in BACKENDS.items():
        ours, theirs = map(resolve_obj_by_qualname, (path, backend.value))
        assert issubclass(ours, theirs)
        assert issubclass(ours.get_impl_cls(), theirs.get_impl_cls())
        assert issubclass(ours.get_builder_cls(), theirs.get_builder_cls())
        assert backend.get_class() is ours
        assert ours.get_name() == backend.name


@pytest.mark.parametrize("version", compat.READ_VERSIONS)
def test_a_version_that_was_only_read_is_taken_with_a_warning(version, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    require_version(f"{version}+cpu")
    assert f"tested with vLLM 0.32.0, not with {version}" in caplog.text


def test_another_version_of_vllm_is_refused():
    with pytest.raises(ValueError, match=r"tested with vLLM 0\.32\.0 and this is 0\.34\.1"):
        require_version("0.34.1+cpu")


def test_every_name_taken_from_vllm_is_there():
    for name in compat.NAMES:
        if not name.startswith(("FlashAttention", "TritonAttention")):
            assert compat.__getattr__(name) is not None


def test_no_other_file_of_the_plugin_takes_names_from_vllm():
    folder = Path(plugin.__file__).parent
    for file in folder.glob("*.py"):
        assert not re.search(r"^\s*(from|import) vllm", file.read_text("utf-8"), re.MULTILINE), file


def test_the_entry_point_is_announced():
    entries = metadata.entry_points(group="vllm.general_plugins")
    assert entries["dynamickv"].load() is plugin.register
