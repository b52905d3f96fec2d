"""The gallery: every recorded loss is one, and says of which model, what and why."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

import dynamickv as dkv
from app.examples import ASSETS, load_examples, load_gallery
from app.gallery.view_model import gallery_payload

GALLERY = load_gallery()


def test_every_entry_has_a_readable_record() -> None:
    entries = json.loads((ASSETS / "gallery" / "gallery.json").read_text(encoding="utf-8"))
    assert [entry["id"] for entry in entries] == list(GALLERY)
    assert not set(GALLERY) & set(load_examples())


def test_three_models_have_two_losses_each() -> None:
    assert all(number >= 2 for number in Counter(e.model for e in GALLERY.values()).values())
    assert len({example.model for example in GALLERY.values()}) >= 3


@pytest.mark.parametrize("name", GALLERY)
def test_the_full_cache_holds_the_facts_and_a_compressed_one_does_not(name: str) -> None:
    example = GALLERY[name]
    assert example.trace is not None
    held = {run.method: all(example.facts_in(run.answer)) for run in example.trace.runs}
    assert held.pop("FullKV")
    assert not all(held.values())
    assert example.is_document(example.document)
    assert example.trace.prompt.question == example.question
    assert {run.parameters.get("capacity") for run in example.trace.runs} >= {example.capacity}
    assert example.reads is not None


def test_a_loss_of_a_model_that_is_not_offered_says_so() -> None:
    cards = {card["id"]: card for card in gallery_payload(GALLERY.values(), dkv.KNOWN_MODELS)}
    assert cards["loss-key-smollm2"]["elsewhere"] == ""
    assert cards["loss-glass-gemma"]["elsewhere"].startswith(
        "Recorded with gemma-3-270m-q4_k_m.gguf, which this page does not offer"
    )


@pytest.mark.parametrize("name", GALLERY)
def test_records_name_no_folder_of_a_machine(name: str) -> None:
    trace = GALLERY[name].trace
    assert trace is not None
    assert "/" not in trace.model.name


@pytest.mark.parametrize("name", GALLERY)
def test_what_is_lost_is_said_in_one_line(name: str) -> None:
    lost = GALLERY[name].lost
    assert 20 < len(lost) < 160
    assert lost.count(".") == 1
    assert lost.endswith(".")


def kept(name: str, method: str, phrase: str) -> np.ndarray:
    """Whether each head of each compressed layer keeps each token of a phrase: (layers, heads,
    tokens)."""
    trace = GALLERY[name].trace
    assert trace is not None
    prompt, layers = trace.prompt, trace.model.num_layers
    before = prompt.text[: prompt.text.index(phrase)]
    first = len(before.encode("utf-16-le")) // 2
    end = first + len(phrase.encode("utf-16-le")) // 2
    places = [i for i, (a, b) in enumerate(prompt.text_utf16_offsets) if a < end and b > first]
    compressed = [i for i in range(layers) if i not in trace.model.uncompressed]
    mask = trace.run(method).retained.unpack(layers, prompt.length)
    found: np.ndarray = mask[compressed][:, :, places]
    return found


def test_why_a_word_is_lost_is_what_the_record_holds() -> None:
    shares = {
        ("loss-key-smollm2", "DynamicKV", "goose"): 0.18,
        ("loss-key-smollm2", "SnapKV", "goose"): 0.28,
        ("loss-call-sign-smollm2", "DynamicKV", "Seven"): 0.07,
        ("loss-call-sign-smollm2", "SnapKV", "Seven"): 0.10,
        ("loss-glass-qwen", "DynamicKV", "three are chipped"): 0.10,
    }
    for (name, method, phrase), share in shares.items():
        held = kept(name, method, phrase)[:, :, 0].mean()
        assert held == pytest.approx(share, abs=0.006), name
        assert f"{100 * share:.0f} %" in GALLERY[name].lost
    digits = kept("loss-glass-qwen", "DynamicKV", "1,176")[:, :, 2:].mean(axis=(0, 1))
    assert digits == pytest.approx([0.06] * 3, abs=0.006)
    whole = {
        phrase: kept("loss-steps-qwen", "PyramidKV", phrase).all(axis=2).any(axis=1).sum()
        for phrase in ("31 metres", "142 steps")
    }
    assert whole == {"31 metres": 3, "142 steps": 1}
    for method in ("SnapKV", "DynamicKV"):
        assert not kept("loss-glass-gemma", method, "1,176")[:, :, 3].any()
        assert not kept("loss-steps-gemma", method, "142 steps")[:, :, 0].any()
        assert kept("loss-steps-gemma", method, "142 steps").shape[0] == 3


def test_cards_say_model_answers_and_address() -> None:
    cards = gallery_payload([*load_examples().values(), *GALLERY.values()])
    assert [card["address"] for card in cards] == [f"?ex={name}" for name in GALLERY]
    for card in cards:
        assert card["rows"][0]["holds"]
        assert not all(row["holds"] for row in card["rows"])


def test_the_gallery_stays_small() -> None:
    size = sum(path.stat().st_size for path in (ASSETS / "gallery").rglob("*") if path.is_file())
    assert size < 1_200_000
