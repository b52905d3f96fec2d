"""Compression that goes on while answering chooses as written down here by hand, holds no more than
its budget and buffer, and is the same on every path."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import dynamickv as dkv
from dynamickv.decoding import alignment, forgetting
from dynamickv.layers import kv
from dynamickv.layers.kv import KVLayer
from dynamickv.records import HeldLayer
from tests.engine.methods.naive import best, pooled_row, softmax
from tests.engine.test_generate_modes import answers, left_padded, plain, prompts
from tests.engine.tiny import (
    DOCUMENT,
    NUM_LAYERS,
    QUESTION,
    SMALL_INSTANCES,
    method_name,
    tiny_llm,
    tiny_model,
)

BUDGET, BUFFER = 32, 8
DECODING = dkv.Decoding(budget=BUDGET, buffer=BUFFER)
STEPS = 30
HEADS, GROUP = 2, 3
LENGTHS = (61, 20, 90)
"""Prompts of a batch; one fits, so that rows are full at different times."""
DECODABLE = [
    method
    for method in SMALL_INSTANCES
    if method.capabilities.decoding and getattr(method, "head_budgets", "") != "adaptive"
]
REFUSED = [method for method in SMALL_INSTANCES if method not in DECODABLE]

every_method = pytest.mark.parametrize("method", DECODABLE, ids=method_name)


def served(
    model: Any, method: Any, inputs: dict[str, Any], decoding: Any = DECODING, **settings: Any
) -> tuple[list[list[int]], dkv.CompressedCache]:
    with dkv.compress(model, method, decoding=decoding) as cache:
        settings = {"max_new_tokens": STEPS, **settings}
        return answers(model, inputs, past_key_values=cache, **settings), cache


class Reference:
    """The model's attention over everything, written out, with what was dropped hidden: nothing is
    ever removed, so a position is a place. The chooser below works on its queries and keys."""

    def __init__(self) -> None:
        self.held = [np.zeros((HEADS, 0), bool) for _ in range(NUM_LAYERS)]
        self.queries = [np.zeros((HEADS * GROUP, 0, 8)) for _ in range(NUM_LAYERS)]
        self.received = [np.zeros((HEADS * GROUP, 0)) for _ in range(NUM_LAYERS)]
        self.keys: list[np.ndarray] = [np.zeros(0)] * NUM_LAYERS

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        place, new, length = module.layer_idx, query.shape[2], key.shape[2]
        more = np.ones((HEADS, new), bool)
        self.held[place] = np.concatenate([self.held[place], more], axis=1)
        self.queries[place] = np.concatenate([self.queries[place], query[0].numpy()], axis=1)
        self.keys[place] = key[0].numpy()
        visible = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        shown = torch.from_numpy(self.held[place]).repeat_interleave(GROUP, dim=0)[:, None]
        logits = query[0] @ key[0].repeat_interleave(GROUP, dim=0).transpose(1, 2) * module.scaling
        shares = logits.masked_fill(~(visible & shown), float("-inf")).softmax(-1)
        padded = np.zeros((HEADS * GROUP, length))
        padded[:, : length - new] = self.received[place]
        self.received[place] = padded + shares.sum(1).numpy()
        output = shares @ value[0].repeat_interleave(GROUP, dim=0)
        return output.transpose(0, 1)[None], None

    @property
    def mean_held(self) -> float:
        return sum(held.sum() for held in self.held) / (NUM_LAYERS * HEADS)

    def choose(self, method: Any, capacity: int) -> None:
        """Every head keeps the `capacity` positions that the method likes best of those held, in
        the mean over layers where they share."""
        capacities = [capacity] * NUM_LAYERS
        if method.name == "DynamicKV":
            capacities = self.shared(method, capacity)
        for place in range(NUM_LAYERS):
            for head in range(HEADS):
                held = np.flatnonzero(self.held[place][head])
                if len(held) <= capacities[place]:
                    continue
                kept = held[self.liked(method, place, head, held, capacities[place])]
                self.held[place][head] = False
                self.held[place][head, kept] = True

    def shared(self, method: Any, capacity: int) -> list[int]:
        """To each layer, besides the window, as many as it has of the best scores of all layers;
        what no layer has a whole one of, to those that lack least."""
        scored = []
        for place in range(NUM_LAYERS):
            for head in range(HEADS):
                held = np.flatnonzero(self.held[place][head])
                scored += [(score, place) for score in self.scores(method, place, head, held)]
        if len(scored) <= (capacity - method.window_size) * NUM_LAYERS * HEADS:
            return [capacity] * NUM_LAYERS
        best_scored = sorted(scored, reverse=True)
        room = (capacity - method.window_size) * NUM_LAYERS
        counts = np.bincount([place for _, place in best_scored[: room * HEADS]], minlength=3)
        whole = counts // HEADS
        for place in sorted(range(NUM_LAYERS), key=lambda n: -(counts[n] % HEADS)):
            whole[place] += whole.sum() < room
        return [int(count) + method.window_size for count in whole]

    def liked(
        self, method: Any, place: int, head: int, held: np.ndarray, capacity: int
    ) -> list[int]:
        if method.name == "StreamingLLM":
            order = list(range(len(held)))
            return order[: method.sinks] + order[len(held) - capacity + method.sinks :]
        if method.name == "KeyDiff":
            keys = self.keys[place][head, held].astype(np.float64)
            keys /= np.linalg.norm(keys, axis=1, keepdims=True)
            return best((-keys @ keys.mean(axis=0)).tolist(), capacity)
        window = method.window_size
        scores = self.scores(method, place, head, held)
        return [
            *best(scores, capacity - window),
            *range(len(held) - window, len(held)),
        ]

    def scores(self, method: Any, place: int, head: int, held: np.ndarray) -> list[float]:
        """Of what is held before the window."""
        window = method.window_size
        group = slice(head * GROUP, (head + 1) * GROUP)
        if method.name == "H2O":
            rows = self.received[place][group][:, held[:-window]]
        else:
            keys = self.keys[place][head, held].astype(np.float64)
            rows = np.zeros((GROUP, len(held) - window))
            for number, query in enumerate(self.queries[place][group]):
                for back in range(window):
                    seen = len(held) - back
                    shares = softmax(keys[:seen] @ query[held[seen - 1]] / np.sqrt(8))
                    rows[number] += shares[: len(held) - window]
        scores: list[float] = rows.mean(axis=0).tolist()
        if method.name != "H2O":
            scores = pooled_row(scores, method.kernel_size, method.pooling)
        return scores


@torch.no_grad()
def by_hand(method: Any, ids: Tensor) -> tuple[list[int], Reference]:
    """Greedy tokens, choosing again before the token that would not fit."""
    reference = Reference()
    AttentionInterface.register("written_out", reference.attend)
    AttentionMaskInterface.register("written_out", AttentionMaskInterface()["sdpa"])
    model = tiny_model()
    model.set_attn_implementation("written_out")
    cache = DynamicCache()
    logits = model(ids, past_key_values=cache).logits
    reference.choose(method, method.capacity)
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < STEPS:
        if reference.mean_held == BUDGET + BUFFER:
            reference.choose(method, BUDGET)
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens, reference


@pytest.mark.parametrize(
    "method",
    [
        dkv.SnapKV(capacity=24),
        dkv.H2O(capacity=24),
        dkv.StreamingLLM(capacity=24),
        dkv.KeyDiff(capacity=24),
        dkv.DynamicKV(capacity=24),
    ],
    ids=method_name,
)
def test_tokens_and_what_is_held_are_those_chosen_by_hand(method: Any) -> None:
    # A prompt that fits, where what is kept of a prompt is not what is kept of an answer.
    (ids,) = prompts(20 if method.name == "DynamicKV" else 70)
    expected, reference = by_hand(method, ids)
    tokens, cache = served(tiny_model(), method, plain(ids))
    assert tokens[0] == expected
    assert len(cache.choices) == 2
    for place, positions in enumerate(cache.held_positions()):
        for head in range(HEADS):
            assert positions[head].tolist() == np.flatnonzero(reference.held[place][head]).tolist()


@every_method
def test_a_budget_that_everything_fits_in_is_full_kv_token_for_token(method: Any) -> None:
    model, (ids,) = tiny_model(), prompts(70)
    roomy = dkv.build_method(method.name, capacity=500)
    tokens, cache = served(model, roomy, plain(ids), dkv.Decoding(budget=500, buffer=4))
    assert tokens == answers(model, plain(ids), max_new_tokens=STEPS)
    assert cache.choices == []
    llm = tiny_llm()
    full, run = dkv.compare(
        llm,
        DOCUMENT,
        QUESTION,
        methods=[dkv.FullKV(), roomy],
        max_new_tokens=STEPS,
        decoding=dkv.Decoding(budget=500, buffer=4),
    ).runs
    assert run.token_ids == full.token_ids
    assert run.logprobs == full.logprobs
    assert run.forgotten == []


def stored(cache: Any) -> float:
    """Positions per layer and head that memory is taken for, counted from the storage itself."""
    counted = []
    for layer in cache.whole_layers():
        for tensor in (layer.keys, layer.values):
            values = tensor.untyped_storage().nbytes() // tensor.element_size()
            counted.append(values / (tensor.shape[0] * tensor.shape[1] * tensor.shape[3]))
    return sum(counted) / len(counted)


@pytest.mark.parametrize("capacity", [24, 36, 500])
@every_method
def test_no_more_than_budget_and_buffer_is_ever_stored_while_answering(
    method: Any, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks to a buffer, as with large buffers.
    monkeypatch.setattr(kv, "BLOCK", 5)
    monkeypatch.setattr(forgetting, "BLOCK", 5)
    model, (ids,) = tiny_model(), prompts(70)
    sizes: list[float] = []
    asked = dkv.build_method(method.name, capacity=capacity)
    with dkv.compress(model, asked, decoding=DECODING) as cache:
        model.register_forward_hook(lambda *_: sizes.append(stored(cache)))
        answers(model, plain(ids), past_key_values=cache, max_new_tokens=STEPS)
    assert len(sizes) == STEPS
    assert max(sizes) <= BUDGET + BUFFER
    assert len(cache.choices) >= 2
    assert all(bool((kept[:, 1:] > kept[:, :-1]).all()) for kept in cache.held_positions())


@every_method
def test_a_choice_leaves_the_budget_in_the_mean(method: Any, llm: dkv.LoadedModel) -> None:
    run = answered(llm, method)
    length = dkv.prefill(llm, DOCUMENT, QUESTION).length
    assert len(run.forgotten) >= 2
    for choice in run.forgotten:
        mask = choice.retained.unpack(NUM_LAYERS, length + choice.position)
        assert mask.sum() == BUDGET * NUM_LAYERS * HEADS
    places = [choice.position for choice in run.forgotten]
    assert np.diff(places).tolist() == [BUFFER] * (len(places) - 1)


def test_the_time_of_a_choice_is_recorded_and_in_the_step_after_it(llm: dkv.LoadedModel) -> None:
    class Slow(dkv.SnapKV):
        def choose_again(self, layers: Sequence[HeldLayer]) -> list[Tensor]:
            time.sleep(0.05)
            return super().choose_again(layers)

    run = answered(llm, Slow(capacity=24))
    assert run.decoding == {"budget": BUDGET, "buffer": BUFFER}
    assert len(run.forgotten) >= 2
    for choice in run.forgotten:
        assert choice.seconds >= 0.05
        assert run.decode_seconds[choice.position + 1] >= 0.05


def answered(
    llm: dkv.LoadedModel, method: dkv.CompressionMethod, *others: dkv.CompressionMethod
) -> dkv.Run:
    runs = dkv.compare(
        llm,
        DOCUMENT,
        QUESTION,
        methods=[method, *others],
        max_new_tokens=STEPS,
        decoding=DECODING,
    ).runs
    return runs[0]


@every_method
def test_comparing_together_alone_and_generate_itself_say_and_keep_the_same(
    method: Any, llm: dkv.LoadedModel
) -> None:
    alone = answered(llm, method)
    others = [dkv.SnapKV(capacity=30), dkv.SnapKV(capacity=31), dkv.DynamicKV(capacity=29)]
    together = answered(llm, method, *others)
    assert together.decoded_together == 4
    prompt = dkv.prefill(llm, DOCUMENT, QUESTION).prompt
    ids = torch.tensor([prompt.token_ids])
    tokens, cache = served(llm.model, method, plain(ids), max_new_tokens=len(alone.token_ids))
    assert alone.token_ids == together.token_ids == tokens[0]
    kept = [choice.retained for choice in alone.forgotten]
    assert kept == [choice.retained for choice in together.forgotten]
    assert [choice.position for choice in alone.forgotten] == [
        choice.seen - prompt.length for choice in cache.choices
    ]


def test_eager_and_sdpa_choose_alike() -> None:
    method = dkv.DynamicKV(capacity=24)
    runs = [answered(tiny_llm(attention=attention), method) for attention in ("eager", "sdpa")]
    assert runs[0].token_ids == runs[1].token_ids
    assert [c.retained for c in runs[0].forgotten] == [c.retained for c in runs[1].forgotten]


@pytest.mark.parametrize(
    "method", [dkv.H2O(capacity=24), dkv.DynamicKV(capacity=24)], ids=method_name
)
def test_runs_that_share_the_models_own_pass_keep_what_each_keeps_alone(method: Any) -> None:
    llm = tiny_llm(attention="eager")
    others = [dkv.SnapKV(capacity=30), dkv.SnapKV(capacity=31), dkv.H2O(capacity=29)]
    alone, together = answered(llm, method), answered(llm, method, *others)
    assert together.decoded_together == 4
    assert alone.token_ids == together.token_ids
    assert [c.retained for c in alone.forgotten] == [c.retained for c in together.forgotten]


@every_method
def test_rows_of_a_batch_answer_and_keep_as_each_prompt_alone(method: Any) -> None:
    model, rows = tiny_model(), prompts(*LENGTHS)
    together, cache = served(model, method, left_padded(rows))
    assert len({choice.rows for choice in cache.choices}) > 1
    for number, row in enumerate(rows):
        alone, single = served(model, method, plain(row))
        assert together[number] == alone[0]
        pairs = zip(cache.held_positions(number), single.held_positions(), strict=True)
        assert all(torch.equal(mine, own) for mine, own in pairs)
        mine = [choice.seen for choice in cache.choices if number in choice.rows]
        padding = max(LENGTHS) - LENGTHS[number]
        assert mine == [choice.seen + padding for choice in single.choices]


def test_a_short_row_of_a_batch_votes_with_its_own_queries_alone() -> None:
    """It has fewer tokens than the method reads queries; padding stands before them."""
    read: list[int] = []

    class Counting(dkv.ShiftKV):
        def choose_again(self, layers: Sequence[HeldLayer]) -> list[Tensor]:
            read.append(layers[0].queries.shape[1])
            return super().choose_again(layers)

    method = Counting(capacity=24, context_size=48)
    _, cache = served(tiny_model(), method, left_padded(prompts(20, 90)))
    rows = [row for choice in cache.choices for row in choice.rows]
    assert read[rows.index(0)] == BUDGET + BUFFER
    assert read[rows.index(1)] == 48


def test_sampled_answers_to_one_prompt_are_rows_that_forget_for_themselves() -> None:
    model, (row,) = tiny_model(), prompts(70)
    torch.manual_seed(0)
    settings = {"do_sample": True, "num_return_sequences": 3}
    sampled, cache = served(model, dkv.SnapKV(capacity=24), plain(row), **settings)
    assert len({tuple(answer) for answer in sampled}) == 3
    kept = [cache.held_positions(number) for number in range(3)]
    assert any(not torch.equal(mine, other) for mine, other in zip(kept[0], kept[1], strict=True))


@every_method
def test_a_prompt_read_in_chunks_goes_on_as_one_read_at_once(method: Any) -> None:
    model, (row,) = tiny_model(), prompts(70)
    whole, single = served(model, method, plain(row))
    chunked, cache = served(model, method, plain(row), prefill_chunk_size=32)
    assert chunked == whole
    pairs = zip(cache.held_positions(), single.held_positions(), strict=True)
    assert all(torch.equal(mine, own) for mine, own in pairs)


@every_method
@torch.no_grad()
def test_what_was_taken_back_does_not_vote(method: Any) -> None:
    (prompt, answer, drafts), kept = prompts(70, 17, 3), []
    for drafted in (True, False):
        model = tiny_model()
        with dkv.compress(model, method, decoding=DECODING) as cache:
            model(prompt, past_key_values=cache)
            for token in answer.split(1, dim=1):
                if drafted and cache.get_seq_length() == 80:
                    model(drafts, past_key_values=cache)
                    cache.crop(-3)
                model(token, past_key_values=cache)
            (choice,) = cache.choices
            assert choice.seen in (85, 86)  # PyramidKV's rounding keeps a token more of the prompt
            kept.append(cache.held_positions())
    assert all(torch.equal(mine, own) for mine, own in zip(*kept, strict=True))


@every_method
def test_drafts_are_taken_back_before_anything_is_chosen(method: Any) -> None:
    model, (piece,) = tiny_model(), prompts(20)
    inputs = plain(torch.cat([piece] * 4, dim=1))
    sizes: list[float] = []
    with dkv.compress(model, method, decoding=DECODING) as cache:
        model.register_forward_hook(lambda *_: sizes.append(stored(cache)))
        (drafted,) = answers(
            model, inputs, past_key_values=cache, max_new_tokens=STEPS, prompt_lookup_num_tokens=3
        )
    assert len(drafted) == STEPS
    assert len(cache.choices) >= 2
    assert max(sizes) <= BUDGET + BUFFER
    seen = {kept[0, -1].item() for kept in cache.held_positions()}
    assert seen == {cache.get_seq_length() - 1}


def test_more_drafts_than_the_buffer_holds_are_refused_in_a_sentence() -> None:
    model, (piece,) = tiny_model(), prompts(20)
    inputs = plain(torch.cat([piece] * 4, dim=1))
    with pytest.raises(ValueError, match="tokens are fed at once and decoding keeps a buffer of 2"):
        served(
            model,
            dkv.SnapKV(capacity=24),
            inputs,
            dkv.Decoding(budget=24, buffer=2),
            prompt_lookup_num_tokens=8,
        )


def test_a_question_that_follows_is_fed_in_parts_that_fit(llm: dkv.LoadedModel) -> None:
    question = QUESTION * 6
    read = dkv.prefill(llm, DOCUMENT, question, question_aware=False)
    run = dkv.compare(
        llm,
        prefill=read,
        methods=[dkv.SnapKV(capacity=BUDGET)],
        max_new_tokens=4,
        decoding=dkv.Decoding(budget=BUDGET, buffer=9),
    ).runs[0]
    assert [choice.position for choice in run.forgotten][:2] == [0, 0]


def test_surviving_probability_is_measured_on_the_cache_that_forgets(
    llm: dkv.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    follow = alignment.follow

    def watched(*arguments: Any, **named: Any) -> Any:
        for logits in follow(*arguments, **named):
            if named.get("forgetting") is not None:
                fed.append(len(named["forgetting"].choices))
            yield logits

    monkeypatch.setattr(alignment, "follow", watched)
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=24)]
    full, run = dkv.compare(
        llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=STEPS, decoding=DECODING
    ).runs
    assert fed[-1] == (len(full.token_ids) - 2 - (BUDGET + BUFFER - 24)) // BUFFER + 1
    plainly = dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=STEPS).runs[1]
    assert run.aligned is not None
    assert run.aligned != plainly.aligned


def test_without_decoding_nothing_changes_and_none_is_recorded(llm: dkv.LoadedModel) -> None:
    run = dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.SnapKV(capacity=24)]).runs[0]
    assert run.forgotten == []
    assert run.decoding is None


@pytest.mark.parametrize("method", REFUSED, ids=method_name)
def test_what_cannot_choose_again_is_refused_in_a_sentence_before_any_work(
    method: Any, llm: dkv.LoadedModel
) -> None:
    with (
        pytest.raises(ValueError, match="leave decoding out"),
        dkv.compress(llm.model, method, decoding=DECODING),
    ):
        pass
    if method.capabilities.capacity:
        with pytest.raises(ValueError, match="leave decoding out"):
            dkv.compare(llm, DOCUMENT, QUESTION, methods=[method], decoding=DECODING)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dkv.Decoding(budget=0), "budget must be at least 1 token, got 0"),
        (lambda: dkv.Decoding(buffer=True), "buffer must be a whole number of tokens, got True"),
        (lambda: compressing(dkv.SnapKV(capacity=24), dkv.Decoding(budget=8)), "budget 8: capac"),
        (lambda: compressing(dkv.SnapKV(capacity=24), 512), "must be a Decoding"),
        (lambda: compressing(dkv.SnapKV(capacity=24, pinned=[[0, 3]]), DECODING), "leave pinned"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def compressing(method: Any, decoding: Any) -> None:
    with dkv.compress(tiny_model(), method, decoding=decoding):
        pass


def test_what_is_evicted_from_the_prompt_stays_so(llm: dkv.LoadedModel) -> None:
    run = answered(llm, dkv.SnapKV(capacity=24, evicted=[[100, 158]]))
    length = dkv.prefill(llm, DOCUMENT, QUESTION).length
    for choice in run.forgotten:
        mask = choice.retained.unpack(NUM_LAYERS, length + choice.position)
        assert not mask[:, :, 100:158].any()


def test_layers_give_up_more_where_what_they_hold_is_read_less(llm: dkv.LoadedModel) -> None:
    run = answered(llm, dkv.DynamicKV(capacity=24))
    length = dkv.prefill(llm, DOCUMENT, QUESTION).length
    budgets = [
        choice.retained.unpack(NUM_LAYERS, length + choice.position).sum(axis=(1, 2)).tolist()
        for choice in run.forgotten
    ]
    assert all(len(set(layers)) > 1 for layers in budgets)
    assert budgets[0] != budgets[1]


def test_sliding_layers_are_recorded_with_what_they_hold() -> None:
    llm = tiny_llm("gemma3")
    trace = dkv.compare(
        llm,
        DOCUMENT,
        QUESTION,
        methods=[dkv.SnapKV(capacity=24)],
        max_new_tokens=STEPS,
        decoding=DECODING,
    )
    choice = trace.runs[0].forgotten[-1]
    mask = choice.retained.unpack(NUM_LAYERS, trace.prompt.length + choice.position)
    assert mask[0].sum(axis=1).tolist() == [31, 31]
    assert mask[2].sum(axis=1).tolist() == [BUDGET, BUDGET]


def test_a_finished_answer_leaves_no_cache_behind(
    llm: dkv.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[KVLayer]] = []
    keep = KVLayer.keep_places

    def noted(self: KVLayer, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        keep(self, *arguments)

    monkeypatch.setattr(KVLayer, "keep_places", noted)
    gc.collect()
    gc.disable()
    try:
        answered(llm, dkv.SnapKV(capacity=24))
        assert len(made) >= 2 * NUM_LAYERS
        assert all(layer() is None for layer in made)
    finally:
        gc.enable()
