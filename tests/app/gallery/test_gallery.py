"""The gallery: every recorded loss is one, and says of which model, what and why."""

from __future__ import annotations

import json
from collections import Counter

import pytest

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


@pytest.mark.parametrize("name", GALLERY)
def test_what_is_lost_is_said_in_one_line(name: str) -> None:
    lost = GALLERY[name].lost
    assert 20 < len(lost) < 160
    assert lost.count(".") == 1
    assert lost.endswith(".")


def test_cards_say_model_answers_and_address() -> None:
    cards = gallery_payload([*load_examples().values(), *GALLERY.values()])
    assert [card["address"] for card in cards] == [f"?ex={name}" for name in GALLERY]
    for card in cards:
        assert card["rows"][0]["holds"]
        assert not all(row["holds"] for row in card["rows"])


def test_the_gallery_stays_small() -> None:
    size = sum(path.stat().st_size for path in (ASSETS / "gallery").rglob("*") if path.is_file())
    assert size < 1_200_000
