"""4- and 8-bit weights through bitsandbytes: everything runs on them, and what cannot is refused.

Seen with bitsandbytes 0.50.2, torch 2.13.0 and transformers 5.23.0 on a CPU with AVX-512: all
methods work with both packings, in explore and in serve mode. The tiny model's logits are off by
0.31 (4bit) and 0.04 (8bit) of their standard deviation; its weights take 0.22 and 0.33 of float32's
bytes. SmolLM2 takes 159 and 209 MiB instead of 513 and decodes a token in 80, 190 and 175 ms with
one thread. The 4bit kernel for CPUs wants a multiple of 32 outputs from every layer ("N must be
divisible by block_n"); the 8bit one takes any, and warns of every product that it rounds the input.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import dynamickv as dkv
from dynamickv.cli import main
from tests.engine.models.test_embedded import ASKED, REPORT
from tests.engine.tiny import DOCUMENT, QUESTION, small_instances, tiny_model, tiny_tokenizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install bitsandbytes)",
)
PACKINGS = ("4bit", "8bit")
# The tiny geometry's KV heads have 16 outputs together, half of what the 4bit kernel wants.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.09,
}


def saved(folder: Path, **changes: Any) -> Path:
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("packed"), **SIZES)


@pytest.fixture(scope="module", params=PACKINGS)
def llm(request: pytest.FixtureRequest, folder: Path) -> dkv.LoadedModel:
    return dkv.load_model(folder, device="cpu", quantization=request.param)


def logits_of(llm: dkv.LoadedModel) -> Tensor:
    with torch.no_grad():
        return llm.model(torch.arange(3, 90)[None]).logits[0].float()


# With bitsandbytes.


@needs_bitsandbytes
def test_the_weights_are_packed_and_the_number_format_says_so(
    llm: dkv.LoadedModel, folder: Path
) -> None:
    packing = llm.quantization
    assert packing in PACKINGS
    assert llm.dtype == f"float32 with {packing} weights"
    plain = dkv.load_model(folder, device="cpu")
    assert (plain.quantization, plain.dtype) == (None, "float32")
    share = llm.model.get_memory_footprint() / plain.model.get_memory_footprint()
    assert share < (0.25 if packing == "4bit" else 0.36)
    layer = llm.model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == (torch.uint8 if packing == "4bit" else torch.int8)


@needs_bitsandbytes
def test_packed_weights_compute_nearly_what_the_weights_do(
    llm: dkv.LoadedModel, folder: Path
) -> None:
    expected = logits_of(dkv.load_model(folder, device="cpu"))
    error = (logits_of(llm) - expected).pow(2).mean().sqrt() / expected.std()
    assert 0 < error < (0.5 if llm.quantization == "4bit" else 0.08)


@needs_bitsandbytes
def test_every_method_runs_and_full_kv_answers_like_generate(llm: dkv.LoadedModel) -> None:
    methods = small_instances(24)
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=methods, max_new_tokens=8)
    assert trace.model.dtype == f"float32 with {llm.quantization} weights"
    assert [run.method for run in trace.runs] == [method.name for method in methods]
    prompt = torch.tensor([dkv.prefill(llm, DOCUMENT, QUESTION).prompt.token_ids])
    output = llm.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    full = next(run for run in trace.runs if run.method == "FullKV")
    assert full.token_ids == output[0, prompt.shape[1] :].tolist()
    per_token = 2 * 6 * 2 * 32 * 4
    assert full.kv_bytes_full == trace.prompt.length * per_token


@needs_bitsandbytes
@pytest.mark.parametrize("method", small_instances(24), ids=lambda method: method.name)
def test_serving_answers_what_exploring_does(llm: dkv.LoadedModel, method: Any) -> None:
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION, mass=True)
    explored = dkv.compare(llm, prefill=prefill, methods=[method], max_new_tokens=8)
    prompt = torch.tensor([prefill.prompt.token_ids])
    with dkv.compress(llm.model, method) as cache:
        output = llm.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
        )
    assert output[0, prompt.shape[1] :].tolist() == explored.runs[0].token_ids


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_half_precision_is_what_packed_weights_compute_in(
    folder: Path, packing: str, dtype: str
) -> None:
    llm = dkv.load_model(folder, device="cpu", dtype=dtype, quantization=packing)
    assert llm.dtype == f"{dtype} with {packing} weights"
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    assert prefill.layers[0].keys.dtype == getattr(torch, dtype)
    trace = dkv.compare(llm, prefill=prefill, methods=[dkv.FullKV()], max_new_tokens=2)
    assert len(trace.runs[0].token_ids) == 2


@needs_bitsandbytes
def test_a_checkpoint_saved_packed_is_taken_as_it_is(
    llm: dkv.LoadedModel, folder: Path, tmp_path: Path
) -> None:
    packing = llm.quantization
    settings = BitsAndBytesConfig(**{f"load_in_{packing}": True}, bnb_4bit_quant_type="nf4")
    # Saved before it computes: bitsandbytes 0.50.2 writes 4bit weights wrongly after a CPU used
    # them (and leaves the model in memory wrong), with transformers alone as well.
    fresh = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    fresh.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again = dkv.load_model(tmp_path, device="cpu")
    assert again.dtype == llm.dtype
    torch.testing.assert_close(logits_of(again), logits_of(llm), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="is quantized already; load it without quantization"):
        dkv.load_model(tmp_path, device="cpu", quantization="4bit")


@needs_bitsandbytes
def test_sizes_that_no_kernel_takes_are_refused_while_loading(tmp_path: Path) -> None:
    odd = saved(tmp_path)
    assert dkv.load_model(odd, device="cpu", quantization="8bit").quantization == "8bit"
    try:
        llm = dkv.load_model(odd, device="cpu", quantization="4bit")
    except ValueError as refusal:
        sentence = str(refusal)
        assert "cpu cannot compute with the 4bit weights of" in sentence
        assert "choose another quantization or load without" in sentence
        assert "\n" not in sentence
    else:  # a CPU whose kernel packs nothing
        assert logits_of(llm).isfinite().all()


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("packing", PACKINGS)
def test_smollm2_mostly_goes_on_as_it_does_unpacked(packing: str) -> None:
    """Likeliest next token at each of 162 positions: 62 % (4bit) and 92 % (8bit) the same."""
    llm = dkv.load_model(device="cpu", quantization=packing)
    prefill = dkv.prefill(llm, REPORT, ASKED)
    ids = torch.tensor([prefill.prompt.token_ids])
    plain = dkv.load_model(device="cpu")
    with torch.no_grad():
        ours, theirs = (model(ids).logits[0].argmax(-1) for model in (llm.model, plain.model))
    assert (ours == theirs).float().mean() > (0.55 if packing == "4bit" else 0.85)
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=96), dkv.DynamicKV(capacity=96)]
    trace = dkv.compare(llm, prefill=prefill, methods=methods, max_new_tokens=8)
    assert trace.model.dtype == f"float32 with {packing} weights"
    assert all(run.answer.strip() for run in trace.runs)


@needs_bitsandbytes
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_command_line_packs(
    folder: Path, tmp_path: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = on_command_line(folder, tmp_path, packing, capsys)
    assert code == 0
    assert f"(float32 with {packing} weights on cpu" in said.out or torch.cuda.is_available()
    assert f"with {packing} weights" in said.out


# Without.


def on_command_line(
    folder: Path, tmp_path: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, Any]:
    (tmp_path / "document.txt").write_text(DOCUMENT, "utf-8")
    options = {
        "--document": str(tmp_path / "document.txt"),
        "--question": QUESTION,
        "--model": str(folder),
        "--capacity": "24",
        "--max-new-tokens": "2",
        "--quantization": packing,
    }
    capsys.readouterr()
    code = main(["compare", *(word for option in options.items() for word in option)])
    return code, capsys.readouterr()


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    # None is how Python itself marks a module that must not be found.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.usefixtures("without_bitsandbytes")
@pytest.mark.parametrize("packing", PACKINGS)
def test_missing_bitsandbytes_is_named_before_anything_is_read(packing: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        dkv.load_model("/no/such/folder", quantization=packing)
    assert str(refusal.value) == (
        f"{packing} weights need bitsandbytes, which is not installed; "
        "pip install bitsandbytes, or load without quantization"
    )


@pytest.mark.usefixtures("without_bitsandbytes")
def test_the_command_line_says_it_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = on_command_line(folder, tmp_path, "4bit", capsys)
    assert code == 2
    assert said.out == ""
    assert said.err.strip().startswith("error: 4bit weights need bitsandbytes, which is not")
    assert said.err.count("\n") == 1


def test_a_bitsandbytes_that_does_not_start_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no driver\\nsecond line')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with pytest.raises(ValueError, match=r"which cannot be used \(no driver\); pip install"):
        dkv.load_model("/no/such/folder", quantization="8bit")


@pytest.mark.parametrize("packing", ["2bit", "", "4", "nf4"])
def test_an_unknown_quantization_is_named(packing: str) -> None:
    sentence = rf"quantization must be 4bit, 8bit or None, got '{packing}'"
    with pytest.raises(ValueError, match=sentence):
        dkv.load_model("/no/such/folder", quantization=packing)


def test_a_device_without_kernels_is_refused_in_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers looks for kernels when it loads; what it says becomes the reason."""
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: True)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("None of the available devices are supported\nby this version")

    monkeypatch.setattr(
        quantizer_bnb_4bit.Bnb4BitHfQuantizer, "validate_environment", refuse, raising=True
    )
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        dkv.load_model(folder, device="cpu", quantization="4bit")
    assert "None of the available devices are supported" in str(refusal.value)
