"""Models with sliding-window layers: only the others are compressed, and the record says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, GPTNeoXConfig, PretrainedConfig

import dynamickv as dkv
from dynamickv.cache import prune
from dynamickv.layers.other import SlidingLayer
from dynamickv.models import require_compressible
from tests.engine.tiny import (
    COMPRESSING,
    DOCUMENT,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    tiny_llm,
    tiny_model,
)

WINDOW = 32
SLIDING = [0, 1, 3, 4]
WHOLE = [2, 5]
PER_TOKEN = 2 * 2 * 8 * 4
"""Keys and values of 2 KV heads of 8 float32 numbers."""


@pytest.fixture(scope="module")
def hybrid() -> dkv.LoadedModel:
    return tiny_llm("gemma3")


@pytest.fixture(scope="module")
def read(hybrid: dkv.LoadedModel) -> dkv.Prefill:
    return dkv.prefill(hybrid, DOCUMENT, QUESTION, mass=True)


def test_the_geometry_tells_the_layers_apart(hybrid: dkv.LoadedModel) -> None:
    assert hybrid.geometry.windows == dict.fromkeys(SLIDING, WINDOW)
    assert hybrid.geometry.compressed_layers == WHOLE
    assert tiny_llm().geometry.compressed_layers == list(range(6))


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_sliding_window_layers_hold_the_same_under_every_method(
    hybrid: dkv.LoadedModel, read: dkv.Prefill, method: Any
) -> None:
    trace = dkv.compare(hybrid, prefill=read, methods=[dkv.FullKV(), method], max_new_tokens=8)
    assert trace.model.sliding_layers == SLIDING
    full, run = trace.runs
    kept = run.retained.unpack(6, read.length)
    for layer in SLIDING:
        assert run.budgets[layer] == full.budgets[layer] == WINDOW - 1
        assert kept[layer].sum(axis=1).tolist() == [WINDOW - 1] * 2
        assert kept[layer][:, -(WINDOW - 1) :].all()
    chosen = method.select(read.layers)
    assert [run.budgets[layer] for layer in WHOLE] == chosen.budgets
    assert run.kept_fraction == pytest.approx(kept[WHOLE].mean())
    assert run.kv_bytes == PER_TOKEN * sum(run.budgets)
    assert run.kv_bytes_full == full.kv_bytes == PER_TOKEN * sum(full.budgets)
    assert dkv.Trace.from_dict(trace.to_dict()) == trace


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_question_may_come_after_the_compression(attention: str) -> None:
    """Several tokens at once, where both kinds of layers need masks of their own."""
    llm = tiny_llm("gemma3", attention)
    aware = dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=16)
    late = dkv.compare(
        llm, DOCUMENT, QUESTION, methods=SMALL_INSTANCES, max_new_tokens=16, question_aware=False
    )
    assert late.runs[0].token_ids == aware.runs[0].token_ids
    assert len({tuple(run.token_ids) for run in late.runs}) > 1


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_a_preview_is_what_the_run_records(
    hybrid: dkv.LoadedModel, method: Any, aware: bool
) -> None:
    read = dkv.prefill(hybrid, DOCUMENT, QUESTION, mass=True, question_aware=aware)
    trace = dkv.compare(hybrid, prefill=read, methods=[method], max_new_tokens=1)
    run, seen = trace.runs[0], dkv.preview(method, read, trace.prompt.length)
    assert dkv.Retained.pack(seen.mask) == run.retained
    assert seen.budgets == run.budgets
    assert seen.budget_history == run.budget_history
    assert seen.kept_fraction == run.kept_fraction
    assert seen.kv_bytes == run.kv_bytes


def test_answers_do_not_disturb_the_prefill(hybrid: dkv.LoadedModel, read: dkv.Prefill) -> None:
    before = {place: state.keys.clone() for place, state in read.others.items()}
    for _ in range(2):
        trace = dkv.compare(hybrid, prefill=read, methods=SMALL_INSTANCES, max_new_tokens=40)
    assert all(torch.equal(state.keys, before[place]) for place, state in read.others.items())
    again = dkv.compare(hybrid, prefill=read, methods=SMALL_INSTANCES, max_new_tokens=40)
    assert [run.token_ids for run in again.runs] == [run.token_ids for run in trace.runs]


def test_a_pruned_layer_equals_a_mask_over_the_dropped_positions(
    hybrid: dkv.LoadedModel, read: dkv.Prefill
) -> None:
    """The next token's logits with the pruned cache are those of the whole model, told by a mask
    in the compressed layers alone what is gone."""
    method = dkv.SnapKV(capacity=24)
    chosen = method.select(read.layers)
    run = dkv.compare(hybrid, prefill=read, methods=[method], max_new_tokens=2).runs[0]
    model = tiny_model("gemma3", "eager")
    tokens = torch.tensor([[*read.prompt.token_ids, run.token_ids[0]]])
    for place, kept in zip(WHOLE, chosen.indices, strict=True):
        rows = kept.repeat_interleave(3, dim=0)
        visible = torch.zeros(6, tokens.shape[1], dtype=torch.bool).scatter_(1, rows, True)
        visible[:, -1] = True
        attention = model.model.layers[place].self_attn
        attention.register_forward_pre_hook(hide(visible), with_kwargs=True)
    with torch.inference_mode():
        logits = model(tokens).logits[0, -1]
    assert int(logits.argmax()) == run.token_ids[1]
    assert float(logits.log_softmax(-1)[run.token_ids[1]]) == pytest.approx(
        run.logprobs[1], abs=1e-4
    )


def hide(visible: torch.Tensor) -> Any:
    """Let the last query of a layer see these keys alone, (heads, n)."""

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].expand(1, visible.shape[0], -1, -1).clone()
        mask[0, :, -1].masked_fill_(~visible, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return before


def test_a_prefill_keeps_only_the_window_of_a_sliding_layer(read: dkv.Prefill) -> None:
    for state in read.others.values():
        assert state.keys.shape == (1, 2, WINDOW - 1, 8)
        assert state.keys.untyped_storage().nbytes() == state.nbytes // 2
    cache = prune(read, dkv.FullKV().select(read.layers), room=0)
    assert [isinstance(layer, SlidingLayer) for layer in cache.layers] == [
        place in SLIDING for place in range(6)
    ]
    assert not cache.plain


def test_scores_of_sliding_layers_read_zero(hybrid: dkv.LoadedModel, read: dkv.Prefill) -> None:
    run = dkv.compare(
        hybrid, prefill=read, methods=[dkv.SnapKV(capacity=24)], max_new_tokens=1, scores=True
    ).runs[0]
    assert run.scores is not None
    table = run.scores.unpack(6, read.length)
    assert not table[SLIDING].any()
    assert table[WHOLE].any(axis=1).all()


def test_serving_never_holds_the_whole_prompt_in_two_layers(read: dkv.Prefill) -> None:
    model = tiny_model("gemma3")
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        ids = torch.tensor([read.prompt.token_ids])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1
        )
    assert cache.peak_bytes <= PER_TOKEN * (read.length + 24 + 4 * (WINDOW - 1))
    cache.reset()
    assert cache.nbytes == 0


class Config(PretrainedConfig):
    """A stand-in for families whose models are not built here."""

    model_type = "stand-in"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layer_types": ["linear_attention"] * 2}, "linear_attention in all layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention in all layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention in all layers"),
        ({"layer_types": ["indexed_attention"] * 2}, "cache by DynamicIndexedLayer|no cache of"),
        ({"sliding_window": 64}, "sliding_attention in all layers"),
        ({"use_bidirectional_attention": True}, "looks ahead"),
        ({}, "names no longest sequence"),
        ({"model_type": "doge"}, "masks positions by their values"),
    ],
)
def test_layers_that_cannot_be_compressed_are_refused(options: Any, reason: str) -> None:
    more = {"sliding_window": 64, "attention_chunk_size": 64} if "layer_types" in options else {}
    config = Config(num_attention_heads=4, num_hidden_layers=2, hidden_size=16, **more, **options)
    config.model_type = options.get("model_type", config.model_type)
    with pytest.raises(ValueError, match=reason) as refusal:
        require_compressible(config)
    assert "; choose " in str(refusal.value)


def test_an_encoder_is_refused_unless_it_is_told_to_decode() -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="is an encoder, whose tokens see later ones"):
        require_compressible(BertConfig(**small))
    require_compressible(BertConfig(is_decoder=True, **small))
    require_compressible(GPTNeoXConfig(**small))
