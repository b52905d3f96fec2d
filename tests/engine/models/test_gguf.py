"""GGUF files as llama.cpp writes them, in parts, with rotary scaling, or damaged: what is read is
the model that was written, or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dynamickv as dkv
from dynamickv.models import conversion, gguf
from tests.engine.models.gguf_file import write_model, write_tiny_gguf
from tests.engine.tiny import tiny_model, vocabulary_size

TOKENS = torch.arange(3, 203)[None]
LENGTH = 64
"""What the scaled models were first trained on."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty conversion cache for every test."""
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def require_same(path: Path, model: PreTrainedModel) -> dkv.LoadedModel:
    llm = dkv.load_model(path, device="cpu")
    assert torch.allclose(logits(llm.model), logits(model), atol=1e-5)
    return llm


def refusal_of(path: Path) -> str:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - returned to be looked at
        dkv.load_model(path, device="cpu")
    sentence = str(refusal.value)
    assert "\n" not in sentence
    return sentence


# Parts.


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    first = write_model(tmp_path / "tiny.gguf", tiny_model(), "llama", tensors_per_part=20)
    return sorted(first.parent.glob("tiny-*.gguf"))


@pytest.mark.parametrize("named", [0, 1, -1], ids=["first", "second", "last"])
def test_all_parts_are_read_whichever_is_named(parts: list[Path], named: int, cache: Path) -> None:
    assert len(parts) == 3
    llm = require_same(parts[named], tiny_model())
    assert llm.geometry.max_positions == 2048
    assert [folder.name.startswith("tiny-00001-of-00003") for folder in cache.iterdir()] == [True]


def test_every_part_counts_for_the_revision(parts: list[Path], cache: Path) -> None:
    first = dkv.load_model(parts[0], device="cpu")
    content = bytearray(parts[2].read_bytes())
    content[-40] ^= 1
    parts[2].write_bytes(content)
    assert dkv.load_model(parts[0], device="cpu").revision != first.revision
    assert len(list(cache.iterdir())) == 2


@pytest.fixture
def second_process() -> Iterator[None]:
    """As if this process were the second of two that work together."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_process")
def test_any_process_of_several_converts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model(), "llama")
    names = {file.name for file in dkv.models.converted(path).iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    require_same(path, tiny_model())


def test_a_conversion_without_weights_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model(), "llama")
    kept = dkv.models.converted(path)
    manifest = json.loads((kept / "manifest.json").read_text("utf-8"))
    # As the second process of several left it before.
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (kept / name).unlink()
        del manifest["files"][name]
    (kept / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    require_same(path, tiny_model())
    assert "no weights were written" in caplog.text


def test_a_kept_conversion_is_loaded_with_one_reading_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    revision = dkv.load_model(path, device="cpu").revision
    hashed, real = [], conversion.file_hash
    monkeypatch.setattr(conversion, "file_hash", lambda *p: hashed.append(p) or real(*p))
    assert dkv.load_model(path, device="cpu").revision == revision == f"gguf-{real(path)[:12]}"
    assert hashed == [(path,)]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named_before_anything_is_built(
    parts: list[Path], missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts[missing].unlink()
    monkeypatch.setattr(conversion, "_read_model", lambda *_: pytest.fail("built"))
    sentence = refusal_of(parts[(missing + 1) % 3])
    assert f"{parts[missing].name} is missing; put all parts into one folder" in sentence


def test_a_part_under_another_name_is_refused_with_its_number(parts: list[Path]) -> None:
    other = parts[1].rename(parts[1].with_name("second.gguf"))
    assert "second.gguf is part 2 of 3, but its name does not say so" in refusal_of(other)


def test_parts_of_other_models_are_noticed(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[0], parts[1])
    sentence = refusal_of(parts[0])
    assert "the parts of tiny-00001-of-00003.gguf hold 37 tensors of 57" in sentence


# Weights.


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "output_norm.weight", "blk.3.ffn_up.weight", "blk.0.attn_k.bias"]
)
def test_a_missing_tensor_is_named_before_anything_is_built(
    tmp_path: Path, name: str, cache: Path
) -> None:
    family = ("qwen2", "qwen2") if "bias" in name else ("llama", "llama")
    path = write_model(tmp_path / "a.gguf", tiny_model(family[0]), family[1], without=[name])
    assert f"a.gguf lacks the tensor {name}, which a {family[1]} model needs" in refusal_of(path)
    assert not list(cache.iterdir())


def test_a_tensor_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    settings = {"feed_forward_length": 96}
    path = write_model(tmp_path / "a.gguf", tiny_model(), "llama", settings=settings)
    sentence = refusal_of(path)
    assert "a.gguf says that blk.0.ffn_gate.weight has (96, 48) numbers" in sentence
    assert "holds (64, 48)" in sentence


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "a.gguf", tiny_model(), "llama", tensors={"blk.0.attn_sinks.weight": np.ones(6)}
    )
    assert "a.gguf holds the tensor blk.0.attn_sinks.weight, for which" in refusal_of(path)


def test_the_biases_of_a_llama_are_read(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True)
    require_same(write_model(tmp_path / "a.gguf", model, "llama"), model)


def test_experts_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    settings = {"expert_count": 8}
    path = write_model(tmp_path / "a.gguf", tiny_model(), "llama", settings=settings)
    assert "a llama model with 8 experts" in refusal_of(path)


@pytest.mark.parametrize("left", [0.999, 0.7, 0.05, 0.001])
def test_a_file_that_was_cut_off_is_refused_before_anything_is_built(
    tmp_path: Path, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "cut.gguf")
    os.truncate(path, int(path.stat().st_size * left))
    monkeypatch.setattr(conversion, "_read_model", lambda *_: pytest.fail("built"))
    sentence = refusal_of(path)
    assert "cut.gguf cannot be read as a language model (its " in sentence
    assert "download it again" in sentence


def test_a_head_size_that_is_no_fraction_of_the_width_is_read(tmp_path: Path) -> None:
    model = tiny_model("qwen3", head_dim=16)
    llm = require_same(write_model(tmp_path / "a.gguf", model, "qwen3"), model)
    assert llm.geometry.head_dim == 16


# Rotary scaling.


def scaled(kind: str, family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Frequencies differ enough for 200 tokens to show."""
    theta = {"rope_theta": 10000.0, "rope_type": kind}
    return tiny_model(family, rope_parameters={**theta, **changes})


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LENGTH,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": LENGTH}
YARN_SETTINGS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": LENGTH,
}


def frequencies(model: PreTrainedModel) -> Tensor:
    """The divisors that llama.cpp's converter writes for a Llama 3.1."""
    plain = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    return plain / scaled


@pytest.mark.parametrize("original", [16, LENGTH, 256, 8192])
def test_llama3s_frequencies_are_read(tmp_path: Path, original: int) -> None:
    model = scaled("llama3", **{**LLAMA3, "original_max_position_embeddings": original})
    tensors = {"rope_freqs.weight": frequencies(model).numpy()}
    llm = require_same(write_model(tmp_path / "a.gguf", model, "llama", tensors=tensors), model)
    assert llm.model.config.rope_parameters["rope_type"] == "llama3"
    assert not torch.allclose(logits(model), logits(tiny_model()), atol=1e-2)


def test_frequencies_that_are_not_llama3s_are_refused(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.array([1.0, 3.0, 2.0, 5.0])}
    path = write_model(tmp_path / "a.gguf", tiny_model(), "llama", tensors=tensors)
    assert "a.gguf divides its rotary frequencies (rope_freqs.weight) otherwise" in refusal_of(path)


def test_frequencies_that_change_nothing_are_no_scaling(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.ones(4)}
    require_same(
        write_model(tmp_path / "a.gguf", tiny_model(), "llama", tensors=tensors), tiny_model()
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (("yarn", YARN), YARN_SETTINGS),
        (
            ("yarn", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
            {
                **YARN_SETTINGS,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
        ),
        (
            ("yarn", {**YARN, "attention_factor": 0.5 * (0.1 * float(np.log(4.0)) + 1)}),
            {**YARN_SETTINGS, "rope.scaling.attn_factor": 0.5},
        ),
        (("linear", {"factor": 4.0}), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (("linear", {"factor": 4.0}), {"rope.scale_linear": 4.0}),
        (("default", {}), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    ],
    ids=["yarn", "yarn-betas", "yarn-attention", "linear", "old-linear", "none"],
)
def test_scaling_is_read_from_the_settings(
    tmp_path: Path, family: str, model: tuple[str, dict[str, Any]], settings: dict[str, Any]
) -> None:
    written = scaled(model[0], family, **model[1])
    path = write_model(tmp_path / "a.gguf", written, family, settings=settings)
    require_same(path, written)
    if model[0] != "default":
        assert not torch.allclose(logits(written), logits(tiny_model(family)), atol=1e-2)


def test_gemma3s_scaling_is_that_of_its_whole_layers(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    written = tiny_model("gemma3", rope_parameters=deepcopy(rope), tie_word_embeddings=True)
    settings = {
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 20000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "attention.sliding_window": 32,
    }
    path = write_model(tmp_path / "a.gguf", written, "gemma3", settings=settings)
    config = dkv.models.converted(path) / "config.json"
    read = json.loads(config.read_text("utf-8"))["rope_parameters"]
    assert read == rope


def test_scaling_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    settings = {"rope.scaling.type": "spiral", "rope.scaling.factor": 2.0}
    path = write_model(tmp_path / "a.gguf", tiny_model(), "llama", settings=settings)
    assert "in the way 'spiral' (rope.scaling.type), which is not known" in refusal_of(path)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_rotation_of_part_of_a_head_is_refused_where_the_model_cannot(
    tmp_path: Path, family: str
) -> None:
    settings = {"rope.dimension_count": 4}
    path = write_model(tmp_path / "a.gguf", tiny_model(family), family, settings=settings)
    assert f"rotates 4 of 8 numbers of a head ({family}.rope.dimension_count)" in refusal_of(path)


@pytest.mark.parametrize(
    "key", ["logit_scale", "residual_scale", "attention.clamp_kqv", "rope.scaling.yarn_ext_factor"]
)
def test_a_setting_that_the_model_cannot_follow_is_refused(tmp_path: Path, key: str) -> None:
    path = write_model(tmp_path / "a.gguf", tiny_model(), "llama", settings={key: 0.5})
    assert f"a.gguf sets llama.{key} to 0.5" in refusal_of(path)


# Versions.


def test_a_conversion_from_before_is_made_again_once(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    kept = dkv.models.converted(path)
    manifest = json.loads((kept / "manifest.json").read_text("utf-8"))
    del manifest["version"]
    # Files were checked otherwise then, which is no damage.
    manifest["files"] = {name: [size, 1] for name, (size, _) in manifest["files"].items()}
    (kept / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with caplog.at_level("INFO", "dynamickv"):
        assert dkv.models.converted(path) == kept
        assert dkv.models.converted(path) == kept
    said = [message for message in caplog.messages if "Converting tiny.gguf again" in message]
    assert len(said) == 1
    assert not any("damaged" in message for message in caplog.messages)
    assert list(cache.iterdir()) == [kept]


def test_the_end_of_a_turn_ends_answers_too(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", tiny_model(), "llama", eot_token_id=2)
    assert dkv.load_model(path, device="cpu").stop_ids == {1, 2}


# The file itself.

HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a later version": lambda whole: whole[:4] + b"\x09" + whole[5:],
    "the other byte order": lambda whole: whole[:4] + b"\x00\x00\x00\x03" + whole[8:],
    "too many entries": lambda whole: whole[:16] + b"\xff" * 8 + whole[24:],
    "too many tensors": lambda whole: whole[:8] + b"\xff\xff\xff\x00" + whole[12:],
    "a key beyond the end": lambda whole: whole[:24] + b"\xff" * 4 + whole[28:],
}


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_a_damaged_header_is_one_sentence(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(damage(path.read_bytes()))
    assert "tiny.gguf cannot be read as a language model" in refusal_of(path)


def test_the_joined_file_is_what_the_gguf_library_would_read(
    parts: list[Path], tmp_path: Path
) -> None:
    from gguf import GGUFReader

    gguf.write_joined(gguf.read(parts[0]), tmp_path / "joined.gguf")
    joined = {t.name: t.data for t in GGUFReader(tmp_path / "joined.gguf").tensors}
    apart = {t.name: t.data for part in parts for t in GGUFReader(part).tensors}
    assert list(joined) == list(apart)
    assert all(np.array_equal(joined[name], apart[name]) for name in apart)
    fields = GGUFReader(tmp_path / "joined.gguf").fields
    assert fields["llama.vocab_size"].contents() == vocabulary_size()
    assert "split.count" not in fields
