"""Pruning while prefilling keeps what pruning afterwards keeps, and never holds the full cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import dynamickv as dkv
from dynamickv.serve import CompressedCache
from tests.engine.tiny import (
    COMPRESSING,
    DOCUMENT,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    small_instances,
    tiny_llm,
    tiny_model,
    tiny_tokenizer,
)

if not hasattr(dkv, "compress"):
    pytest.skip("serve mode is not part of this release", allow_module_level=True)

NEW_TOKENS = 12
ANSWER = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def prompt(llm: dkv.LoadedModel) -> torch.Tensor:
    return torch.tensor([dkv.prefill(llm, DOCUMENT, QUESTION).prompt.token_ids])


def generated(model: PreTrainedModel, prompt: torch.Tensor, **settings: Any) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **{**ANSWER, **settings}
        )
    answer: list[int] = output[0, prompt.shape[1] :].tolist()
    return answer


CASES = [
    *(("llama", "sdpa", method) for method in SMALL_INSTANCES),
    *(("llama", "eager", method) for method in SMALL_INSTANCES),
    *(("qwen2", "sdpa", method) for method in SMALL_INSTANCES),
    *(("llama", "sdpa", method) for method in small_instances(granularity="query_head")[1:]),
    *(
        ("llama", attention, method)
        for attention in ("sdpa", "eager")
        for method in small_instances(head_budgets="adaptive")
        if isinstance(method, dkv.ScoredMethod)
    ),
    ("llama", "sdpa", dkv.DynamicKV(capacity=24, progressive=False)),
    (
        "llama",
        "sdpa",
        dkv.DynamicKV(capacity=24, granularity="query_head", head_budgets="adaptive"),
    ),
    *(("gemma3", "sdpa", method) for method in SMALL_INSTANCES),
    ("gemma3", "eager", dkv.DynamicKV(capacity=24, head_budgets="adaptive")),
]


@pytest.mark.parametrize(
    ("family", "attention", "method"),
    CASES,
    ids=lambda case: (
        case
        if isinstance(case, str)
        else f"{case.name}-{'-'.join(map(str, case.parameters.values()))}"
    ),
)
def test_serving_keeps_and_answers_what_exploring_does(
    family: str, attention: str, method: Any
) -> None:
    llm = tiny_llm(family, attention)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    explored = dkv.compare(llm, prefill=prefill, methods=[method], max_new_tokens=NEW_TOKENS)
    expected = method.select(prefill.layers)
    model = tiny_model(family, attention)
    with dkv.compress(model, method) as cache:
        answer = generated(model, torch.tensor([prefill.prompt.token_ids]), past_key_values=cache)
    ours = cache.retention()
    assert ours.budget_history == expected.budget_history
    for served, kept in zip(ours.indices, expected.indices, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(served, kept, strict=True))
    assert answer == explored.runs[0].token_ids


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_the_full_cache_never_exists(prompt: torch.Tensor, method: Any) -> None:
    model = tiny_model()
    with dkv.compress(model, method) as cache:
        generated(model, prompt, past_key_values=cache, max_new_tokens=1)
    per_token = 2 * 2 * 8 * 4
    layer = per_token * prompt.shape[1]
    assert cache.nbytes == per_token * sum(cache.retention().budgets)
    shares_late = hasattr(method, "r_max")
    first_pass = min(int(method.r_max * (24 - 8)), prompt.shape[1]) if shares_late else 40
    assert cache.peak_bytes <= layer + (NUM_LAYERS - 1) * per_token * (first_pass + 8)
    if not shares_late:
        assert cache.peak_bytes < layer * NUM_LAYERS / 2


def test_each_update_of_dynamickv_frees_memory_a_layer_later(prompt: torch.Tensor) -> None:
    model = tiny_model()
    held = []
    method = dkv.DynamicKV(capacity=24, update_interval=2, r_max=3.0)
    with dkv.compress(model, method) as cache:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: held.append([x.length for x in cache.layers]))
        generated(model, prompt, past_key_values=cache, max_new_tokens=1)
    for index in (1, 3, 5):
        next_layer = min(index + 1, NUM_LAYERS - 1)
        assert sum(held[next_layer][: index + 1]) <= 24 * NUM_LAYERS + 8 * NUM_LAYERS
    assert held[0] == [3 * 16 + 8, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("method", small_instances(capacity=5000), ids=method_name)
def test_a_prompt_that_fits_answers_like_plain_generate(prompt: torch.Tensor, method: Any) -> None:
    model = tiny_model()
    expected = generated(model, prompt)
    with dkv.compress(model, method) as cache:
        assert generated(model, prompt, past_key_values=cache) == expected
    assert cache.retention().kept_fraction == 1


# What `generate` offers besides greedy answers.


SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", small_instances(capacity=5000), ids=method_name)
def test_sampling_draws_what_plain_generate_draws_when_all_is_kept(
    prompt: torch.Tensor, method: Any, seed: int
) -> None:
    model = tiny_model()
    torch.manual_seed(seed)
    expected = generated(model, prompt, **SAMPLED)
    assert expected != generated(model, prompt)
    with dkv.compress(model, method) as cache:
        torch.manual_seed(seed)
        assert generated(model, prompt, past_key_values=cache, **SAMPLED) == expected


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_sampling_from_a_compressed_cache_depends_on_the_seed_alone(
    prompt: torch.Tensor, method: Any
) -> None:
    model = tiny_model()
    answers = []
    with dkv.compress(model, method) as cache:
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            answers.append(generated(model, prompt, past_key_values=cache, **SAMPLED))
            cache.reset()
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_a_text_streamer_prints_the_answer(
    prompt: torch.Tensor, method: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with dkv.compress(model, method) as cache:
        expected = generated(model, prompt, past_key_values=cache)
        cache.reset()
        capsys.readouterr()
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        generated(model, prompt, past_key_values=cache, streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(expected) + "\n"


def test_an_iterating_streamer_gives_the_answer_to_another_thread(prompt: torch.Tensor) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with dkv.compress(model, dkv.DynamicKV(capacity=24)) as cache:
        expected = generated(model, prompt, past_key_values=cache)
        cache.reset()
        settings = {"past_key_values": cache, "streamer": streamer}
        thread = threading.Thread(target=generated, args=(model, prompt), kwargs=settings)
        thread.start()
        pieces = list(streamer)
        thread.join(60)
    assert len(pieces) > 2
    assert "".join(pieces) == tokenizer.decode(expected)


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_a_stop_string_ends_the_answer(prompt: torch.Tensor, method: Any) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with dkv.compress(model, method) as cache:
        whole = generated(model, prompt, past_key_values=cache)
        texts = [tokenizer.decode([token]) for token in whole]
        # Broken characters, parts of longer ones, cannot be searched for.
        place = next(
            place
            for place, text in enumerate(texts)
            if place > 1 and "\ufffd" not in text and text not in "".join(texts[:place])
        )
        cache.reset()
        stopped = generated(
            model,
            prompt,
            past_key_values=cache,
            stop_strings=[texts[place]],
            tokenizer=tokenizer,
        )
    assert stopped == whole[: place + 1]
    assert len(stopped) < NEW_TOKENS


@pytest.mark.parametrize("method", COMPRESSING, ids=method_name)
def test_the_text_generation_pipeline_answers_from_the_cache(
    llm: dkv.LoadedModel, prompt: torch.Tensor, method: Any
) -> None:
    model = tiny_model()
    answer = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    text = dkv.prefill(llm, DOCUMENT, QUESTION).prompt.text
    chat = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]
    with dkv.compress(model, method) as cache:
        expected = generated(model, prompt, past_key_values=cache)
        kept = cache.retention()
        for asked in (text, chat):
            cache.reset()
            (output,) = answer(asked, past_key_values=cache, return_tensors=True, **ANSWER)
            assert output["generated_token_ids"][prompt.shape[1] :] == expected
            assert cache.retention().budgets == kept.budgets
            cache.reset()
            (output,) = answer(asked, past_key_values=cache, return_full_text=False, **ANSWER)
            said = tiny_tokenizer().decode(expected, skip_special_tokens=True)
            assert output["generated_text"] == said


# No trace on the model.


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that serving could leave something on."""
    hooks = [
        (name, kind, list(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in vars(module)
        if "_hooks" in kind and getattr(module, kind)
    ]
    attributes = {
        name: {key: repr(type(value)) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }
    return {
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "hooks": hooks,
        "attributes": attributes,
        "training": model.training,
        "forward": [type(module).forward for module in model.modules()],
    }


@pytest.mark.parametrize("ending", ["done", "unused", "refused", "raised"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
def test_the_model_is_as_it_was_afterwards(
    prompt: torch.Tensor, method: Any, attention: str, ending: str
) -> None:
    model = tiny_model(attention=attention)
    answered = generated(model, prompt)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    before = traces(model)
    if ending == "raised":
        with pytest.raises(KeyError), dkv.compress(model, method):
            raise KeyError
    else:
        with dkv.compress(model, method) as cache:
            assert traces(model) != before
            if ending == "done":
                generated(model, prompt, past_key_values=cache)
            elif ending == "refused":
                with pytest.raises(ValueError, match="without beam search"):
                    generated(model, prompt, past_key_values=cache, num_beams=2)
    assert traces(model) == before
    for kept, now in ((state, model.state_dict()), (buffers, dict(model.named_buffers()))):
        assert kept.keys() == now.keys()
        assert all(torch.equal(kept[name], now[name]) for name in kept)
    assert generated(model, prompt) == answered


def test_another_cache_inside_the_block_is_left_alone(prompt: torch.Tensor) -> None:
    model = tiny_model()
    expected = generated(model, prompt)
    with dkv.compress(model, dkv.SnapKV(capacity=24)):
        assert generated(model, prompt) == expected


def test_a_cache_that_is_reset_compresses_the_next_prompt_anew(prompt: torch.Tensor) -> None:
    model = tiny_model()
    with dkv.compress(model, dkv.DynamicKV(capacity=24)) as cache:
        first = generated(model, prompt, past_key_values=cache)
        kept = cache.retention()
        cache.reset()
        assert cache.nbytes == 0
        generated(model, prompt[:, :90], past_key_values=cache)
        assert cache.retention().prompt_length == 90
        cache.reset()
        assert generated(model, prompt, past_key_values=cache) == first
    again = cache.retention()
    assert all(torch.equal(a, b) for a, b in zip(kept.indices, again.indices, strict=True))


def test_a_follow_up_question_is_kept_whole(prompt: torch.Tensor) -> None:
    model = tiny_model()
    question = torch.tensor([[40, 301, 7, 99, 12]])
    with dkv.compress(model, dkv.DynamicKV(capacity=24)) as cache, torch.inference_mode():
        model(prompt, past_key_values=cache)
        budgets = [layer.length for layer in cache.layers]
        at_once = model(question, past_key_values=cache).logits[0]
        assert [layer.length for layer in cache.layers] == [b + 5 for b in budgets]
        cache.reset()
        model(prompt, past_key_values=cache)
        singly = [model(question[:, i : i + 1], past_key_values=cache).logits[0] for i in range(5)]
    torch.testing.assert_close(at_once, torch.cat(singly), rtol=0, atol=1e-4)


def test_a_prompt_that_fits_is_retained_as_in_explore_mode(prompt: torch.Tensor) -> None:
    for granularity, heads in (("kv_head", 2), ("query_head", 6)):
        method = dkv.SnapKV(capacity=5000, granularity=granularity)
        model = tiny_model()
        with dkv.compress(model, method) as cache:
            generated(model, prompt, past_key_values=cache)
        assert {len(kept) for kept in cache.retention().indices} == {heads}


def test_retention_before_any_prompt_says_what_to_do() -> None:
    with (
        dkv.compress(tiny_model(), dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match="no prompt has gone through this cache yet"),
    ):
        cache.retention()


# Refusals, before any layer computes.


def untouched(model: PreTrainedModel) -> PreTrainedModel:
    """The model, failing the test as soon as any of its parts computes."""
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda *_: pytest.fail("it computed"))
    return model


def padded(prompt: torch.Tensor, side: slice) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    mask[0, side] = 0
    return mask


REFUSED: dict[str, tuple[Any, str]] = {
    "beam search": (
        lambda model, prompt, cache: generated(model, prompt, past_key_values=cache, num_beams=2),
        "without beam search",
    ),
    "padding on the right": (
        lambda model, prompt, cache: model(
            prompt, attention_mask=padded(prompt, slice(-3, None)), past_key_values=cache
        ),
        "hides padding",
    ),
    "padding between tokens": (
        lambda model, prompt, cache: model(
            prompt, attention_mask=padded(prompt, slice(3, 5)), past_key_values=cache
        ),
        "hides padding",
    ),
    "no cache": (
        lambda model, prompt, cache: generated(
            model, prompt, past_key_values=cache, use_cache=False
        ),
        "use_cache=False",
    ),
}


@pytest.mark.parametrize(("ask", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_a_cache_cannot_serve_is_refused_before_any_work(
    prompt: torch.Tensor, ask: Any, sentence: str
) -> None:
    model = untouched(tiny_model())
    with (
        dkv.compress(model, dkv.SnapKV(capacity=24)) as cache,
        pytest.raises(ValueError, match=r"^[^\n]+; [^\n]+$") as refusal,
    ):
        ask(model, prompt, cache)
    assert sentence in str(refusal.value)
    assert cache.nbytes == cache.peak_bytes == 0


def test_what_is_no_model_is_refused_with_where_it_is(llm: dkv.LoadedModel) -> None:
    model: Any = llm
    refused = pytest.raises(ValueError, match="got LoadedModel; of what load_model gives")
    with refused, dkv.compress(model, dkv.SnapKV(capacity=24)):
        pass


@pytest.mark.parametrize("method", [None, "SnapKV", dkv.SnapKV, 24])
def test_what_is_no_method_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match="is not a method"), dkv.compress(tiny_model(), method):
        pass


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = untouched(T5ForConditionalGeneration(config))
    before = traces(model)
    with (
        pytest.raises(ValueError, match="is an encoder-decoder; choose a decoder-only"),
        dkv.compress(model, dkv.SnapKV(capacity=24)),
    ):
        pytest.fail("the block was entered")
    assert traces(model) == before


def test_sliding_window_layers_are_refused() -> None:
    model = untouched(tiny_model("mistral", sliding_window=16))
    before = traces(model)
    with (
        pytest.raises(ValueError, match="sliding_attention"),
        dkv.compress(model, dkv.SnapKV(capacity=24)),
    ):
        pytest.fail("the block was entered")
    assert traces(model) == before


def test_the_answer_decodes_to_text(prompt: torch.Tensor) -> None:
    model = tiny_model()
    with dkv.compress(model, dkv.SnapKV(capacity=24)) as cache:
        answer = generated(model, prompt, past_key_values=cache)
    assert isinstance(tiny_tokenizer().decode(answer), str)
    assert len(answer) <= NEW_TOKENS


@pytest.mark.parametrize("method", SMALL_INSTANCES, ids=method_name)
def test_dynamic_scaling_starts_afresh_and_leaves_no_trace(method: Any) -> None:
    """As in explore mode: an answer does not depend on longer prompts read earlier."""
    scaled = {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
    }
    llm = tiny_llm(**scaled)
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    explored = dkv.compare(llm, prefill=prefill, methods=[method], max_new_tokens=NEW_TOKENS)
    prompt = torch.tensor([prefill.prompt.token_ids])
    model = tiny_model(**scaled)
    rotary = model.model.rotary_emb
    with torch.no_grad():
        model(torch.arange(3, 303)[None])
    before = (rotary.inv_freq.tolist(), rotary.max_seq_len_cached, traces(model))
    with dkv.compress(model, method) as cache:
        answer = generated(model, prompt, past_key_values=cache)
    assert answer == explored.runs[0].token_ids
    assert (rotary.inv_freq.tolist(), rotary.max_seq_len_cached, traces(model)) == before


AHEAD = [
    *(
        dkv.DynamicKV(capacity=24, update_interval=interval, r_max=r_max, **settings)
        for interval in (1, 2, 4, 6)
        for r_max in (1.5, 3.0)
        for settings in ({}, {"head_budgets": "adaptive"}, {"granularity": "query_head"})
    ),
    dkv.DynamicKV(capacity=24, progressive=False),
    dkv.DynamicKV(capacity=24, pinned=((3, 9),), evicted=((60, 70),)),
    *SMALL_INSTANCES,
]


def read(
    prompt: torch.Tensor, method: Any, ahead: bool, **settings: Any
) -> tuple[CompressedCache, list[int]]:
    model = tiny_model()
    with dkv.compress(model, method) as cache:
        cache.reads_ahead = ahead
        return cache, generated(model, prompt, past_key_values=cache, **settings)


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 50}], ids=["whole", "chunks"])
@pytest.mark.parametrize("method", AHEAD, ids=repr)
def test_an_update_that_is_read_a_layer_later_keeps_and_answers_the_same(
    prompt: torch.Tensor, method: Any, settings: dict[str, int]
) -> None:
    at_once, expected = read(prompt, method, False, **settings)
    later, answer = read(prompt, method, True, **settings)
    assert answer == expected
    assert later.retention().budget_history == at_once.retention().budget_history
    for ours, theirs in zip(later.retention().indices, at_once.retention().indices, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert later.nbytes == at_once.nbytes


class Waiting(dkv.DynamicKV):
    """DynamicKV as on an accelerator, where what waits for an update is not cut before."""

    def most_later(self, scores: Any, num_layers: int) -> list[int]:
        return []


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_reading_updates_a_layer_later_holds_less_than_a_layer_more(
    prompt: torch.Tensor, interval: int
) -> None:
    method = Waiting(capacity=24, update_interval=interval, r_max=3.0)
    at_once, later = (read(prompt, method, ahead)[0].peak_bytes for ahead in (False, True))
    assert at_once <= later < at_once + 2 * 2 * 8 * 4 * prompt.shape[1] / 2


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_rows_whose_updates_are_read_a_layer_later_keep_the_same(
    prompt: torch.Tensor, interval: int
) -> None:
    model, kept = tiny_model(), []
    rows = torch.cat([prompt, prompt.flip(1), prompt])
    mask = torch.ones_like(rows)
    mask[1, :30] = 0
    mask[2, :-20] = 0  # it fits
    for ahead in (False, True):
        method = dkv.DynamicKV(capacity=24, update_interval=interval, r_max=3.0)
        with dkv.compress(model, method) as cache:
            cache.reads_ahead = ahead
            with torch.inference_mode():
                answer = model.generate(rows, attention_mask=mask, past_key_values=cache, **ANSWER)
        kept.append((answer, [cache.retention(row) for row in range(3)]))
    (expected, theirs), (answer, ours) = kept
    assert torch.equal(answer, expected)
    for one, other in zip(ours, theirs, strict=True):
        assert one.budget_history == other.budget_history
        assert all(torch.equal(a, b) for a, b in zip(one.indices, other.indices, strict=True))


def test_an_update_is_read_once_the_next_layer_is_under_way(
    prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    allocating = dkv.DynamicKV.allocating

    def telling(method: Any, scores: Any, num_layers: int) -> Callable[[], list[int]]:
        counted, seen = allocating(method, scores, num_layers), len(scores)
        told.append(f"begun {seen}")

        def read() -> list[int]:
            told.append(f"read {seen}")
            return counted()

        return read

    monkeypatch.setattr(dkv.DynamicKV, "allocating", telling)
    model = tiny_model()
    method = dkv.DynamicKV(capacity=24, update_interval=2, r_max=3.0)
    with dkv.compress(model, method) as cache:
        cache.reads_ahead = True
        for place, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda *_, place=place: told.append(f"layer {place}"))
        generated(model, prompt, past_key_values=cache, max_new_tokens=1)
    assert told == [
        *["layer 0", "begun 2", "layer 1", "read 2", "layer 2", "begun 4", "layer 3"],
        *["read 4", "layer 4", "begun 6", "layer 5", "read 6"],
    ]


def test_a_step_counts_each_layer_once(
    prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Any] = []

    def noted(layer: Any) -> int:
        counted.append(layer)
        return int(layer.nbytes)

    monkeypatch.setattr("dynamickv.cache.layer_bytes", noted)
    model, peaks, counts = tiny_model(), [], []
    for tokens in (1, NEW_TOKENS):
        counted.clear()
        with dkv.compress(model, dkv.SnapKV(capacity=prompt.shape[1])) as cache:
            generated(model, prompt, past_key_values=cache, max_new_tokens=tokens)
        counts.append(len(counted))
        peaks.append(cache.peak_bytes)
        assert cache.peak_bytes == cache.nbytes
    assert counts[1] - counts[0] == NUM_LAYERS * (NEW_TOKENS - 1)
    assert peaks[1] - peaks[0] == NUM_LAYERS * (2 * 2 * 8 * 4) * (NEW_TOKENS - 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_a_gpu_reads_updates_later_and_keeps_the_same(prompt: torch.Tensor, interval: int) -> None:
    model = tiny_model().to("cuda")
    method = dkv.DynamicKV(capacity=24, update_interval=interval, r_max=3.0)
    caches, answers = [], []
    for ahead in (False, None):
        with dkv.compress(model, method) as cache:
            cache.reads_ahead = ahead
            answers.append(generated(model, prompt.cuda(), past_key_values=cache))
        caches.append(cache.retention())
    assert answers[0] == answers[1]
    assert caches[0].budget_history == caches[1].budget_history
    for one, other in zip(caches[0].indices, caches[1].indices, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
