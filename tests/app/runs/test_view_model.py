"""Every method in words."""

from __future__ import annotations

import dynamickv as dkv
from app.runs.view_model import method_cards


def test_every_method_has_its_card_with_source_and_departures() -> None:
    cards = method_cards()
    for name in dkv.METHODS:
        assert f"#### {name}" in cards
    assert "https://arxiv.org/abs/2412.14838" in cards
    assert "Departures from the authors' code" in cards
    assert "`update_interval`" in cards
