"""What the vLLM plugin decides without vLLM: options, refusals, and what whole blocks hold."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dynamickv as dkv
from dynamickv.integrations import vllm as plugin
from dynamickv.integrations.vllm.blocks import BlockPlan, dealt, kept_before_tail, room_for
from dynamickv.integrations.vllm.options import (
    method_of,
    require_plain_attention,
)
from dynamickv.integrations.vllm.ranks import Ranks


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
    cache = {"cache_dtype": "auto"}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector=named.pop("connector", plugin.CONNECTOR),
            kv_connector_extra_config=options,
        ),
        speculative_config=named.pop("speculative_config", None),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 2),
        parallel_config=SimpleNamespace(**{k: named.pop(k, v) for k, v in parallel.items()}),
        cache_config=SimpleNamespace(**{k: named.pop(k, v) for k, v in cache.items()}),
        use_v2_model_runner=named.pop("use_v2_model_runner", False),
    )


def test_options_are_the_methods_own():
    options = {"capacity": 256, "r_max": 4.0, "window_size": 16, "update_interval": 2}
    assert method_of(config(options=options)) == dkv.DynamicKV(**options)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"options": {"conversations": 1}}, "conversations must be true or false, got 1"),
        ({"speculative_config": object()}, "does not work with speculative decoding"),
        ({"tensor_parallel_size": 4}, "does not work with more ranks than KV heads"),
        ({"pipeline_parallel_size": 2}, "does not work with pipeline parallelism"),
        ({"decode_context_parallel_size": 2}, "does not work with context parallelism"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"cache_dtype": "fp8"}, "does not work with a quantized KV cache"),
        ({"connector": "NixlConnector"}, "needs --kv-transfer-config"),
        ({"options": {"decoding": {"budget": 64}}}, "keeps answers whole: .*; leave decoding out"),
        ({"options": {"method": "LAVa"}}, "LAVa reads the values, which the plugin does not look"),
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


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "capped attention logits"),
        ({"sinks": torch.ones(2)}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "layers that share a KV cache"),
    ],
)
def test_layers_that_attend_otherwise_are_refused(named, what):
    plain = {
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "kv_sharing_target_layer_name": None,
    }
    require_plain_attention(SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=f"does not work with {what}; use another model"):
        require_plain_attention(SimpleNamespace(**{**plain, **named}))


def test_nothing_of_vllm_is_loaded_unless_it_is_told_to_load_the_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for value in ("", "other", None):
        if value is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", value)
        plugin.register()


@pytest.mark.parametrize(
    ("held", "blocks"),
    [(1, 1), (40, 1), (52, 1), (53, 2), (84, 2), (85, 3), (628, 19), (629, 20), (700, 20)],
)
def test_budgets_are_rounded_up_to_whole_blocks(held, blocks):
    """660 tokens, window 8: the tail is positions 640 to 659 and counts."""
    plan = BlockPlan.of(dkv.SnapKV(capacity=64), 660, 32)
    assert (plan.tail_block, plan.tail_start) == (20, 640)
    assert plan.blocks_for(held) == blocks


def test_a_prompt_within_one_block_has_no_block_before_its_tail():
    assert BlockPlan.of(dkv.SnapKV(capacity=9), 39, 32).tail_block == 0


@pytest.mark.parametrize(
    "method",
    [
        dkv.SnapKV(capacity=100),
        dkv.PyramidKV(capacity=120),
        dkv.DynamicKV(capacity=100, r_max=3.0),
        dkv.DynamicKV(capacity=65, progressive=False),
        dkv.CAKE(capacity=90),
        dkv.KeyDiff(capacity=90),
        dkv.StreamingLLM(capacity=90),
        dkv.ShiftKV(capacity=90),
        dkv.Manual(budgets=[9, 300, 64, 31, 8, 200]),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("length", [321, 359, 640])
def test_a_compressed_copy_fits_the_room_set_aside_for_it(method, length):
    generator = torch.Generator().manual_seed(length)
    selection = method.start(6)
    for _ in range(6):
        queries, keys = (torch.randn(h, length, 16, generator=generator) for h in (4, 2))
        selection.observe(
            dkv.LayerObservation(queries=queries[:, -method.tail :], keys=keys, scaling=0.25)
        )
    plan = BlockPlan.of(method, length, 32)
    kept = [kept_before_tail(selection, layer, plan).shape[1] // 32 for layer in range(6)]
    room = room_for(method, plan, 6)
    copies = dealt(range(room), kept, plan.tail_block)
    assert [len(copy) for copy in copies] == [n if n < plan.tail_block else 0 for n in kept]
    assert room <= 6 * plan.tail_block
    dealt_out = [block for copy in copies for block in copy]
    assert len(set(dealt_out)) == len(dealt_out)


@pytest.mark.parametrize("length", [328, 337, 359])
def test_the_best_scored_positions_before_the_tail_fill_the_blocks(length):
    """Whatever part of the prefix the tail's first block takes along."""
    generator = torch.Generator().manual_seed(length)
    queries, keys = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2))
    method = dkv.SnapKV(capacity=100)
    selection = method.start(1)
    selection.observe(dkv.LayerObservation(queries=queries[0, :, -8:], keys=keys[0], scaling=0.25))
    plan = BlockPlan.of(method, length, 32)
    kept = kept_before_tail(selection, 0, plan)
    assert kept.shape[1] % 32 == 0
    assert kept.shape[1] + length - plan.tail_start >= 100
    assert kept.shape[1] + length - plan.tail_start < 132
    scores = selection.scores[0][:, : plan.tail_start]
    for head, positions in enumerate(kept):
        assert positions.tolist() == sorted(set(positions.tolist()))
        dropped = torch.ones(plan.tail_start, dtype=torch.bool)
        dropped[positions] = False
        assert scores[head, positions].min() >= scores[head, dropped].max()


def test_a_method_without_a_window_fills_the_blocks_with_its_best_too():
    """Not with the latest of what it keeps: KeyDiff's best lie anywhere."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 328, 16, generator=generator)
    method = dkv.KeyDiff(capacity=100)
    selection = method.start(1)
    selection.observe(dkv.LayerObservation(queries=keys[:, -1:], keys=keys, scaling=0.25))
    plan = BlockPlan.of(method, 328, 32)
    kept = kept_before_tail(selection, 0, plan)
    assert kept.shape[1] == plan.blocks_for(100) * 32
    scores = method.score(dkv.LayerObservation(queries=keys[:, -1:], keys=keys, scaling=0.25))
    for head, positions in enumerate(kept):
        best = scores[head, : plan.tail_start].topk(len(positions)).indices
        assert set(positions.tolist()) == set(best.tolist())


@pytest.mark.parametrize(
    "method",
    [dkv.DynamicKV(capacity=100, r_max=3.0), dkv.CAKE(capacity=90), dkv.KeyDiff(capacity=90)],
    ids=lambda method: method.name,
)
def test_ranks_choose_for_their_heads_what_one_rank_chooses(method):
    """Each rank is given what the others would send it."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(torch.randn(8, 330, 16, generator=generator)) for _ in range(6)]
    layers = [(q[:, -method.tail :], q[:4] + q[4:]) for q in shapes]
    plan = BlockPlan.of(method, 330, 32)
    whole = method.start(6)
    for queries, keys in layers:
        whole.observe(dkv.LayerObservation(queries=queries, keys=keys, scaling=0.25))
    for rank in range(2):
        selection = method.start(6)
        for queries, keys in layers:
            parts = list(zip(queries.chunk(2), keys.chunk(2), strict=True))

            def gather(mine, dim, parts=parts, rank=rank):
                others = [dkv.LayerObservation(queries=q, keys=k, scaling=0.25) for q, k in parts]
                all_ranks = [
                    one.attention(method.tail) if dim == 0 else one.moments(method.tail)
                    for one in others
                ]
                assert torch.equal(all_ranks[rank], mine)
                return torch.cat(all_ranks, dim)

            observed = Ranks(2, rank, gather).observation(method, *parts[rank], 0.25)
            selection.observe(observed)
        for layer in range(6):
            own = Ranks(2, rank).own(method, kept_before_tail(selection, layer, plan))
            assert torch.equal(own, kept_before_tail(whole, layer, plan).chunk(2)[rank])
