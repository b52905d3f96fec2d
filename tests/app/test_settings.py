"""The table of settings: what the form, the checks and the what-if panel take from it."""

from __future__ import annotations

import math
from typing import Any

import pytest

import dynamickv as dkv
from app import inputs, settings
from app.explore.layout import TypedSlider, setting_widget
from app.explore.view_model import capacity_readout
from app.inputs import whole_number
from app.theme import METHOD_STYLES, method_style


def test_untouched_settings_leave_every_method_its_own_defaults() -> None:
    form = {"capacity": 128} | settings.form_defaults()
    for name in settings.offered_methods():
        assert inputs.build_method(name, form) == inputs.build_method(name, {"capacity": 128})


def test_every_offered_method_runs_from_a_capacity_alone() -> None:
    for name in settings.offered_methods():
        assert inputs.build_method(name, {"capacity": 128}).name == name
    assert {"FullKV", "SnapKV", "DynamicKV"} <= set(settings.offered_methods())


def test_every_offered_method_has_its_own_look() -> None:
    looks = [method_style(name) for name in settings.offered_methods()]
    assert len({look.light for look in looks}) == len({look.glyph for look in looks}) == len(looks)
    assert method_style("Unheard of") not in METHOD_STYLES.values()


def test_methods_listed_are_the_engine_s() -> None:
    assert set(settings.offered_methods()) <= set(dkv.METHODS)


def test_the_what_if_panel_offers_no_setting_whose_default_is_not_the_methods() -> None:
    """LAVa's heads part unasked: a control that reads "uniform" would say otherwise."""
    form = settings.what_if_form()
    assert "head_budgets" in form["methods"]["SnapKV"]
    assert "head_budgets" not in form["methods"]["LAVa"]
    assert form["methods"]["KeyDiff"] == ["capacity", "granularity"]
    assert {"tau1", "tau2", "gamma"} <= set(form["methods"]["CAKE"])
    assert not {"kernel_size", "pooling"} & set(form["methods"]["CAKE"])
    for name, offered in form["methods"].items():
        own = settings.defaults(dkv.METHODS[name])
        for setting in offered:
            assert setting not in own or own[setting] == form["defaults"].get(setting, own[setting])


def test_numbers_reach_our_own_checks_as_they_were_typed() -> None:
    """Gradio's would round them, or refuse them without saying which."""
    for setting in settings.ADVANCED:
        if not setting.choices:
            widget = setting_widget(setting, 8)
            assert [widget.preprocess(typed) for typed in (1.5, 0, -1)] == [1.5, 0, -1]
    slider = TypedSlider(8, 2048)
    assert slider.get_block_name() == "slider"
    assert [slider.preprocess(typed) for typed in (1.5, -5, 99999, None)] == [1.5, -5, 99999, None]


@pytest.mark.parametrize("typed", [None, "many", 0, -5, math.nan, math.inf])
def test_what_is_no_capacity_is_said_nothing_of(typed: Any) -> None:
    geometry = {"num_kv_heads": 3, "num_layers": 30, "head_dim": 64, "bytes_per_value": 2}
    assert capacity_readout(geometry, typed, 2000, "kv_head") == {"value": "", "note": ""}
    assert capacity_readout(geometry, 128.0, 2000, "kv_head")["value"] == "6.4 % of the prompt"


@pytest.mark.parametrize("typed", [math.nan, math.inf, None, 1.5, True])
def test_what_is_no_whole_number_is_said_in_a_sentence(typed: Any) -> None:
    with pytest.raises(ValueError, match="capacity must be a whole number, got"):
        whole_number("capacity", typed, 1, 9)
