"""Every way people call `generate` with a compressed cache: right, or refused in one sentence."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

import dynamickv as dkv
from tests.engine.tiny import SMALL_INSTANCES, heads_of, method_name, tiny_model

ANSWER = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LENGTHS = (61, 40, 90)


def prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random prompts, (1, length) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (1, length), generator=generator) for length in lengths]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One batch of prompts, padded on the left."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - row.shape[1] :] = row[0]
        mask[number, longest - row.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def plain(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def answers(model: PreTrainedModel, inputs: dict[str, Any], **settings: Any) -> list[list[int]]:
    output = model.generate(**inputs, **{**ANSWER, **settings})
    return [row[inputs["input_ids"].shape[1] :].tolist() for row in output]


def compressed(
    model: PreTrainedModel, method: Any, inputs: dict[str, Any], **settings: Any
) -> tuple[list[list[int]], dkv.CompressedCache]:
    with dkv.compress(model, method) as cache:
        return answers(model, inputs, past_key_values=cache, **settings), cache


def positions(cache: dkv.CompressedCache) -> list[list[list[int]]]:
    return [heads_of(kept) for kept in cache.retention().indices]


UNIFORM = [
    method for method in SMALL_INSTANCES if getattr(method, "head_budgets", "") != "adaptive"
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", UNIFORM, ids=method_name)
def test_rows_of_a_batch_answer_as_each_prompt_alone(method: Any, attention: str) -> None:
    model, rows = tiny_model(attention=attention), prompts(*LENGTHS)
    together, cache = compressed(model, method, left_padded(rows))
    for number, row in enumerate(rows):
        alone, single = compressed(model, method, plain(row))
        assert together[number] == alone[0]
        mine, own = cache.retention(number), single.retention()
        assert mine.prompt_length == own.prompt_length == LENGTHS[number]
        assert all(map(torch.equal, mine.indices, own.indices))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_batch_in_which_everything_fits_is_generates_own(family: str) -> None:
    model, inputs = tiny_model(family), left_padded(prompts(*LENGTHS))
    kept, _ = compressed(model, dkv.DynamicKV(capacity=200), inputs)
    assert kept == answers(model, inputs)


def test_padding_is_never_kept_and_costs_no_bytes_where_budgets_agree() -> None:
    model, rows = tiny_model(), prompts(*LENGTHS)
    method = dkv.SnapKV(capacity=24)
    _, cache = compressed(model, method, left_padded(rows), max_new_tokens=1)
    _, single = compressed(model, method, plain(rows[0]), max_new_tokens=1)
    assert cache.nbytes == len(rows) * single.nbytes


@pytest.mark.parametrize("method", UNIFORM[1:], ids=method_name)
def test_several_answers_to_one_prompt_are_rows(method: Any) -> None:
    model, (row,) = tiny_model(), prompts(70)
    inputs = plain(row)
    torch.manual_seed(0)
    sampled, cache = compressed(model, method, inputs, do_sample=True, num_return_sequences=3)
    assert len(sampled) == 3
    alone, _ = compressed(model, method, inputs)
    greedy, _ = compressed(model, method, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert greedy == alone * 2
    assert cache.retention(2).budgets == cache.retention(0).budgets


@pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
@pytest.mark.parametrize("chunk", [7, 32, 69, 70, 200])
def test_a_prompt_read_in_chunks_is_compressed_after_the_last(method: Any, chunk: int) -> None:
    model, (row,) = tiny_model(), prompts(70)
    whole, single = compressed(model, method, plain(row))
    chunked, cache = compressed(model, method, plain(row), prefill_chunk_size=chunk)
    assert chunked == whole
    assert positions(cache) == positions(single)
    assert cache.nbytes == single.nbytes


@pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
def test_drafts_from_the_prompt_change_no_answer(method: Any) -> None:
    model = tiny_model()
    (piece,) = prompts(20)
    inputs = plain(torch.cat([piece] * 4, dim=1))
    settings = {"max_new_tokens": 24}
    expected, single = compressed(model, method, inputs, **settings)
    drafted, cache = compressed(model, method, inputs, prompt_lookup_num_tokens=3, **settings)
    assert drafted == expected
    assert positions(cache) == positions(single)


def test_an_assistants_drafts_change_no_answer() -> None:
    model, assistant, (row,) = tiny_model(), tiny_model(), prompts(70)
    method = dkv.DynamicKV(capacity=24)
    expected, _ = compressed(model, method, plain(row))
    drafted, _ = compressed(model, method, plain(row), assistant_model=assistant)
    assert drafted == expected


def test_only_what_came_after_the_prompt_can_be_given_back() -> None:
    model, (row,) = tiny_model(), prompts(70)
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        answers(model, plain(row), past_key_values=cache)
        lengths = [layer.length for layer in cache.layers]
        with pytest.raises(ValueError, match="cannot give back 8 tokens, it may give back 7"):
            cache.crop(-8)
        assert [layer.length for layer in cache.layers] == lengths
        # As transformers 5.17 gives it.
        cache.crop(torch.tensor(-7))
        assert isinstance(cache.get_seq_length(), int)
        assert all(isinstance(layer.seen, int) for layer in cache.layers)
        assert cache.get_seq_length() == 70
        assert {layer.length for layer in cache.layers} == {24}


def test_a_streamer_is_told_every_token() -> None:
    class Told:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, (row,), told = tiny_model(), prompts(70), Told()
    (answer,), _ = compressed(model, dkv.SnapKV(capacity=24), plain(row), streamer=told)
    assert told.tokens == [*row[0].tolist(), *answer, -1]


@pytest.mark.parametrize("held", [69, 70, 71])
def test_a_prompt_that_the_cache_has_read_in_part_goes_on_or_is_refused(held: int) -> None:
    model, (row,) = tiny_model(), prompts(71)
    prompt = row[:, :70]
    method = dkv.SnapKV(capacity=24)
    with dkv.compress(model, method) as cache, torch.inference_mode():
        model(row[:, :held], past_key_values=cache)
        if held < 70:
            going_on = answers(model, plain(prompt), past_key_values=cache)
            assert len(going_on[0]) == ANSWER["max_new_tokens"]
            assert cache.get_seq_length() == 70 + 7
            return
        with pytest.raises(ValueError, match=r"^this cache holds \S+ .*cache\.reset\(\)"):
            answers(model, plain(prompt), past_key_values=cache)


@pytest.mark.parametrize("length", [30, 77, 78, 100])
def test_another_prompt_without_reset_is_refused(length: int) -> None:
    model, (first, second) = tiny_model(), prompts(70, length)
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        answers(model, plain(first), past_key_values=cache)
        with pytest.raises(ValueError, match=r"call cache\.reset\(\)"):
            answers(model, plain(second), past_key_values=cache)
        cache.reset()
        again = answers(model, plain(second), past_key_values=cache)
    assert again == compressed(model, dkv.SnapKV(capacity=24), plain(second))[0]


def test_a_follow_up_goes_on_inside_the_block_and_is_refused_behind_it() -> None:
    model, (first, more) = tiny_model(), prompts(70, 9)
    method = dkv.SnapKV(capacity=24)
    with dkv.compress(model, method) as cache:
        answer = answers(model, plain(first), past_key_values=cache)
        whole = plain(torch.cat([first, torch.tensor(answer), more], dim=1))
        follow_up = answers(model, whole, past_key_values=cache)
        assert len(follow_up[0]) == ANSWER["max_new_tokens"]
    later = plain(torch.cat([whole["input_ids"], torch.tensor(follow_up), more], dim=1))
    with pytest.raises(ValueError, match="the compress block of this cache has ended"):
        answers(model, later, past_key_values=cache)


def test_a_checkpoint_that_turns_its_cache_off_is_refused() -> None:
    model, (row,) = tiny_model(), prompts(70)
    model.generation_config.use_cache = False
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="use_cache"),
    ):
        answers(model, plain(row), past_key_values=cache)


def test_rows_of_unlike_length_are_not_read_in_chunks() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="leave out prefill_chunk_size"):
        compressed(
            model, dkv.SnapKV(capacity=24), left_padded(prompts(*LENGTHS)), prefill_chunk_size=16
        )


def test_heads_that_compete_serve_one_prompt_at_a_time() -> None:
    method = dkv.SnapKV(capacity=24, head_budgets="adaptive")
    with pytest.raises(ValueError, match="serves one prompt at a time, and the batch has 3"):
        compressed(tiny_model(), method, left_padded(prompts(*LENGTHS)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_answer_alike(dtype: torch.dtype) -> None:
    model, rows = tiny_model().to(dtype), prompts(50, 50)
    inputs = plain(torch.cat(rows))
    together, cache = compressed(model, dkv.SnapKV(capacity=24), inputs, max_new_tokens=2)
    assert len(together) == 2
    assert cache.layers[0].keys.dtype == dtype


class BrokenOffError(Exception):
    """What a test lets a layer raise."""


def break_off_at(model: PreTrainedModel, passes: int) -> Any:
    """Let the fourth layer raise in that pass; a handle that takes it back."""
    done = 0

    def hook(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == passes:
            raise BrokenOffError

    return model.model.layers[3].register_forward_pre_hook(hook)


@pytest.mark.parametrize("passes", [1, 5], ids=["prompt", "answer"])
def test_a_pass_that_broke_off_is_not_gone_on_from(passes: int) -> None:
    model, (row, more) = tiny_model(), prompts(70, 9)
    expected, _ = compressed(model, dkv.SnapKV(capacity=24), plain(row))
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        handle = break_off_at(model, passes)
        with pytest.raises(BrokenOffError):
            answers(model, plain(row), past_key_values=cache)
        handle.remove()
        fed = torch.cat([row, torch.tensor(expected)[:, : passes - 1], more], dim=1)
        with pytest.raises(ValueError, match=r"broke off, .*call cache\.reset\(\)"):
            answers(model, plain(fed), past_key_values=cache)
        cache.reset()
        assert answers(model, plain(row), past_key_values=cache) == expected


def test_drafts_that_broke_off_leave_no_logits_behind() -> None:
    model, (piece, row) = tiny_model(), prompts(20, 30)
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        # The prompt is read in a pass of its own; the drafts after it come second.
        handle = break_off_at(model, 2)
        with pytest.raises(BrokenOffError):
            answers(
                model,
                plain(torch.cat([piece] * 4, dim=1)),
                past_key_values=cache,
                prompt_lookup_num_tokens=3,
            )
        handle.remove()
        cache.reset()
        for tokens in (row, row[:, :1]):
            assert model(tokens, past_key_values=cache).logits.shape[:2] == tokens.shape


@pytest.mark.parametrize("feeder", ["another model", "the model's inner part"])
def test_a_cache_fed_by_another_model_than_compress_was_given_is_refused(feeder: str) -> None:
    model, (row,) = tiny_model(), prompts(70)
    other = tiny_model(seed=1) if feeder == "another model" else model.model
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="give compress the very model that you call"),
    ):
        other(row, past_key_values=cache)


@pytest.mark.parametrize("capacity", [24, 200])
def test_guidance_is_measured_from_a_cache_of_its_own(capacity: int) -> None:
    model, (row,) = tiny_model(), prompts(70)
    method = dkv.SnapKV(capacity=capacity)
    guided, cache = compressed(model, method, plain(row), guidance_scale=1.5)
    assert cache.layers[0].length == min(capacity, 70) + 7
    if capacity > 70:
        assert guided == answers(model, plain(row), guidance_scale=1.5)


def test_a_single_token_for_more_rows_than_are_held_is_refused() -> None:
    model, (row,) = tiny_model(), prompts(70)
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        model(row, past_key_values=cache)
        with pytest.raises(ValueError, match="3 sequences and this cache holds 1"):
            model(torch.tensor([[3], [4], [5]]), past_key_values=cache)


@pytest.mark.parametrize("row", [-1, 1])
def test_what_was_kept_of_a_row_that_is_not_there_is_refused(row: int) -> None:
    _, cache = compressed(tiny_model(), dkv.SnapKV(capacity=24), plain(prompts(70)[0]))
    with pytest.raises(ValueError, match=f"row must be from 0 to 0, got {row}"):
        cache.retention(row)


def test_a_cache_is_freed_with_its_last_name() -> None:
    model, inputs = tiny_model(), plain(prompts(70)[0])
    gc.collect()
    gc.disable()
    try:
        _, cache = compressed(model, dkv.DynamicKV(capacity=24), inputs)
        held = weakref.ref(cache.layers[0])
        del cache
        assert held() is None
    finally:
        gc.enable()


def test_scores_are_freed_with_the_prompts_end() -> None:
    scored = []

    class Watched(dkv.SnapKV):
        def score(self, layer: dkv.LayerObservation) -> torch.Tensor:
            scores = super().score(layer)
            scored.append(weakref.ref(scores))
            return scores

    model, (row,) = tiny_model(), prompts(70)
    with dkv.compress(model, Watched(capacity=24)) as cache:
        model(row, past_key_values=cache)
        gc.collect()
        assert len(scored) == len(cache.layers)
        assert not any(scores() is not None for scores in scored)


def test_of_a_prompt_that_fits_no_attention_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dynamickv.reading.prompt_row.attention_mass", lambda *_: pytest.fail("summed")
    )
    row = plain(prompts(70)[0])
    compressed(tiny_model(), dkv.H2O(capacity=70), row, prefill_chunk_size=32)


def embedded(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "attention_mask": torch.ones_like(ids),
    }


@pytest.mark.parametrize("first", ["ids", "embeds"])
@pytest.mark.parametrize("then", ["ids", "embeds", "another prompt's embeds", "the new embeds"])
@torch.inference_mode()
def test_a_follow_up_that_cannot_be_compared_with_the_cache_is_refused(
    first: str, then: str
) -> None:
    model, (prompt, more, other) = tiny_model(), prompts(70, 9, 100)
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        answer = answers(model, plain(prompt), past_key_values=cache)
        whole = torch.cat([prompt, torch.tensor(answer), more], dim=1)
        follow_up = answers(model, plain(whole), past_key_values=cache)
        cache.reset()
        if first == "ids":
            answers(model, plain(prompt), past_key_values=cache)
        else:
            given = model.generate(**embedded(model, prompt), past_key_values=cache, **ANSWER)
            assert given.tolist() == answer
        if first == then == "ids":
            assert answers(model, plain(whole), past_key_values=cache) == follow_up
            return
        inputs = {
            "ids": plain(whole),
            "embeds": embedded(model, whole),
            "another prompt's embeds": embedded(model, other),
            "the new embeds": embedded(model, more),
        }[then]
        with pytest.raises(ValueError, match=r"^[^;]+; call cache\.reset\(\)[^;]+$"):
            model.generate(**inputs, past_key_values=cache, **ANSWER)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "dynamic scaling"])
def test_blocks_on_one_model_may_end_in_any_order(scaled: bool) -> None:
    dynamic = {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
    }
    model, rows = tiny_model(**dynamic if scaled else {}), prompts(*LENGTHS)
    method, inputs = dkv.DynamicKV(capacity=24), left_padded(rows)
    expected, _ = compressed(model, method, inputs)
    rotary = model.model.rotary_emb
    before = (model.config._attn_implementation, rotary.inv_freq.tolist())
    first, second = dkv.compress(model, method), dkv.compress(model, method)
    earlier, later = first.__enter__(), second.__enter__()
    assert answers(model, inputs, past_key_values=earlier) == expected
    first.__exit__(None, None, None)
    assert answers(model, inputs, past_key_values=later) == expected
    with dkv.compress(model, method) as third:
        second.__exit__(None, None, None)
        assert answers(model, inputs, past_key_values=third) == expected
    assert (model.config._attn_implementation, rotary.inv_freq.tolist()) == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_threads_share_a_model_each_with_a_block_of_its_own() -> None:
    model, rows = tiny_model(), prompts(*LENGTHS)
    method = dkv.DynamicKV(capacity=24)
    expected = [compressed(model, method, plain(row))[0] for row in rows]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            together = pool.map(lambda row: compressed(model, method, plain(row))[0], rows)
            assert list(together) == expected
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("hooks", ["_forward_pre_hooks", "_forward_hooks"])
def test_a_pass_goes_on_while_another_thread_opens_its_block(hooks: str) -> None:
    """torch lists a hook before it notes that the hook is told arguments by name."""
    model, (row,) = tiny_model(), prompts(70)
    expected = answers(model, plain(row))
    with dkv.compress(model, dkv.SnapKV(capacity=24)):
        half = dict.fromkeys(getattr(model, hooks))
        for told in half:
            getattr(model, f"{hooks}_with_kwargs").pop(told)
        assert half
        assert answers(model, plain(row)) == expected


@pytest.mark.parametrize("name", ["static", "offloaded"])
def test_another_cache_asked_for_beside_is_refused_before_any_work(name: str) -> None:
    """By transformers itself, which comes first."""
    model, inputs = tiny_model(), plain(prompts(70)[0])
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="only one of the two"),
    ):
        answers(model, inputs, past_key_values=cache, cache_implementation=name)
    assert cache.peak_bytes == 0


def longrope() -> PreTrainedModel:
    """A Phi-3 that turns its keys by other frequencies beyond 64 tokens."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
        original_max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        },
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def test_a_prompt_beyond_longropes_switch_is_compressed() -> None:
    model, (row,) = longrope(), prompts(100)
    _, cache = compressed(model, dkv.SnapKV(capacity=24), plain(row), max_new_tokens=4)
    assert {layer.length for layer in cache.layers} == {24 + 3}
    whole, _ = compressed(model, dkv.SnapKV(capacity=200), plain(row))
    assert whole == answers(model, plain(row))


def test_an_answer_that_would_cross_longropes_switch_is_refused() -> None:
    model, (row,) = longrope(), prompts(60)
    with pytest.raises(ValueError, match="would cross 64 tokens"):
        compressed(model, dkv.SnapKV(capacity=24), plain(row))
    short, _ = compressed(model, dkv.SnapKV(capacity=200), plain(row), max_new_tokens=4)
    assert short == answers(model, plain(row), max_new_tokens=4)
