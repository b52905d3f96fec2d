"""Precision "fast" changes how products round and nothing else; where a CPU cannot, it is exact."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Format

import dynamickv as dkv
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode import feeder
from dynamickv.fast.packed import PackedWeights
from dynamickv.models import precision
from dynamickv.models.precision import packed_for
from dynamickv.scoring import attention_mass
from tests.engine.models.gguf_file import write_tiny_gguf
from tests.engine.test_codes import quantized
from tests.engine.test_packed import needs_fast
from tests.engine.tiny import DOCUMENT, FAMILIES, QUESTION, tiny_llm, tiny_model


def both(family: str = "llama") -> tuple[dkv.LoadedModel, dkv.LoadedModel]:
    """One model, exact and fast."""
    exact = tiny_llm(family, initializer_range=0.05)
    return exact, dataclasses.replace(exact, packed=PackedWeights(exact.model))


def biased() -> tuple[dkv.LoadedModel, dkv.LoadedModel]:
    """`both`, with a bias in every projection of the attention."""
    exact = tiny_llm("llama", initializer_range=0.05, attention_bias=True)
    made = torch.Generator().manual_seed(1)
    for name, weight in exact.model.named_parameters():
        if name.endswith("_proj.bias"):
            weight.data.normal_(std=0.3, generator=made)
    return exact, dataclasses.replace(exact, packed=PackedWeights(exact.model))


def close(fast: torch.Tensor, exact: torch.Tensor, share: float = 0.03) -> bool:
    return bool((fast - exact).norm() < share * exact.norm())


@needs_fast
def test_biases_of_the_attention_are_added() -> None:
    exact, fast = (dkv.prefill(llm, DOCUMENT, QUESTION) for llm in biased())
    assert close(fast.logits, exact.logits)
    exact_run, fast_run = (
        dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=4).runs[0]
        for llm in biased()
    )
    assert fast_run.logprobs == pytest.approx(exact_run.logprobs, abs=0.05)


@needs_fast
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_prompt_longer_than_the_parts_it_is_turned_in(family: str) -> None:
    exact, fast = (dkv.prefill(llm, DOCUMENT * 6, QUESTION) for llm in both(family))
    assert exact.length > 600
    for own, wanted in zip(fast.keys, exact.keys, strict=True):
        assert (own.float() - wanted).abs().amax() < 0.15 * wanted.abs().amax()
    assert close(fast.logits, exact.logits)


@needs_fast
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fast_prefill_records_what_an_exact_one_does(family: str) -> None:
    exact, fast = (dkv.prefill(llm, DOCUMENT, QUESTION, mass=True) for llm in both(family))
    assert len(fast.layers) == len(exact.layers)
    assert not torch.equal(fast.logits, exact.logits), "nothing was computed from packed weights"
    assert close(fast.logits, exact.logits)
    # Gemma's layers are its own code's, which computes in float32.
    held = torch.float32 if family == "gemma3" else torch.bfloat16
    for kept, true in zip([*fast.keys, *fast.values], [*exact.keys, *exact.values], strict=True):
        assert (kept.shape, kept.dtype) == (true.shape, held)
        assert close(kept, true)
    for layer, true_layer in zip(fast.layers, exact.layers, strict=True):
        assert layer.scaling == true_layer.scaling
        assert close(layer.queries, true_layer.queries)
        assert layer.mass is not None
        assert true_layer.mass is not None
        assert close(layer.mass, true_layer.mass)


@needs_fast
def test_the_attention_received_is_that_of_the_layers_own_queries() -> None:
    prefill = dkv.prefill(both()[1], DOCUMENT, QUESTION, mass=True, tail=10**6)
    for layer in prefill.layers:
        assert layer.mass is not None
        assert close(layer.mass, attention_mass(layer.queries, layer.keys, layer.scaling), 0.01)


@needs_fast
@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("last", [1, 16, 10**6])
def test_what_the_last_layer_leaves_out_was_for_nothing(
    last: int, mass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_pass = pytest.importorskip("dynamickv.reading.fast_pass", reason="needs numba")
    exact, fast = both()
    monkeypatch.setattr(fast_pass, "LAST", last)
    asked = []
    attention = fast_pass.causal_attention

    def note(queries: torch.Tensor, *others: object, **options: object) -> object:
        asked.append(queries.shape[1])
        return attention(queries, *others, **options)

    monkeypatch.setattr(fast_pass, "causal_attention", note)
    read, true = (dkv.prefill(llm, DOCUMENT, QUESTION, mass=mass) for llm in (fast, exact))
    assert close(read.logits, true.logits)
    for layer, true_layer in zip(read.layers, true.layers, strict=True):
        assert close(layer.queries, true_layer.queries)
    whole = read.length
    assert asked == [whole] * (len(read.layers) - 1) + [whole if mass else min(last, whole)]


@needs_fast
def test_a_fast_prefill_that_is_dropped_is_gone_at_once() -> None:
    llm = both()[1]
    gc.collect()
    gc.disable()
    try:
        kept = weakref.ref(dkv.prefill(llm, DOCUMENT, QUESTION).layers[0].queries)
        assert kept() is None
    finally:
        gc.enable()


@needs_fast
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_fast_steps_say_what_exact_ones_do(family: str, rows: int) -> None:
    exact, fast = both(family)
    prefill = dkv.prefill(exact, DOCUMENT, QUESTION)
    retention = dkv.DynamicKV(capacity=48).select(prefill.layers)
    if rows > 1 and family == "gemma3":
        pytest.skip("sliding layers are fed alone")
    logits = []
    for llm in (exact, fast):
        caches: list[KVCache] = [prune(prefill, retention, 8) for _ in range(rows)]
        feed = feeder(llm, caches[0].plain)
        places = [prefill.length + row for row in range(rows)]
        logits.append(feed(caches, [5 + row for row in range(rows)], places))
    assert logits[1].dtype == torch.float32
    assert not torch.equal(*logits)
    assert close(logits[1], logits[0])


@needs_fast
def test_a_fast_model_generates_as_before_and_holds_the_same_weights() -> None:
    exact, fast = both()
    before = {name: value.clone() for name, value in exact.model.state_dict().items()}
    dkv.compare(fast, DOCUMENT, QUESTION, methods=[dkv.H2O(capacity=48)], max_new_tokens=4)
    prompt = torch.arange(5, 45)[None]
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    after = exact.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    plain = tiny_model("llama", initializer_range=0.05)
    with torch.inference_mode():
        assert torch.equal(exact.model(prompt).logits, plain(prompt).logits)
        said = [
            model.generate(prompt, max_new_tokens=6, **settings) for model in (exact.model, plain)
        ]
    assert torch.equal(*said)


def test_an_unknown_precision_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="precision must be auto, exact, fast, got 'quick'"):
        dkv.load_model("no such model", precision="quick")


@pytest.mark.parametrize(
    ("asked", "bits", "is_fast"),
    [
        ("auto", None, False),
        ("auto", 16.0, False),
        ("auto", 8.5, True),
        ("exact", 4.5, False),
        ("fast", None, True),
    ],
)
def test_fast_is_for_who_asks_and_for_weights_below_sixteen_bits(
    asked: str, bits: float | None, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_products", lambda: True)
    assert (packed_for(asked, tiny_model(), bits) is not None) == is_fast


@pytest.mark.model
def test_the_embedded_model_is_fast_where_the_cpu_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dkv.load_model(device="cpu", precision="exact").precision == "exact"
    monkeypatch.setattr(precision, "has_fast_products", lambda: False)
    assert dkv.load_model(device="cpu").precision == "exact"
    monkeypatch.setattr(precision, "has_fast_products", lambda: True)
    assert dkv.load_model(device="cpu").precision == "fast"


def test_a_file_of_wide_weights_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_products", lambda: True)
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "cache"))
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert dkv.load_model(file, device="cpu").precision == "exact"
    assert dkv.load_model(file, device="cpu", precision="fast").precision == "fast"


@pytest.mark.parametrize("lacking", ["instructions", "memory", "float32"])
def test_where_fast_cannot_be_it_is_exact(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_products", lambda: lacking != "instructions")
    if lacking == "memory":
        monkeypatch.setattr(precision, "free_host_memory", lambda: 1000)
    model = tiny_model().to(torch.bfloat16 if lacking == "float32" else torch.float32)
    assert packed_for("fast", model) is None


def test_a_models_precision_is_on_record() -> None:
    exact, fast = both()
    assert (exact.precision, fast.precision) == ("exact", "fast")


@needs_fast
def test_four_bit_weights_are_decoded_from_their_four_bits() -> None:
    exact = tiny_llm(hidden_size=96, initializer_range=0.05)
    for layer in exact.model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data = quantized(Format.Q4_1, linear.weight.data)
    packed = PackedWeights(exact.model)
    prefill = dkv.prefill(exact, DOCUMENT, QUESTION)
    logits = [
        feeder(llm, True)(
            [prune(prefill, dkv.FullKV().select(prefill.layers), 8)], [5], [prefill.length]
        )
        for llm in (exact, dataclasses.replace(exact, packed=packed))
    ]
    mlp = exact.model.model.layers[0].mlp
    assert packed.of(mlp.gate_proj, mlp.up_proj).narrow is not None
    assert packed.of(mlp.down_proj).narrow is None
    assert close(logits[1], logits[0])
